"""What a checkpoint says of its execution is what is played unless a flag says otherwise, and said.

In simulation, in process and served; what eval_real does with it is in test_runtime_flags.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from policies.errors import ObservationError
from policies.execution import Execution
from policies.types import ActionChunk, MetaObs, PolicyContract
from runtime.control.strategy_selection import (
    choose_execution,
    describe,
    latency_warning,
    result_entry,
    strategy_of,
)
from runtime.eval_real.cli import make_run_config, read_evaluation
from runtime.eval_real.latency_check import latency_lines
from runtime.eval_real.run_config import RunConfig
from runtime.eval_sim import cli as eval_sim
from runtime.eval_sim.episode_worker import _assumptions
from runtime.server import PolicyServer
from runtime.server.server_process import ServerProcess
from tests.runtime.command import status_of
from tests.runtime.serving import serving
from tests.runtime.toy_policy import CONTRACT, ToyPolicy

ENSEMBLE = Execution("temporal_ensemble", 0.05, 1, "config.json: temporal_ensemble_coeff")
FADE = Execution("crossfade", 4.0, 5, "metronome.yaml: execution")


def saying(execution: Execution | None) -> PolicyContract:
    return dataclasses.replace(CONTRACT, execution=execution)


def make() -> ToyPolicy:
    """A policy that says how it is to be played, what it is, and not how fast."""
    policy = ToyPolicy()
    policy.info = dataclasses.replace(policy.info, weights_hash="0f")
    fields = {f.name: getattr(CONTRACT, f.name) for f in dataclasses.fields(CONTRACT)}
    del fields["dt_s"]
    policy.contract = PolicyContract(**{**fields, "execution": ENSEMBLE})
    return policy


@pytest.mark.parametrize(
    ("said", "flags", "played", "source"),
    [
        (None, {}, ("sequential", None, 10), "the default: the checkpoint does not say"),
        (ENSEMBLE, {}, ("temporal_ensemble", 0.05, 1), ENSEMBLE.source),
        (FADE, {}, ("crossfade", 4.0, 5), FADE.source),
        # A flag wins, and says so.
        (ENSEMBLE, {"action_manager": "sequential"}, ("sequential", None, 10), "--action_manager"),
        (ENSEMBLE, {"action_manager": "crossfade"}, ("crossfade", 10.0, 5), "--action_manager"),
        (
            ENSEMBLE,
            {"manager_coef": 0.0},
            ("temporal_ensemble", 0.0, 1),
            f"{ENSEMBLE.source}, --manager_coef",
        ),
        (
            FADE,
            {"n_action_steps": 2},
            ("crossfade", 4.0, 2),
            f"{FADE.source}, --n_action_steps",
        ),
        # What the checkpoint says of a strategy holds when that is asked for by name.
        (
            ENSEMBLE,
            {"action_manager": "temporal_ensemble"},
            ("temporal_ensemble", 0.05, 1),
            "--action_manager",
        ),
        (
            None,
            {"action_manager": "temporal_ensemble", "n_action_steps": 3},
            ("temporal_ensemble", 0.01, 3),
            "--action_manager, --n_action_steps",
        ),
        (
            ENSEMBLE,
            {"ensemble_stride": 5},
            ("temporal_ensemble", 0.05, 5),
            f"{ENSEMBLE.source}, --ensemble_stride",
        ),
    ],
)
def test_flags_override_what_the_checkpoint_recommends(
    said: Execution | None, flags: dict[str, Any], played: tuple[Any, ...], source: str
) -> None:
    contract = saying(said)
    chosen = choose_execution(contract, **flags)
    name, coefficient, steps = played
    assert result_entry(contract, chosen) == {
        "name": name, "coefficient": coefficient, "n_action_steps": steps, "source": source,
        "max_latency_ms": None,
    }  # fmt: skip
    strategy = strategy_of(contract, chosen)
    assert (strategy.name, strategy.stride) == (name, steps)
    assert coefficient is None or strategy.coefficient == coefficient
    assert describe(contract, chosen).startswith(name)
    assert source in describe(contract, chosen)


KNOWN = dataclasses.replace(FADE, max_latency_ms=120)


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        ({}, 120),
        ({"action_manager": "crossfade"}, 120),
        ({"n_action_steps": 5}, 120),
        ({"n_action_steps": 4}, None),
        ({"manager_coef": 3.0}, None),
        ({"action_manager": "temporal_ensemble"}, None),
    ],
)
def test_a_measured_latency_holds_for_the_recommendation_alone(
    flags: dict[str, Any], known: float | None
) -> None:
    chosen = choose_execution(saying(KNOWN), **flags)
    assert chosen.max_latency_ms == known
    assert ("measured up to 120 ms" in describe(CONTRACT, chosen)) == (known is not None)


def test_a_latency_beyond_the_measured_one_is_warned_of() -> None:
    assert latency_warning(KNOWN, 120) is None
    assert latency_warning(FADE, 1e4) is None
    assert latency_warning(KNOWN, 150) == (
        "a latency of 150 ms is beyond the 120 ms up to which crossfade was measured to hold "
        "(metronome.yaml: execution): expect failures"
    )


def make_known() -> ToyPolicy:
    """A policy whose recommendation was measured up to 120 ms."""
    policy = ToyPolicy()
    policy.contract = saying(KNOWN)
    return policy


def test_a_simulation_says_what_was_measured_and_warns_beyond_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("-m", f"{MODEL}_known", "--latency_ms", "110")
    result = evaluate(tmp_path, capsys, *flags)
    assert result["action_manager"]["max_latency_ms"] == 120
    assert "every 5 ticks, measured up to 120 ms of latency (metronome.yaml" in result["said"]
    assert "warning" not in result["said"]
    result = evaluate(tmp_path, capsys, *flags, "--latency_jitter_ms", "20")
    assert "warning: a latency of 130 ms is beyond the 120 ms" in result["said"]


def config_of(server: PolicyServer, execution: Execution | None) -> RunConfig:
    contract = dataclasses.replace(CONTRACT, execution=execution)
    evaluation = read_evaluation(["-c", "dummy", "--task", "fake"])
    return make_run_config(evaluation, server.address, contract, {})


def test_a_robots_server_is_measured_before_anything_moves() -> None:
    slow = dataclasses.replace(KNOWN, max_latency_ms=0)
    with serving(ToyPolicy()) as server:
        assert latency_lines(config_of(server, FADE)) == []
        (measured,) = latency_lines(
            config_of(server, dataclasses.replace(KNOWN, max_latency_ms=6e4))
        )
        assert re.fullmatch(r"latency      p50 \d.* ms \(n=10\)", measured)
        measured, warning = latency_lines(config_of(server, slow))
        assert warning.startswith("warning: a latency of ")
    with serving(RefusingPolicy()) as server:
        (line,) = latency_lines(config_of(server, KNOWN))
        assert line == "latency      not measured: state: got zeros, expected a pose"


class RefusingPolicy(ToyPolicy):
    """Takes no state of zeros."""

    def infer(self, obs: MetaObs) -> ActionChunk:
        if not obs.state.any():
            raise ObservationError("state: got zeros, expected a pose")
        return super().infer(obs)

    def fork(self) -> RefusingPolicy:
        return RefusingPolicy()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"action_manager": "fastest"}, "action_manager: got 'fastest', expected one of"),
        ({"action_manager": "latest", "manager_coef": 0.1}, "latest has no use for it"),
        (
            {"ensemble_stride": 5, "action_manager": "latest"},
            "--ensemble_stride: got 5 with latest, expected it with --action_manager temporal_ens",
        ),
        (
            {"ensemble_stride": 5, "n_action_steps": 4},
            "--ensemble_stride: got 5 beside --n_action_steps 4, expected one of them",
        ),
        ({"ensemble_stride": 11}, "n_action_steps: got 11, expected 1 to chunk_size = 10"),
        ({"n_action_steps": 11}, "n_action_steps: got 11, expected 1 to chunk_size = 10"),
        ({"manager_coef": 2e6}, "manager_coef: got 2000000.0, expected -1000000 to 1000000"),
    ],
)
def test_invalid_strategies_and_numbers_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_execution(saying(ENSEMBLE), **flags)


def evaluate(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    argv = ["-e", "fake", "--env.max_timesteps", "25", "-n", "1", "--videos", "0"]
    assert status_of(eval_sim.main, [*argv, "-o", str(folder), *flags]) == 0
    said = capsys.readouterr().err
    result = json.loads((folder / "fake" / "fake.json").read_text())
    return {**result, "said": said}


MODEL = "python:tests.runtime.test_runtime_strategy_choice:make"
EVERY_TICK = "execution    temporal_ensemble, coefficient 0.05, a new chunk every tick (config.json"
ASSUMED = "assumed      rate 50 Hz: the checkpoint does not say it; --fps does"


@pytest.mark.parametrize("flags", [(), ("--realtime",), ("--num_envs", "2", "-n", "2")])
def test_a_simulation_uses_the_strategy_of_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    result = evaluate(tmp_path, capsys, "-m", MODEL, *flags)
    assert result["action_manager"] == {
        "name": "temporal_ensemble", "coefficient": 0.05, "n_action_steps": 1,
        "source": ENSEMBLE.source, "max_latency_ms": None,
    }  # fmt: skip
    if not flags:  # by the clock a busy machine may leave some out
        assert result["timing"]["chunks"] == 25
    assert EVERY_TICK in result["said"]
    assert ASSUMED in result["said"]
    assert result["policy"]["weights_hash"] == "0f"
    assert result["assumed"] == [ASSUMED.removeprefix("assumed      ")]


def test_a_flag_of_the_simulation_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--action_manager", "sequential", "--n_action_steps", "5", "--fps", "50")
    result = evaluate(tmp_path, capsys, "-m", MODEL, *flags)
    assert result["action_manager"]["source"] == "--action_manager, --n_action_steps"
    assert result["timing"]["chunks"] == 5
    assert "execution    sequential, a new chunk every 5 ticks (--action_manager" in result["said"]
    assert result["assumed"] == []
    assert "assumed" not in result["said"]


def test_a_server_prints_the_strategy_and_sends_it_to_clients(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "transport.child_process")
    with ServerProcess(["-m", MODEL]) as server:
        result = evaluate(tmp_path, capsys, "-m", server.address)
    assert result["action_manager"]["name"] == "temporal_ensemble"
    assert result["timing"]["chunks"] == 25
    assert result["policy"]["weights_hash"] == "0f"
    assert result["assumed"] == [ASSUMED.removeprefix("assumed      ")]
    said = "\n".join(caplog.messages)
    assert f"🚀 Policy Server started on {server.address}" in said
    assert EVERY_TICK in said
    assert ASSUMED in said
    assert "rate         50 Hz" in said


class World:
    """As much of one as is asked what it assumes."""

    def __init__(self, **info: Any) -> None:
        self._info = info

    def info(self) -> dict[str, Any]:
        return self._info


@pytest.mark.parametrize(
    ("info", "flags", "said"),
    [
        ({}, [], []),
        ({"assumed": ["rate of the world 50 Hz"]}, [], ["rate of the world 50 Hz"]),
        (
            {"shadows": True, "msaa": 4},
            [],
            [
                "rendering shadows true, msaa 4: the checkpoint does not say it; --env.shadows, "
                "--env.msaa does"
            ],
        ),
        ({"shadows": True, "msaa": 4}, ["--env.shadows", "true", "--env.msaa", "4"], []),
    ],
)
def test_assumptions_about_the_world_are_reported(
    info: dict[str, Any], flags: list[str], said: list[str]
) -> None:
    config = eval_sim.read_config(["-m", MODEL, "-e", "aloha", *flags])
    assert list(_assumptions(config, World(**info), CONTRACT)) == said  # type: ignore[arg-type]
