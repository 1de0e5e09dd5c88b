"""Where the processes that use a robot connect to the one that owns its devices."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robots.owner_connection import ACTION, ACTION_HEAD, CALL, MAX_MESSAGE, abstract, decode_action
from robots.sensor_memory import SensorMemory

Command = Callable[[NDArray[np.float32], int, int], None]
"""Called with the action, the sender's monotonic clock, and which connection it came through."""


class OwnerServer:
    """The listening end of ``robots.owner_connection``. Belongs to one thread, which selects.

    Args:
        board: Handed out to everyone who connects; it says how many look at pictures.
        board_fd: Its descriptor.
        action_dim: A.
        hello: What is told to everyone who connects.
        command: Called for every command; (A,) float32, finite.
        call: Called with a name and its arguments; gives the answer, ``{"error": …}`` to refuse.

    Attributes:
        address: Where it listens.
    """

    def __init__(
        self,
        sensor_memory: SensorMemory,
        memory_fd: int,
        *,
        action_dim: int,
        hello: Mapping[str, Any],
        command: Command,
        call: Callable[[str, Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        self._sensor_memory, self._board_fd = sensor_memory, memory_fd
        self._action_bytes = ACTION_HEAD.size + 4 * action_dim
        self._hello, self._command, self._call = {**hello, "pid": os.getpid()}, command, call
        self.address = f"metronome-robot-{secrets.token_hex(16)}"
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._door.bind(abstract(self.address))
        self._door.listen()
        self._door.setblocking(False)
        self._peers: dict[socket.socket, int] = {}
        self._roles: dict[socket.socket, str] = {}
        self._entered = 0

    @property
    def sockets(self) -> list[socket.socket]:
        """To select on."""
        return [self._door, *self._peers]

    @property
    def roles(self) -> list[str]:
        """Of those who are connected."""
        return list(self._roles.values())

    def serve(self, ready: socket.socket) -> None:
        """Do what is waiting at one of ``sockets``, which is readable."""
        if ready is self._door:
            self._admit()
        elif ready in self._peers:
            self._hear(ready)

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

    def _hear(self, peer: socket.socket) -> None:
        """What ``peer`` sent so far; a peer that hung up or makes no sense is dropped."""
        try:
            while True:
                message = peer.recv(MAX_MESSAGE)
                if message[:1] == ACTION and len(message) == self._action_bytes:
                    sent_ns, action = decode_action(message)
                    if not np.isfinite(action).all():
                        raise ConnectionError("not a number")
                    self._command(action, sent_ns, self._peers[peer])
                elif message[:1] == CALL:
                    self._answer(peer, json.loads(message[1:]))
                else:
                    raise ConnectionError("hung up, or no message of ours")
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            self._peers.pop(peer)
            self._roles.pop(peer, None)
            self._count_watchers()
            peer.close()

    def _answer(self, peer: socket.socket, asked: Mapping[str, Any]) -> None:
        name, fds = asked["call"], []
        if name == "hello":
            self._roles[peer] = asked["role"]
            self._count_watchers()
            answer: Mapping[str, Any] = self._hello
            fds = [self._board_fd]
        else:
            answer = self._call(name, asked)
        socket.send_fds(peer, [json.dumps(answer).encode()], fds)

    def _count_watchers(self) -> None:
        watching = [role for role in self._roles.values() if role in ("sensing", "both")]
        self._sensor_memory.watchers.store(len(watching))
