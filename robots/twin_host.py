"""The process that is the twin: physics in real time, whoever is connected.

One thread waits for the next control step and for every connection at once, so a command is
stamped when it arrives and nothing contends with the physics. The world does not wait: with no new
command an arm keeps its last target, and a step that came late is made up for at once, so that
simulated time is real time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.errors import EnvError, PhysicsDiverged
from envs.physics import ACTION_DIM, DT_S, AlohaSim
from robots.errors import ConnectFailed
from robots.processes import Child, die_with_parent, say
from robots.twin_board import WATCHING, Board
from robots.twin_config import JOINTS, SUBSTEP_HZ, TwinConfig
from robots.twin_link import ACTION, ACTION_HEAD, CALL, MAX_MESSAGE, abstract, decode_action
from robots.twin_record import TwinRecord

MAX_BEHIND_S = 0.5
"""A world that was held up for longer (a stopped process) goes on from there instead."""
ACTION_BYTES = ACTION_HEAD.size + 4 * ACTION_DIM


class Twin:
    """The simulated robot: control steps, reward, record, and the board that shows them."""

    def __init__(self, sim: AlohaSim, board: Board, config: TwinConfig) -> None:
        self._sim, self._board, self._config = sim, board, config
        self._substeps = SUBSTEP_HZ // config.control_hz
        self._per_tick = max(1, round(DT_S * config.control_hz))
        self.period_ns = round(1e9 / config.control_hz)
        self.record = TwinRecord(ACTION_DIM)
        self.episode = -1
        self._count = 0
        self.reset(0)

    def reset(self, seed: int) -> int:
        """A new episode; the stamp of its first state."""
        self._sim.reset(seed)
        self._target = self._sim.agent_pos.astype(np.float32)
        self.episode += 1
        self._step = self._success_step = 0
        self._reward = 0.0
        self._count += 1  # no two states have one stamp
        self._show()
        return self._count * self.period_ns

    def command(self, action: NDArray[np.float32], *, sent_ns: int, source: int) -> None:
        self.record.add_command(
            arrived_ns=time.monotonic_ns(),
            sent_ns=sent_ns,
            action=action,
            source=source,
            episode=self.episode,
        )
        self._target = action

    def step(self, due_ns: int) -> None:
        """One control step towards the target."""
        began_ns = time.monotonic_ns()
        try:
            reward = self._sim.step(self._target, substeps=self._substeps)
        except PhysicsDiverged as error:
            sys.exit(f"twin: {error}")
        self._count += 1
        self._step += 1
        # Judged at the rate at which the task's environment judges: more often would be easier.
        if self._step % self._per_tick == 0:
            self._reward = max(self._reward, float(reward))
            if not self._success_step and reward >= self._config.success_reward:
                self._success_step = self._step
        self._show()
        self.record.add_step(
            due_ns=due_ns,
            began_ns=began_ns,
            position=self._sim.agent_pos,
            velocity=self._sim.agent_vel,
            target=self._target,
            reward=reward,
            episode=self.episode,
        )

    def skip(self, steps: int) -> None:
        """Time passed in which the world stood still."""
        self._count += steps

    def _show(self) -> None:
        slot = self._board.joints.begin()
        slot["stamp_ns"] = self._count * self.period_ns
        slot["received_ns"] = time.monotonic_ns()
        slot["episode"], slot["success"] = self.episode, self._success_step > 0
        slot["step"] = (self._success_step or self._step) // self._per_tick
        slot["reward"] = self._reward
        slot["position"] = self._sim.agent_pos
        slot["qpos"] = self._sim.data.qpos
        self._board.joints.publish(slot)


class Host:
    """Serves connections and keeps the twin's time."""

    def __init__(self, twin: Twin, board: Board, board_fd: int, qpos: int, cameras: Child) -> None:
        self._twin, self._board, self._board_fd, self._qpos = twin, board, board_fd, qpos
        self._cameras = cameras
        self.address = f"metronome-twin-{secrets.token_hex(16)}"
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.bind(abstract(self.address))
        self._door.listen()
        self._door.setblocking(False)
        self._peers: dict[socket.socket, int] = {}
        self._watching: set[socket.socket] = set()
        self._entered = 0

    def run(self) -> None:
        """Until stdin ends."""
        twin, period_ns = self._twin, self._twin.period_ns
        due_ns = time.monotonic_ns() + period_ns
        cameras = os.pidfd_open(self._cameras.pid)
        while True:
            wait_s = max(0, due_ns - time.monotonic_ns()) / 1e9
            waiting = [sys.stdin, self._door, cameras, *self._peers]
            for ready in select.select(waiting, [], [], wait_s)[0]:
                if ready is sys.stdin:
                    return
                if ready == cameras:
                    sys.exit("twin: the process that draws its pictures has ended")
                if ready is self._door:
                    self._admit()
                elif isinstance(ready, socket.socket):
                    self._serve(ready)
            behind_ns = time.monotonic_ns() - due_ns
            if behind_ns > MAX_BEHIND_S * 1e9:
                steps = behind_ns // period_ns
                twin.skip(steps)
                due_ns += steps * period_ns
            while time.monotonic_ns() >= due_ns:
                twin.step(due_ns)
                due_ns += period_ns

    def _admit(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            peer, _ = self._door.accept()
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", credentials)[1] != os.getuid():
                peer.close()
                return
            peer.setblocking(False)
            self._peers[peer] = self._entered
            self._entered += 1

    def _serve(self, peer: socket.socket) -> None:
        """What ``peer`` sent so far; a peer that hung up or makes no sense is dropped."""
        try:
            while True:
                message = peer.recv(MAX_MESSAGE)
                if message[:1] == ACTION and len(message) == ACTION_BYTES:
                    sent_ns, action = decode_action(message)
                    if not np.isfinite(action).all():
                        raise ConnectionError("not a number")
                    self._twin.command(action, sent_ns=sent_ns, source=self._peers[peer])
                elif message[:1] == CALL:
                    self._answer(peer, json.loads(message[1:]))
                else:
                    raise ConnectionError("hung up, or no message of ours")
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            self._peers.pop(peer)
            self._watching.discard(peer)
            self._board.head[WATCHING] = len(self._watching)
            peer.close()

    def _answer(self, peer: socket.socket, asked: Mapping[str, Any]) -> None:
        call, fds = asked["call"], []
        answer: dict[str, Any] = {}
        try:
            if call == "hello":
                if asked["role"] in ("sensing", "both"):
                    self._watching.add(peer)
                    self._board.head[WATCHING] = len(self._watching)
                answer, fds = {"qpos": self._qpos, "pid": os.getpid()}, [self._board_fd]
            elif call == "reset":
                answer = {"stamp_ns": self._twin.reset(int(asked["seed"]))}
            elif call == "save_record":
                self._twin.record.save(Path(asked["path"]))
            elif call == "clear_record":
                self._twin.record.clear()
            else:
                answer = {"error": f"unknown call {call!r}"}
        except (EnvError, OSError) as error:
            answer = {"error": str(error)}
        socket.send_fds(peer, [json.dumps(answer).encode()], fds)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args(arguments)
    # A terminal's Ctrl-C reaches the whole group; the arm must outlive it to be stopped properly.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(options.parent)
    config = TwinConfig.from_json(options.config)
    shape: dict[str, Any] = {"joints": len(JOINTS), "cameras": config.camera_hw}
    try:
        sim = AlohaSim(config.task)
        shape["qpos"] = sim.model.nq
        board_fd = Board.create(**shape)
        board = Board(board_fd, writable=True, **shape)
        flags = ["--config", options.config, "--board", str(board_fd)]
        with Child("robots.twin_cameras", flags, pass_fds=[board_fd]) as cameras:
            host = Host(Twin(sim, board, config), board, board_fd, shape["qpos"], cameras)
            say(address=host.address, **cameras.said)
            host.run()
    except (EnvError, ConnectFailed, OSError, ValueError) as error:
        say(error=str(error))


if __name__ == "__main__":
    main()
