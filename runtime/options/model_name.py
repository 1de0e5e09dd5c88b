"""The values of ``-m``: a checkpoint's path, a server's address, or a Python factory."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ModelNameError
from transport.address import format_address, parse_address
from transport.errors import TransportError


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A checkpoint's path or a ``python:package.module:factory``, for ``load_policy``."""

    name: str


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A policy server's address."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_address(self.host, self.port)


def read_model_name(text: str) -> LocalModel | ServerAddress:
    """Read ``text`` as an existing path, else as a factory, else as an address.

    Raises:
        ModelNameError: It is none of them; the message says how it was read and what is valid.
    """
    path = _expanded(text)
    if text and _exists(path):
        return LocalModel(str(path))
    if text.startswith("python:"):
        return LocalModel(text)
    choices = "a path that exists, HOST:PORT, [V6]:PORT or python:PACKAGE.MODULE:FACTORY"
    if "/" in text.removeprefix("tcp://") or ":" not in text:
        raise ModelNameError(
            f"-m {text!r}: read as a path, which does not exist; expected {choices}"
        )
    try:
        host, port = parse_address(text)
    except TransportError as error:
        raise ModelNameError(f"-m {text!r}: {error}; expected {choices}") from error
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ModelNameError(
            f"-m {text!r}: read as host {host!r}, port {port}; the host does not resolve "
            f"({error}); expected {choices}"
        ) from error
    return ServerAddress(host, port)


def _expanded(text: str) -> Path:
    """Expand ``~``, which a shell does not expand in ``--model_name_or_path=~/x``."""
    try:
        return Path(text).expanduser()
    except RuntimeError:  # no such user
        return Path(text)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long to be a path, or in a folder that cannot be read
        return False
