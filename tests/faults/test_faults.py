"""A process dies in mid-motion: the arm comes to rest within its limits, in time, with a fault.

Every process is real. ``METRONOME_SOAK=1`` kills the server 50 times and the others 20 times
each (``METRONOME_SERVER_KILLS``, ``METRONOME_KILLS``, ``METRONOME_STALLS`` say otherwise);
``METRONOME_SEED`` chooses other moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.faults.rig import (
    PERIOD_S,
    Motion,
    Program,
    Server,
    Twin,
    evaluation,
    max_sensing_age_s,
    stop_s,
    twin,
)

SOAK = bool(os.environ.get("METRONOME_SOAK"))
SEED = int(os.environ.get("METRONOME_SEED", "0"))
FOR_EVER = ("--max_timesteps", "1000000", "-n", "1")
KILLS_OF_THE_SERVER = int(os.environ.get("METRONOME_SERVER_KILLS", "50" if SOAK else "1"))
KILLS_OF_OURS = int(os.environ.get("METRONOME_KILLS", "20" if SOAK else "1"))
STALLS = int(os.environ.get("METRONOME_STALLS", "10" if SOAK else "1"))
soak_only = pytest.mark.skipif(not SOAK, reason="METRONOME_SOAK is not set")
STALL_S = 0.1 + 2 * PERIOD_S
"""How long the watchdog waits for the commands of a control process."""

pytestmark = [pytest.mark.alone, pytest.mark.long, pytest.mark.timeout(3600 if SOAK else 300)]


class FaultyRollout:
    """A running rollout, and the faults that a test causes in it."""

    def __init__(self, arm: Twin, server: Server, program: Program) -> None:
        self.arm, self.server, self.program = arm, server, program
        self.rng = random.Random(SEED)
        self.rests_s: dict[str, list[float]] = {}

    def start(self) -> None:
        self.program.expect("rollout 0")
        self.program.press("\n")
        self.program.expect("^run$")

    def into_motion(self) -> None:
        """Wait for a random moment at which the arm is being moved."""
        until_s = time.monotonic() + self.rng.uniform(0.3, 1.5)
        while True:
            time.sleep(0.002)
            if time.monotonic() > until_s:
                motion = Motion.of(self.arm.record())
                if motion.moving_at(time.monotonic_ns()):
                    return

    def fault(self, name: str, number: int, pid: int, within_s: float, said: str) -> None:
        """Signal ``pid`` in mid-motion; the arm must be at rest ``within_s``, and latched."""
        self.arm.robot.clear_record()
        self.into_motion()
        at_ns = time.monotonic_ns()
        os.kill(pid, number)
        self.stopped(name, at_ns, within_s, said)

    def stopped(self, name: str, at_ns: int, within_s: float, said: str) -> None:
        self.program.expect(f"stopped: .*{said}")
        motion = Motion.of(self.arm.record())
        motion.check(self.arm.limits)
        rest_s = motion.rest_s(at_ns)
        assert rest_s <= within_s, f"{name}: at rest after {rest_s:.3f} s, allowed {within_s:.3f}"
        self.rests_s.setdefault(name, []).append(rest_s)
        gap_ms = 1e3 * motion.longest_gap_s
        said = f"at rest after {rest_s:.3f} s of {within_s:.3f}, longest gap {gap_ms:.0f} ms"
        print(f"{name}: {said}", flush=True)  # noqa: T201
        # The fault is latched: without a resume nothing moves.
        self.arm.robot.clear_record()
        time.sleep(0.2)
        held = self.arm.record()["step_target"]
        assert len(held) and (held == held[0]).all(), f"{name}: moved although latched"

    def resume(self) -> None:
        self.arm.robot.clear_record()
        self.program.press("r")
        self.program.expect("^run$")
        self.into_motion()
        Motion.of(self.arm.record()).check(self.arm.limits)

    def replace_server(self) -> None:
        """Replace a dead server by another at the same address."""
        self.server.close()
        self.server = Server("make_short", self.server.port)
        self.program.expect("server connected again")


@pytest.fixture(scope="module")
def arm() -> Iterator[Twin]:
    with twin() as running:
        yield running


@contextlib.contextmanager
def faulty_rollout(arm: Twin, folder: Path) -> Iterator[FaultyRollout]:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Server("make_short"))
        program = stack.enter_context(evaluation(arm, server.address, folder, *FOR_EVER))
        rollout = FaultyRollout(arm, server, program)
        stack.callback(lambda: rollout.server.close())  # noqa: PLW0108  not the one of now
        rollout.start()
        yield rollout
        program.press("q")
        program.expect("stopped: ")
        program.press("q")
        assert program.wait() == 130
        for name, rests_s in rollout.rests_s.items():
            print(f"{name}: {len(rests_s)} times, at rest after {max(rests_s):.3f} s at most")  # noqa: T201


def test_the_arm_stops_when_the_server_dies(arm: Twin, tmp_path: Path) -> None:
    times = KILLS_OF_THE_SERVER
    with faulty_rollout(arm, tmp_path) as rollout:
        for _ in range(times):
            rollout.fault(
                "server",
                signal.SIGKILL,
                rollout.server.pid,
                max_sensing_age_s() + stop_s(arm.limits),
                "lost",
            )
            rollout.replace_server()
            rollout.resume()


def test_the_arm_stops_when_a_worker_process_dies(arm: Twin, tmp_path: Path) -> None:
    times = KILLS_OF_OURS
    with faulty_rollout(arm, tmp_path) as rollout:
        for _ in range(times):
            pid = rollout.program.child("runtime.eval_real.sensing_process")
            allowed_s = max_sensing_age_s() + stop_s(arm.limits)
            rollout.fault("sensing", signal.SIGKILL, pid, allowed_s, "sensing process")
            rollout.resume()
            pid = rollout.program.child("runtime.eval_real.control_process")
            allowed_s = STALL_S + stop_s(arm.limits)
            rollout.fault("control", signal.SIGKILL, pid, allowed_s, "control process died")
            rollout.resume()
        if not SOAK:
            return
        pid = rollout.program.child("runtime.eval_real.watchdog_process")
        allowed_s = max_sensing_age_s() + stop_s(arm.limits)
        rollout.fault("watchdog", signal.SIGKILL, pid, allowed_s, "watchdog")
        rollout.resume()
        pid = rollout.program.child("runtime.eval_real.control_process")
        rollout.fault("stalled", signal.SIGSTOP, pid, STALL_S + stop_s(arm.limits), "stalled")
        rollout.resume()


@pytest.mark.long
@soak_only
def test_the_arm_stops_when_the_server_stalls_or_a_key_is_pressed(
    arm: Twin, tmp_path: Path
) -> None:
    times = STALLS
    with faulty_rollout(arm, tmp_path) as rollout:
        for _ in range(times):
            arm.robot.clear_record()
            rollout.into_motion()
            os.kill(rollout.server.pid, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(rollout.server.pid, signal.SIGCONT)
            rollout.into_motion()
            motion = Motion.of(arm.record())
            motion.check(arm.limits)
            assert not any("at rest" in line for line in rollout.program.said[-2:])
            at_ns = time.monotonic_ns()
            os.kill(rollout.server.pid, signal.SIGSTOP)
            time.sleep(2.0)
            os.kill(rollout.server.pid, signal.SIGCONT)
            # Half a chunk is played before the last one; then it starves and is latched.
            rollout.stopped("server stalled", at_ns, 30 * PERIOD_S + stop_s(arm.limits), "no chunk")
            rollout.resume()
            arm.robot.clear_record()
            rollout.into_motion()
            at_ns = time.monotonic_ns()
            rollout.program.press(" ")
            rollout.stopped("key", at_ns, 0.1 + stop_s(arm.limits), "emergency")
            rollout.resume()


@pytest.mark.long
@pytest.mark.parametrize(
    "factory",
    [
        pytest.param("make", marks=soak_only),
        pytest.param("make_short", marks=soak_only),
        "make_whole",
    ],
)
def test_server_stalls_of_100_ms_starve_no_tick(arm: Twin, tmp_path: Path, factory: str) -> None:
    """At any moment of a chunk, the end of one that is played to its end included."""
    ticks, rollouts = (500, 3) if SOAK else (250, 1)
    chance, stalls = random.Random(SEED), 0
    flags = ("--max_timesteps", str(ticks), "-n", str(rollouts), "--yes")
    with (
        Server(factory) as server,
        evaluation(arm, server.address, tmp_path, *flags) as program,
    ):
        program.expect("^run$")
        arm.robot.clear_record()
        end_s = time.monotonic() + rollouts * (ticks * PERIOD_S)
        while time.monotonic() < end_s and program.process.poll() is None:
            time.sleep(chance.uniform(0.2, 0.6))
            server.signal(signal.SIGSTOP)
            time.sleep(0.1)
            server.signal(signal.SIGCONT)
            stalls += 1
        assert program.wait() == 0
    Motion.of(arm.record()).check(arm.limits)
    told = [line for line in program.said if line.startswith("rollout ")]
    print(f"{factory}: {stalls} stalls; {told}")  # noqa: T201
    assert len(told) == rollouts
    assert stalls >= 5
    for line in told:
        assert f"{ticks} ticks" in line
        assert line.endswith(" 0 starved")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=[soak_only, pytest.mark.long]),
        pytest.param(signal.SIGTERM, marks=[soak_only, pytest.mark.long]),
        signal.SIGKILL,
    ],
)
def test_the_arm_stops_when_the_parent_ends_or_dies(arm: Twin, tmp_path: Path, number: int) -> None:
    with (
        Server("make_short") as server,
        evaluation(arm, server.address, tmp_path, *FOR_EVER) as program,
    ):
        rollout = FaultyRollout(arm, server, program)
        rollout.start()
        control = program.child("runtime.eval_real.control_process")
        arm.robot.clear_record()
        rollout.into_motion()
        at_ns = time.monotonic_ns()
        program.signal(number)
        assert program.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        while Path(f"/proc/{control}").exists():
            time.sleep(0.01)
        motion = Motion.of(arm.record())
        motion.check(arm.limits)
        assert motion.rest_s(at_ns) <= 0.1 + stop_s(arm.limits)
        if number != signal.SIGKILL:
            assert (tmp_path / "sim_twin" / "sim_transfer_cube.json").exists()


@pytest.mark.long
@soak_only
def test_a_chunk_with_nan_latches_a_fault(arm: Twin, tmp_path: Path) -> None:
    with (
        Server("make_broken") as server,
        evaluation(arm, server.address, tmp_path, "--yes", *FOR_EVER) as program,
    ):
        arm.robot.clear_record()
        program.expect("latched: .*NaN")
        assert program.wait() == 1
        Motion.of(arm.record()).check(arm.limits)


@pytest.mark.long
@soak_only
def test_actions_outside_the_limits_are_clamped(arm: Twin, tmp_path: Path) -> None:
    with Server("make_reaching") as server:
        arm.robot.clear_record()
        flags = ("--yes", "-n", "1", "--max_timesteps", "80")
        with evaluation(arm, server.address, tmp_path, *flags) as program:
            assert program.wait() == 0
        assert any("clamped" in line for line in program.said)
        motion = Motion.of(arm.record())
        motion.check(arm.limits)
        assert np.abs(motion.action[:, 0]).max() > 1.0  # it went as far as it could in that time
