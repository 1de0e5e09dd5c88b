"""From the moment a robot begins to write its sensors to the moment a command has arrived there.

    END_TO_END_EXCHANGES=2000 pytest bench/test_end_to_end.py

The robot is a process of its own, and both moments are of its clock. In between, every stage is
timed by whoever does it: ``sensor`` (written, and seen by the client), the stages of the request
(``docs/design.md``), ``execute`` (the chunk accepted, the command made from it) and ``command``
(sent, and arrived). The total is not made from them: what they leave out shows as the difference.
In process, over shared memory and over ZMQ take turns in blocks of one run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.end_to_end.robot import RobotProcess
from bench.records import Records
from bench.ways import ways
from policies.types import STAGES, Policy, PolicyContract
from runtime.control.blending import make_strategy
from runtime.control.chunk_executor import ChunkExecutor
from runtime.options.defaults import DEFAULT_CHECKPOINT

EXCHANGES = int(os.environ.get("END_TO_END_EXCHANGES", "200"))
BLOCK, WARMUP = 25, 5
WITHIN = 0.05
"""How far off the sum of the stages may be from the total."""
COLUMNS = ("sensor", *STAGES, "execute", "command")
MODELS = {
    "null policy, 1 x 480x640": "python:bench.end_to_end.policies:one_camera",
    "null policy, 4 x 480x640": "python:bench.end_to_end.policies:four_cameras",
    "the example checkpoint": DEFAULT_CHECKPOINT,
}
Samples = Mapping[str, NDArray[np.float64]]
"""Microseconds by stage, and the ``total``."""


def executor_for(contract: PolicyContract) -> ChunkExecutor:
    strategy = make_strategy(
        "latest", chunk_size=contract.chunk_size, n_action_steps=contract.n_action_steps
    )
    return ChunkExecutor(contract, strategy)


def exchange(robot: RobotProcess, policy: Policy, executor: ChunkExecutor) -> dict[str, int]:
    """One frame to one command; ns by stage, and the robot's own ``total``."""
    obs, written_ns = robot.observe()
    seen_ns = time.monotonic_ns()
    chunk = policy.infer(obs)
    inferred_ns = time.monotonic_ns()
    executor.requested(obs.timestep)
    executor.accept(chunk)
    action = executor.command(obs.timestep)
    commanded_ns = time.monotonic_ns()
    arrived_ns = robot.command(action)
    return {
        "sensor": seen_ns - written_ns,
        **{stage: chunk.stages_ns.get(stage, 0) for stage in STAGES},
        "execute": commanded_ns - inferred_ns,
        "command": arrived_ns - commanded_ns,
        "total": arrived_ns - written_ns,
    }


def measure(model: str) -> dict[str, Samples]:
    """By way: ``EXCHANGES`` of each, in turns."""
    taken: dict[str, list[dict[str, int]]] = {}
    with ways(model) as policies, ExitStack() as stack:
        contract = policies["in process"].contract
        robot = stack.enter_context(closing(RobotProcess(contract)))
        for _ in range(max(1, EXCHANGES // BLOCK)):
            for way, policy in policies.items():
                executor = executor_for(contract)
                turn = [exchange(robot, policy, executor) for _ in range(WARMUP + BLOCK)]
                taken.setdefault(way, []).extend(turn[WARMUP:])
    return {
        way: {name: np.array([row[name] for row in rows]) / 1e3 for name in rows[0]}
        for way, rows in taken.items()
    }


def off(samples: Samples) -> NDArray[np.float64]:
    """|sum of the stages − total| ÷ total, per exchange."""
    total: NDArray[np.float64] = samples["total"]
    return np.abs(sum(samples[name] for name in COLUMNS) - total) / total


def table(name: str, measured: Mapping[str, Samples]) -> str:
    """p50 and p99 of every stage, ways side by side."""
    lines = [f"\nsensor write to command arrived, µs, {name}"]
    lines.append(f"{'':14}" + "".join(f"{way + ' p50':>18}{'p99':>10}" for way in measured))
    for row in (*COLUMNS, "total"):
        line = f"{row:14}"
        for samples in measured.values():
            p50, p99 = np.percentile(samples[row], (50, 99))
            line += f"{p50:18.1f}{p99:10.1f}"
        lines.append(line)
    line = f"{'off by, %':14}"
    for samples in measured.values():
        p50, p99 = np.percentile(100 * off(samples), (50, 99))
        line += f"{p50:18.2f}{p99:10.2f}"
    return "\n".join([*lines, line])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", MODELS)
def test_sensor_to_command(name: str, records: Records, capsys: pytest.CaptureFixture[str]) -> None:
    model = MODELS[name]
    if "/" in model and not Path(model).exists():
        pytest.skip(f"{model} is not here")
    measured = measure(model)
    with capsys.disabled():
        print(table(name, measured))
    for way, samples in measured.items():
        group = f"end to end, {name}, {way}"
        records.add(group, {stage: each for stage, each in samples.items() if each.any()})
        differences = 100 * off(samples)
        for statistic, percent in (("p50", 50), ("p99", 99)):
            value = float(np.percentile(differences, percent))
            records.values[f"{group}: stages - total, {statistic}, %"] = value
        records.save("end_to_end", group)
        # Of the typical exchange; its tail has a budget, since the machine has a say in it.
        assert np.median(differences) < 100 * WITHIN
