"""A process's connection to the process that owns a robot: an AF_UNIX ``SOCK_SEQPACKET`` socket.

A message is one byte for its kind and a payload. ``ACTION`` has no reply; ``CALL`` carries JSON and
is answered by JSON with the call's ``number``, so that a reply that came too late is not taken for
the next call's. The first call is ``hello``; its reply carries the file descriptor of the
``SensorMemory``.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from robots.errors import ConnectFailed, RobotError, RobotLost

ACTION, CALL = b"A", b"C"
ACTION_HEAD = struct.Struct("<cq")
"""Kind of the message, and the sender's monotonic clock, ns."""
MAX_MESSAGE = 65_536
"""Bytes."""


def encode_action(action: NDArray[np.float32]) -> bytes:
    """The ``ACTION`` message of ``action``, (A,) float32, stamped with the present time."""
    return ACTION_HEAD.pack(ACTION, time.monotonic_ns()) + action.astype("<f4").tobytes()


def decode_action(message: bytes) -> tuple[int, NDArray[np.float32]]:
    """When an ``ACTION`` message was sent, and its action: a read-only view, (A,) float32."""
    _, sent_ns = ACTION_HEAD.unpack_from(message)
    return sent_ns, np.frombuffer(message, "<f4", offset=ACTION_HEAD.size)


def abstract_address(address: str) -> str:
    """``address`` in Linux's abstract_address socket namespace, which leaves no file behind."""
    return "\0" + address


class OwnerConnection:
    """The client's end of the connection.

    Args:
        address: Of the owner process, which its ``ready`` event reports.
        role: The ``Role`` in which the client connects.
        timeout_s: For connecting.
        peer: The owner's name in errors.

    Attributes:
        hello: The owner's reply to ``hello``.
        memory_fd: File descriptor of the ``SensorMemory``, owned by this object.

    Raises:
        ConnectFailed, RobotLost: Nothing listens at ``address``, or it belongs to another user.
    """

    def __init__(self, address: str, *, role: str, timeout_s: float, peer: str) -> None:
        self._peer = peer
        self._calls = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._poll = select.poll()
        self.memory_fd = -1
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(abstract_address(address))
            self._send(CALL + json.dumps({"call": "hello", "role": role}).encode())
            reply, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, 1)
            self.memory_fd = fds[0] if fds else -1
            self.hello = self._accepted(self._decode(reply))
        except OSError as error:
            self.close()
            raise ConnectFailed(
                f"{peer} does not answer at {address!r} within {timeout_s:g} s ({error}): is it "
                "running, as this user, and is the address right?"
            ) from error
        except BaseException:
            self.close()
            raise
        self._socket.setblocking(False)
        self._poll.register(self._socket, select.POLLHUP | select.POLLERR)

    def check_alive(self) -> None:
        """Raises ``RobotLost`` if the owner has closed the connection."""
        if self.memory_fd < 0 or self._poll.poll(0):
            raise self._ended()

    def send_action(self, action: NDArray[np.float32]) -> None:
        """Send a command, (A,) float32, without waiting.

        Raises:
            RobotLost: The owner has ended, or its queue is full.
        """
        try:
            self._send(encode_action(action))
        except BlockingIOError as error:
            raise RobotLost(
                f"{self._peer} does not take commands: its queue is full; is it stopped, or the "
                "machine overloaded?"
            ) from error
        except OSError as error:
            raise self._ended(f" ({error})") from error

    def call(self, name: str, *, timeout_s: float, **arguments: Any) -> Mapping[str, Any]:
        """Call ``name`` in the owner process and wait for the reply.

        Raises:
            RobotLost: The owner has ended, or does not reply within ``timeout_s``.
            RobotError: The owner refuses; carries its reason.
        """
        self._calls += 1
        message = CALL + json.dumps({"call": name, "number": self._calls, **arguments}).encode()
        deadline_s = time.monotonic() + timeout_s
        try:
            self._socket.settimeout(timeout_s)
            try:
                self._send(message)
                while True:
                    reply = self._decode(self._socket.recv(MAX_MESSAGE))
                    if reply.get("number") == self._calls:
                        return self._accepted(reply)
                    # Of an earlier call, which was given up.
                    self._socket.settimeout(max(0.0, deadline_s - time.monotonic()))
            finally:
                self._socket.setblocking(False)
        except OSError as error:
            raise RobotLost(
                f"{self._peer} does not answer {name!r} within {timeout_s:g} s ({error}): is it "
                "still running?"
            ) from error

    def close(self) -> None:
        """Close the socket and the memory's file descriptor. Idempotent."""
        self._socket.close()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    def _send(self, message: bytes) -> None:
        self._socket.send(message)

    def _ended(self, reason: str = "") -> RobotLost:
        return RobotLost(
            f"{self._peer} has ended{reason}, expected it to run until the robot is disconnected; "
            "start it again"
        )

    def _decode(self, reply: bytes) -> Mapping[str, Any]:
        if not reply:
            raise self._ended()
        content: Mapping[str, Any] = json.loads(reply)
        return content

    def _accepted(self, reply: Mapping[str, Any]) -> Mapping[str, Any]:
        if "error" in reply:
            raise RobotError(f"{self._peer} refuses: {reply['error']}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
