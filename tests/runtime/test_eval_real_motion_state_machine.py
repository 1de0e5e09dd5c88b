"""The motion state machine keeps the limits, and a recording of it replays bit for bit."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.types import ActionChunk, PolicyContract
from robots.base import ActionKind, ActionSpec, arm_actions
from robots.errors import ConfigError
from robots.joint_limits import JointLimits
from runtime.eval_real.control_enums import MOVING, Phase, Signal
from runtime.eval_real.motion_state_machine import MAX_APPROACHES, MotionStateMachine
from runtime.eval_real.recording import Recording
from runtime.eval_real.replay import main, replay, weights
from runtime.eval_real.run_config import RobotLimits, RunConfig, default_near

CONTRACT = PolicyContract("toy", (), 3, 3, chunk_size=20, n_action_steps=10)
LIMITS = JointLimits(
    np.array([-1.0, -2.0, 0.0]),
    np.array([1.0, 2.0, 1.0]),
    np.array([1.0, 2.0, 3.0]),
    np.array([10.0, 8.0, 30.0]),
)
START = np.array([0.2, -0.3, 0.5], np.float32)
ROBOT_LIMITS = RobotLimits(
    LIMITS, START, np.array([0.5, 0.5, 0.5]), arm_actions(("a", "b", "grip"), (2,))
)


def config(**changes: object) -> RunConfig:
    made = RunConfig(
        robot="toy",
        contract_json=CONTRACT.to_json(),
        address="127.0.0.1:1",
        max_timesteps=60,
        fault_after_s=0.2,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


class RecordedMachine:
    """A motion state machine, and the rows that a control process would record of it."""

    def __init__(self, config: RunConfig, robot_limits: RobotLimits = ROBOT_LIMITS) -> None:
        self.config, self.robot_limits = config, robot_limits
        self.machine = config.make_state_machine(robot_limits)
        self.rows: list[dict[str, object]] = []
        self.chunks: list[dict[str, object]] = []
        self.signals = Signal.NONE
        self.pose = np.zeros(3, np.float32)

    def reset(self, pose: np.ndarray) -> None:
        self.pose = np.asarray(pose, np.float32)
        self.signals |= Signal.RESET
        self.machine.reset(self.pose)

    def signal(self, signal: Signal) -> None:
        """As the control process: a call that does not apply now is neither made nor recorded."""
        machine = self.machine
        rests = machine.phase in (Phase.HOLD, Phase.FAULT)
        if signal in (Signal.START, Signal.RESUME) and self.signals & ~Signal.RESET:
            return  # one command a period, and fault checks come after it
        if signal is Signal.START and rests:
            self.reset(machine.stream.last_command.copy())
            machine.start()
        elif signal is Signal.RESUME and rests:
            machine.resume()
        elif signal is Signal.STOP:
            machine.stop()
        elif signal is Signal.FAIL and not machine.fault and machine.phase is not Phase.FAULT:
            machine.fail("a test")
        else:
            return
        self.signals |= signal

    def give(self, chunk: ActionChunk) -> None:
        if self.machine.phase not in (Phase.WAIT, Phase.RUN):
            return
        actions = np.zeros((CONTRACT.chunk_size, 3), np.float32)
        actions[: len(chunk)] = chunk.actions
        self.machine.accept(chunk)
        self.chunks.append(
            {"row": len(self.rows), "actions": actions, "count": len(chunk),
             "obs_timestep": chunk.obs_timestep, "first_action_offset": 0,
             "t_capture_ns": 0, "stages_ns": np.zeros(8, np.int64)}
        )  # fmt: skip

    def command(self, advance: int = 1) -> np.ndarray:
        tick = self.machine.tick
        command = self.machine.command(advance).copy()
        played = self.machine.tick != tick
        self.rows.append(
            {"row": len(self.rows), "tick": self.machine.tick - played, "played": int(played),
             "signals": int(self.signals), "advance": advance, "command": command,
             "pose": self.pose.copy()}
        )  # fmt: skip
        self.signals = Signal.NONE
        return command

    def recording(self) -> Recording:
        rows, chunks = (
            {name: np.stack([row[name] for row in table]) for name in table[0]} if table else {}
            for table in (self.rows, self.chunks)
        )
        return Recording(rows, chunks, self.config, self.robot_limits, {"seed": 0})

    def until(self, phase: Phase, most: int = 500) -> list[np.ndarray]:
        commands = []
        while self.machine.phase is not phase:
            commands.append(self.command())
            assert len(commands) < most, f"still {self.machine.phase.name}"
        return commands


def check_limits(commands: np.ndarray, period_s: float) -> None:
    commands = commands.astype(np.float64)
    speed = np.diff(commands, axis=0) / period_s
    force = np.diff(speed, axis=0) / period_s
    assert (commands >= LIMITS.position_lower).all()
    assert (commands <= LIMITS.position_upper).all()
    assert (np.abs(speed) <= LIMITS.velocity + 1e-5 / period_s).all()
    assert (np.abs(force) <= LIMITS.acceleration + 1e-6 / period_s**2).all()


def chunk(timestep: int, values: np.ndarray | float, length: int = 20) -> ActionChunk:
    actions = np.zeros((length, 3), np.float32) + np.asarray(values, np.float32)
    return ActionChunk(actions, timestep)


finite = st.floats(-3, 3, width=32)
events = st.one_of(
    st.tuples(st.just("signal"), st.sampled_from([*Signal][:-1])),
    st.tuples(
        st.just("chunk"),
        st.tuples(st.integers(-3, 3), st.lists(finite, min_size=6, max_size=6)),
    ),
    st.tuples(st.just("nan"), st.just(0)),
    st.tuples(st.just("command"), st.integers(1, 4)),
    st.tuples(st.just("many"), st.integers(1, 40)),
)


def play(recorded: RecordedMachine, steps: list[tuple[str, object]]) -> np.ndarray:
    """The commands of ``steps``, from the pose that the machine was reset to."""
    commands = [recorded.pose.copy()] * 2
    commands.append(recorded.command())
    for kind, value in steps:
        if kind == "signal":
            recorded.signal(value)
        elif kind in ("chunk", "nan"):
            ahead, ends = value if kind == "chunk" else (0, [np.nan] * 6)
            path = np.linspace(ends[:3], ends[3:], 20)
            tick = recorded.machine.tick // recorded.machine.stream.ratio
            recorded.give(chunk(max(0, tick + ahead), path))
        else:
            for _ in range(value if kind == "many" else 1):
                commands.append(recorded.command(value if kind == "command" else 1))
    return np.stack(commands)


several_steps = st.lists(events, max_size=60)
managers = st.sampled_from(["sequential", "temporal_ensemble", "latest"])
rates = st.sampled_from([50.0, 100.0])


@settings(max_examples=60)
@given(several_steps, managers, rates)
def test_limits_hold_and_the_recording_replays(
    steps: list[tuple[str, object]], manager: str, rate: float
) -> None:
    recorded = RecordedMachine(config(action_manager=manager, publish_rate=rate))
    recorded.reset(np.array([0.5, 1.0, 0.2]))
    check_limits(play(recorded, steps), recorded.config.period_s)
    recording = recorded.recording()
    assert replay(recording).first_difference(recording) is None


DRIVES = RobotLimits(
    LIMITS,
    np.array([START[0], START[1], 0], np.float32),
    np.array([0.5, 0.5, 0.5]),
    (ActionSpec("a"), ActionSpec("b"), ActionSpec("x.vel", ActionKind.VELOCITY, "m/s")),
)
"""Two joints and a base that is commanded by its velocity."""


@settings(max_examples=60)
@given(several_steps, managers, rates)
def test_a_velocity_is_within_its_limits_zero_at_rest_and_replayed(
    steps: list[tuple[str, object]], manager: str, rate: float
) -> None:
    recorded = RecordedMachine(config(action_manager=manager, publish_rate=rate), DRIVES)
    recorded.reset(np.array([0.5, 1.0, 0.0]))
    commands = play(recorded, steps)
    period_s = recorded.config.period_s
    check_limits(np.where([True, True, False], commands, 0.0), period_s)
    speeds = commands[:, 2].astype(np.float64)
    assert (np.abs(speeds) <= min(LIMITS.velocity[2], LIMITS.position_upper[2])).all()
    assert (np.abs(np.diff(speeds)) <= LIMITS.acceleration[2] * period_s + 1e-6).all()
    recorded.signal(Signal.STOP)
    resting = (Phase.HOLD, Phase.FAULT, Phase.WAIT)
    for _ in range(recorded.machine.stream.limiter.worst_ticks_to_rest() + 1):
        last = recorded.command()
    assert recorded.machine.phase in resting
    assert last[2] == 0
    recording = recorded.recording()
    assert replay(recording).first_difference(recording) is None


@pytest.mark.parametrize("how", ["played to its end", "starved", "stopped", "failed"])
def test_a_driving_base_stands_still_after(how: str) -> None:
    """Whatever ends a rollout, "hold" is zero for a velocity."""
    recorded = RecordedMachine(config(), DRIVES)
    recorded.reset(DRIVES.start_pose)
    recorded.signal(Signal.START)
    recorded.until(Phase.WAIT)
    driving = np.array([START[0], START[1], 0.4])
    recorded.give(chunk(0, driving))  # at rest it may begin with any speed: no approach
    assert recorded.machine.phase is Phase.RUN
    commands = [recorded.command() for _ in range(12)]
    assert commands[-1][2] == pytest.approx(0.4)
    if how == "played to its end":
        for tick in range(10, 70, 10):
            recorded.give(chunk(tick, driving))
            commands += [recorded.command() for _ in range(10)]
    elif how != "starved":
        recorded.signal(Signal.STOP if how == "stopped" else Signal.FAIL)
    commands += recorded.until(
        Phase.HOLD if how in ("played to its end", "stopped") else Phase.FAULT
    )
    commands += [recorded.command() for _ in range(5)]
    speeds = np.stack(commands)[:, 2].astype(np.float64)
    assert not speeds[-5:].any()
    assert (
        np.abs(np.diff(speeds)) <= LIMITS.acceleration[2] * recorded.config.period_s + 1e-6
    ).all()


def test_default_near_follows_from_unit_and_range() -> None:
    limits = JointLimits(
        np.array([-100.0, 0, -90, -2]), np.array([100.0, 50, 90, 2]), *np.ones((2, 4))
    )
    robot_limits = RobotLimits(
        limits,
        None,
        np.ones(4),
        (
            ActionSpec("lift", unit="range"),
            ActionSpec("grip", ActionKind.GRIPPER, "range"),
            ActionSpec("wrist", unit="deg"),
            ActionSpec("waist"),
        ),
    )
    np.testing.assert_allclose(default_near(robot_limits), [10.0, 5.0, 5.729578, 0.1], rtol=1e-6)
    endless = dataclasses.replace(
        robot_limits, limits=JointLimits(np.full(4, -np.inf), np.full(4, np.inf), *np.ones((2, 4)))
    )
    with pytest.raises(
        ConfigError, match=r"joint 0 \(lift, range\): got no position limits.*--near"
    ):
        default_near(endless)


def test_a_rollout_from_far_away_is_approached_slowly_and_ends_by_itself(tmp_path: Path) -> None:
    recorded = RecordedMachine(config())
    recorded.reset(np.array([-0.9, 1.8, 1.0]))
    recorded.signal(Signal.START)
    approach = np.stack(recorded.until(Phase.WAIT)).astype(np.float64)
    assert np.array_equal(approach[-1].astype(np.float32), START)
    assert np.abs(np.diff(approach, axis=0)).max() <= 0.5 * recorded.config.period_s + 1e-6
    # The policy wants to begin elsewhere: there too only slowly, and then it is asked again.
    recorded.give(chunk(0, START + np.float32(0.4)))
    assert recorded.machine.phase is Phase.APPROACH
    recorded.until(Phase.WAIT)
    assert recorded.machine.tick == 0
    for tick in range(0, 60, 10):
        recorded.give(chunk(tick, START + np.float32(0.4)))
        for _ in range(10):
            recorded.command()
    recorded.until(Phase.HOLD)
    assert recorded.machine.finished
    recording = recorded.recording()
    shares = weights(recording)
    assert shares.shape == (60, 7)  # the first one only said where to begin
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)

    recording.save(tmp_path / "rollout_000", shares)
    loaded = Recording.load(tmp_path / "rollout_000")
    assert replay(loaded).first_difference(loaded) is None
    assert main([str(tmp_path)]) == 0
    changed = dict(loaded.rows)
    changed["command"] = changed["command"].copy()
    changed["command"][-1, 0] = np.nextafter(changed["command"][-1, 0], np.float32(9))
    dataclasses.replace(loaded, rows=changed).save(tmp_path / "rollout_001", shares)
    assert main([str(tmp_path / "rollout_001")]) == 1
    assert main([str(tmp_path / "nothing")]) == 2


def test_a_recording_of_the_format_before_is_played_again(tmp_path: Path) -> None:
    recorded = RecordedMachine(config())
    recorded.reset(START)
    recorded.until(Phase.HOLD)
    for _ in range(3):
        recorded.command()
    stem = tmp_path / "rollout_000"
    recorded.recording().save(stem, np.zeros((0, 0), np.float32))
    facts = json.loads(stem.with_suffix(".json").read_text())
    facts["format"] = 3
    facts["mission"] = {
        "robot": "toy",
        "overrides": {"address": "127.0.0.1:2"},
        "contract_json": CONTRACT.to_json(),
        "address": "127.0.0.1:1",
        "wishes": {
            "transport": "zmq",
            "resize": False,
            "jpeg_quality": 80,
            "server_key": "/gone/server.key",
            "client_key": "/gone/arm.key_secret",
        },
        "language": "Reach.",
        "action_manager": "sequential",
        "manager_coef": None,
        "n_action_steps": None,
        "publish_rate": 50.0,
        "sensing_rate": 50.0,
        "max_timesteps": 60,
        "near": None,
        "same_joints": False,
        "fault_after_s": 0.2,
        "max_chunk_age_s": 5.0,
        "max_sensing_age_s": 0.5,
        "connect_timeout_s": 15.0,
        "priority": 0,
        "video_fps": 10.0,
        "trace": "",
        "fps": None,
        "execution_source": "the default",
    }
    stem.with_suffix(".json").write_text(json.dumps(facts))
    assert main([str(stem)]) == 0
    loaded = Recording.load(stem).config
    assert (loaded.trace, loaded.language, loaded.connection.jpeg_quality) == (None, "Reach.", 80)
    assert loaded.strategy().name == "sequential"


def test_a_policy_that_moves_its_start_after_each_approach_is_a_fault() -> None:
    recorded = RecordedMachine(config())
    recorded.reset(START)
    recorded.signal(Signal.START)
    for attempt in range(MAX_APPROACHES + 1):
        recorded.until(Phase.WAIT)
        recorded.give(chunk(0, START + np.float32(0.3 * (-1) ** attempt)))
    recorded.until(Phase.FAULT)
    assert re.fullmatch(
        r"joint 1 \(b\): the policy begins 0\.6\d+ rad away \(--near: 0\.1\), after 3 moves to "
        "where its chunks began",
        recorded.machine.fault,
    )


@pytest.mark.parametrize("rate", [50.0, 150.0])
def test_a_fault_is_latched_until_it_is_resumed_and_ticks_go_on(rate: float) -> None:
    recorded = RecordedMachine(config(publish_rate=rate))
    recorded.reset(START)
    recorded.signal(Signal.START)
    recorded.until(Phase.WAIT)
    recorded.give(chunk(0, START))
    for _ in range(5):
        recorded.command()
    recorded.signal(Signal.FAIL)
    recorded.until(Phase.FAULT)
    assert recorded.machine.phase not in MOVING
    recorded.give(chunk(9, START + np.float32(0.1)))
    rest = [recorded.command() for _ in range(5)]
    assert np.ptp(rest, axis=0).max() == 0
    recorded.signal(Signal.RESUME)
    assert recorded.machine.phase is Phase.WAIT
    tick = recorded.machine.tick
    assert tick >= 5
    assert tick % recorded.machine.stream.ratio == 0
    recorded.give(chunk(tick // recorded.machine.stream.ratio, START + np.float32(0.05)))
    recorded.command()
    assert recorded.machine.phase is Phase.RUN
    assert recorded.machine.tick == tick + 1


def test_without_chunks_it_stops_and_latches_by_itself() -> None:
    recorded = RecordedMachine(config())
    recorded.reset(START)
    recorded.signal(Signal.START)
    recorded.until(Phase.WAIT)
    recorded.give(chunk(0, np.linspace(START, START + 0.3, 20)))
    recorded.until(Phase.FAULT)
    assert "no chunk" in recorded.machine.fault


@pytest.mark.parametrize(
    "module", ["runtime.eval_real.control_process", "runtime.eval_real.watchdog_process"]
)
def test_processes_that_command_the_robot_import_no_heavy_library(module: str) -> None:
    """Nor does the twin's driver in it: a page fault or a thread of theirs would cost a tick."""
    code = (
        f"import sys, {module}\n"
        "from robots.factory import make_robot\n"
        "make_robot('sim_twin')\n"
        "print([m for m in ('torch', 'zmq', 'mujoco', 'envs', 'av') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_start_and_resume_are_refused_in_motion() -> None:
    machine: MotionStateMachine = config().make_state_machine(ROBOT_LIMITS)
    machine.reset(START + np.float32(0.3))
    machine.start()
    assert machine.phase is Phase.APPROACH
    with pytest.raises(ValueError, match="got phase APPROACH, expected HOLD"):
        machine.start()
    with pytest.raises(ValueError, match="got phase APPROACH, expected HOLD or FAULT"):
        machine.resume()
