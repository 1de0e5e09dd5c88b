"""The owner process's end of the connections of ``robots.owner_connection``."""

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

from robots.owner_connection import (
    ACTION,
    ACTION_HEAD,
    CALL,
    MAX_MESSAGE,
    abstract_address,
    decode_action,
)
from robots.sensor_memory import SensorMemory

CommandHandler = Callable[[NDArray[np.float32], int, int], None]
"""Called with the action, when it was sent (the sender's monotonic clock, ns) and the number of its
connection."""


class OwnerServer:
    """Accepts connections and handles their messages. Used by one thread, which calls ``select``.

    Args:
        sensor_memory: Its ``camera_clients`` is kept up to date.
        memory_fd: Its file descriptor, sent to every client.
        action_dim: A, the number of values in a command.
        hello: Reply to ``hello``.
        command: Called for every command, (A,) float32 and finite.
        call: Called with a call's name and arguments; returns the reply, ``{"error": …}`` to
            refuse.

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
        command: CommandHandler,
        call: Callable[[str, Mapping[str, Any]], Mapping[str, Any]],
    ) -> None:
        self._sensor_memory, self._memory_fd = sensor_memory, memory_fd
        self._action_bytes = ACTION_HEAD.size + 4 * action_dim
        self._hello, self._command, self._call = {**hello, "pid": os.getpid()}, command, call
        self.address = f"metronome-robot-{secrets.token_hex(16)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(abstract_address(self.address))
        self._listener.listen()
        self._listener.setblocking(False)
        self._peers: dict[socket.socket, int] = {}
        self._roles: dict[socket.socket, str] = {}
        self._accepted = 0

    @property
    def sockets(self) -> list[socket.socket]:
        """The sockets to pass to ``select``."""
        return [self._listener, *self._peers]

    @property
    def roles(self) -> list[str]:
        """The role of every connected client."""
        return list(self._roles.values())

    def serve(self, ready: socket.socket) -> None:
        """Handle what has arrived at ``ready``, a readable one of ``sockets``."""
        if ready is self._listener:
            self._accept()
        elif ready in self._peers:
            self._receive(ready)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionError):
            peer, _ = self._listener.accept()
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if struct.unpack("3i", credentials)[1] != os.getuid():
                peer.close()
                return
            peer.setblocking(False)
            self._peers[peer] = self._accepted
            self._accepted += 1

    def _receive(self, peer: socket.socket) -> None:
        """Handle all messages of ``peer``; drop a peer that closed or sent an invalid message."""
        try:
            while True:
                message = peer.recv(MAX_MESSAGE)
                if message[:1] == ACTION and len(message) == self._action_bytes:
                    sent_ns, action = decode_action(message)
                    if not np.isfinite(action).all():
                        raise ConnectionError("an action that is not finite")
                    self._command(action, sent_ns, self._peers[peer])
                elif message[:1] == CALL:
                    self._reply(peer, json.loads(message[1:]))
                else:
                    raise ConnectionError("closed, or an unknown message")
        except BlockingIOError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            self._peers.pop(peer)
            self._roles.pop(peer, None)
            self._count_camera_clients()
            peer.close()

    def _reply(self, peer: socket.socket, request: Mapping[str, Any]) -> None:
        name, fds = request["call"], []
        if name == "hello":
            self._roles[peer] = request["role"]
            self._count_camera_clients()
            reply: Mapping[str, Any] = self._hello
            fds = [self._memory_fd]
        else:
            reply = self._call(name, request)
        numbered = {**reply, "number": request.get("number")}
        socket.send_fds(peer, [json.dumps(numbered).encode()], fds)

    def _count_camera_clients(self) -> None:
        camera_roles = [role for role in self._roles.values() if role in ("sensing", "both")]
        self._sensor_memory.camera_clients.store(len(camera_roles))
