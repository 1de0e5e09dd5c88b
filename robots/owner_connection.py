"""How a process talks to the one that owns a robot: one AF_UNIX connection of whole messages.

A message is one kind byte and a body. ``ACTION`` has no answer; ``CALL`` carries JSON and is
answered by JSON. The first call is ``hello``, and its answer carries the board's descriptor.
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
"""Kind, and the sender's monotonic clock."""
MAX_MESSAGE = 65_536


def encode_action(action: NDArray[np.float32]) -> bytes:
    return ACTION_HEAD.pack(ACTION, time.monotonic_ns()) + action.astype("<f4").tobytes()


def decode_action(message: bytes) -> tuple[int, NDArray[np.float32]]:
    _, sent_ns = ACTION_HEAD.unpack_from(message)
    return sent_ns, np.frombuffer(message, "<f4", offset=ACTION_HEAD.size)


def abstract(address: str) -> str:
    """``address`` in the namespace of sockets that are no files and cannot be left behind."""
    return "\0" + address


class OwnerConnection:
    """The client's end.

    Args:
        address: Of the owner, as the robot's companion tells it.
        timeout_s: For connecting.
        peer: What the owner is called in errors.

    Attributes:
        hello: What the owner said of itself.
        board_fd: The board's descriptor, owned by this object.

    Raises:
        ConnectFailed: Nobody listens there, or it is another user's.
    """

    def __init__(self, address: str, *, role: str, timeout_s: float, peer: str) -> None:
        self._peer = peer
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._poll = select.poll()
        self.memory_fd = -1
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(abstract(address))
            self._send(CALL + json.dumps({"call": "hello", "role": role}).encode())
            answer, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, 1)
            self.memory_fd = fds[0] if fds else -1
            self.hello = self._answer(answer)
        except OSError as error:
            self.close()
            raise ConnectFailed(
                f"{peer} does not answer at {address!r} within {timeout_s:g} s: {error}"
            ) from error
        except BaseException:
            self.close()
            raise
        self._socket.setblocking(False)
        self._poll.register(self._socket, select.POLLHUP | select.POLLERR)

    def check_alive(self) -> None:
        """Raises ``RobotLost`` if the owner has hung up."""
        if self.memory_fd < 0 or self._poll.poll(0):
            raise RobotLost(f"{self._peer} has ended")

    def send_action(self, action: NDArray[np.float32]) -> None:
        try:
            self._send(encode_action(action))
        except BlockingIOError as error:
            raise RobotLost(f"{self._peer} does not take commands: its queue is full") from error
        except OSError as error:
            raise RobotLost(f"{self._peer} has ended: {error}") from error

    def call(self, name: str, *, timeout_s: float, **arguments: Any) -> Mapping[str, Any]:
        """Ask the owner for something and wait.

        Raises:
            RobotLost: It has ended, or does not answer.
            RobotError: It refuses; carries its reason.
        """
        message = CALL + json.dumps({"call": name, **arguments}).encode()
        try:
            self._socket.settimeout(timeout_s)
            try:
                self._send(message)
                return self._answer(self._socket.recv(MAX_MESSAGE))
            finally:
                self._socket.setblocking(False)
        except OSError as error:
            raise RobotLost(f"{self._peer} does not answer {name!r}: {error}") from error

    def close(self) -> None:
        self._socket.close()
        if self.memory_fd >= 0:
            os.close(self.memory_fd)
            self.memory_fd = -1

    def _send(self, message: bytes) -> None:
        self._socket.send(message)

    def _answer(self, message: bytes) -> Mapping[str, Any]:
        if not message:
            raise RobotLost(f"{self._peer} has ended")
        answer: Mapping[str, Any] = json.loads(message)
        if "error" in answer:
            raise RobotError(f"{self._peer} refuses: {answer['error']}")
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
