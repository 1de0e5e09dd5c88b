"""The owner process of the twin: runs the physics in real time and serves connections.

One thread waits for the next control step and for all connections at once, so a command is stamped
when it arrives and no other thread delays the physics. The simulation does not wait for commands:
without a new one an arm keeps its last target. Late steps are made up for at once, so that
simulated time follows real time.
"""

from __future__ import annotations

import argparse
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.aloha_physics import ACTION_DIM, DT_S, AlohaSim
from envs.errors import EnvError, PhysicsDiverged
from robots.companion_launcher import start_companion
from robots.errors import ConnectFailed
from robots.owner_server import OwnerServer
from robots.sensor_memory import SensorMemory
from robots.twin_config import JOINTS, SUBSTEP_HZ, TwinConfig
from robots.twin_motion_log import TwinMotionLog
from transport.child_process import ChildProcess, die_with_parent, send_event

MAX_BEHIND_S = 0.5
"""After a longer delay (a stopped process) the missed steps are skipped instead of made up for."""


class Twin:
    """The simulated robot: control steps, reward and motion log, published in ``SensorMemory``.

    Args:
        sim: The physics.
        sensor_memory: Where each state is published.
        config: The configuration.
    """

    def __init__(self, sim: AlohaSim, sensor_memory: SensorMemory, config: TwinConfig) -> None:
        self._sim, self._config = sim, config
        self._joints = sensor_memory.joint_writer()
        self._substeps = SUBSTEP_HZ // config.control_hz
        self._per_tick = max(1, round(DT_S * config.control_hz))
        self.period_ns = round(1e9 / config.control_hz)
        self.motion_log = TwinMotionLog(ACTION_DIM)
        self.episode = -1
        self._count = 0
        self.reset(0)

    def reset(self, seed: int) -> int:
        """Begin the episode ``seed``; returns the stamp of its first state, ns."""
        self._sim.reset(seed)
        self._target = self._sim.agent_pos.astype(np.float32)
        self.episode += 1
        self._step = self._success_step = 0
        self._reward = 0.0
        self._count += 1  # no two states have the same stamp
        self._publish()
        return self._count * self.period_ns

    def command(self, action: NDArray[np.float32], *, sent_ns: int, source: int) -> None:
        """Make ``action``, (A,), the target of the next steps, and log it."""
        self.motion_log.add_command(
            arrived_ns=time.monotonic_ns(),
            sent_ns=sent_ns,
            action=action,
            source=source,
            episode=self.episode,
        )
        self._target = action

    def step(self, due_ns: int) -> None:
        """Simulate one control step towards the target; log and publish the state after it."""
        began_ns = time.monotonic_ns()
        try:
            reward = self._sim.step(self._target, substeps=self._substeps)
        except PhysicsDiverged as error:
            sys.exit(f"twin: {error}")
        self._count += 1
        self._step += 1
        # At the rate of the task's environment: a higher one would make success more likely.
        if self._step % self._per_tick == 0:
            self._reward = max(self._reward, float(reward))
            if not self._success_step and reward >= self._config.success_reward:
                self._success_step = self._step
        self._publish()
        self.motion_log.add_step(
            due_ns=due_ns,
            began_ns=began_ns,
            position=self._sim.agent_pos,
            velocity=self._sim.agent_vel,
            target=self._target,
            reward=reward,
            episode=self.episode,
        )

    def skip(self, steps: int) -> None:
        """Advance the stamp by ``steps`` control steps that are not simulated."""
        self._count += steps

    def _publish(self) -> None:
        state = self._joints.claim()
        state["stamp_ns"][...] = self._count * self.period_ns
        state["received_ns"][...] = time.monotonic_ns()
        state["episode"][...], state["success"][...] = self.episode, self._success_step > 0
        state["step"][...] = (self._success_step or self._step) // self._per_tick
        state["reward"][...] = self._reward
        state["position"][...] = self._sim.agent_pos
        state["qpos"][...] = self._sim.data.qpos
        self._joints.publish()


class TwinOwner:
    """Serves connections and runs the twin's steps when they are due.

    Args:
        twin: The simulated robot.
        sensor_memory, memory_fd: The shared memory and its file descriptor.
        qpos: Length of the simulation's position vector.
        cameras: The process that renders; this one ends if it does.
    """

    def __init__(
        self,
        twin: Twin,
        sensor_memory: SensorMemory,
        memory_fd: int,
        qpos: int,
        cameras: ChildProcess,
    ) -> None:
        self._twin, self._cameras = twin, cameras
        self._server = OwnerServer(
            sensor_memory,
            memory_fd,
            action_dim=ACTION_DIM,
            hello={"qpos": qpos},
            command=lambda action, sent_ns, source: twin.command(
                action, sent_ns=sent_ns, source=source
            ),
            call=self._call,
        )

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._server.address

    def run(self) -> None:
        """Serve and simulate until stdin ends."""
        twin, period_ns = self._twin, self._twin.period_ns
        due_ns = time.monotonic_ns() + period_ns
        while True:
            wait_s = max(0, due_ns - time.monotonic_ns()) / 1e9
            waiting = [sys.stdin, self._cameras.pidfd, *self._server.sockets]
            for ready in select.select(waiting, [], [], wait_s)[0]:
                if ready is sys.stdin:
                    return
                if ready == self._cameras.pidfd:
                    sys.exit("twin: robots.twin_render_process, which renders images, has ended")
                if isinstance(ready, socket.socket):
                    self._server.serve(ready)
            behind_ns = time.monotonic_ns() - due_ns
            if behind_ns > MAX_BEHIND_S * 1e9:
                steps = behind_ns // period_ns
                twin.skip(steps)
                due_ns += steps * period_ns
            while time.monotonic_ns() >= due_ns:
                twin.step(due_ns)
                due_ns += period_ns

    def _call(self, call: str, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            if call == "reset":
                return {"stamp_ns": self._twin.reset(int(arguments["seed"]))}
            if call == "save_record":
                self._twin.motion_log.save(Path(arguments["path"]))
            elif call == "clear_record":
                self._twin.motion_log.clear()
            else:
                return {"error": f"unknown call {call!r}"}
        except (EnvError, OSError) as error:
            return {"error": str(error)}
        return {}


def main(arguments: list[str] | None = None) -> None:
    """Run the process; started by ``SimTwin.companion``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    # Ctrl-C in a terminal signals the whole process group. The arm must survive it, so that the
    # control process can bring it to rest.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(options.parent)
    config = TwinConfig.from_json(options.config)
    shape: dict[str, Any] = {"joints": len(JOINTS), "cameras": config.camera_hw}
    try:
        sim = AlohaSim(config.task)
        shape["qpos"] = sim.model.nq
        memory_fd = SensorMemory.create(**shape)
        sensor_memory = SensorMemory(memory_fd, writable=True, **shape)
        flags = ["--config", options.config, "--memory_fd", str(memory_fd)]
        with start_companion("robots.twin_render_process", flags, pass_fds=[memory_fd]) as cameras:
            owner = TwinOwner(
                Twin(sim, sensor_memory, config), sensor_memory, memory_fd, shape["qpos"], cameras
            )
            send_event("ready", address=owner.address)
            owner.run()
    except (EnvError, ConnectFailed, OSError, ValueError) as error:
        send_event("failed", error=str(error))


if __name__ == "__main__":
    main()
