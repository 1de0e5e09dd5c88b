"""The values of ``-m``: a checkpoint's path, a hub's name, a Python factory, or a server's address.

The server may be another system's, which the address then names.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import ModelNameError
from runtime.options import hub
from transport.address import format_address, parse_address
from transport.errors import TransportError


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A checkpoint's path, ``lerobot:PATH`` or ``python:package.module:factory``, for
    ``load_policy``.
    """

    name: str

    def __str__(self) -> str:
        return self.name


SYSTEMS = ("openpi", "groot")
"""The systems whose servers can be a policy."""


@dataclass(frozen=True, slots=True)
class UpstreamModel:
    """The server of another system, which computes our policy.

    Attributes:
        system: One of ``SYSTEMS``.
        host, port: Its address.
    """

    system: str
    host: str
    port: int

    @property
    def name(self) -> str:
        """As in ``-m``, e.g. ``openpi://127.0.0.1:8000``."""
        return f"{self.system}://{format_address(self.host, self.port)}"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A policy server's address."""

    host: str
    port: int

    def __str__(self) -> str:
        return format_address(self.host, self.port)


Model = LocalModel | UpstreamModel | ServerAddress


def read_model_name(text: str, *, fixed_revision: bool = False) -> Model:
    """Read ``text`` as an existing path, else by its prefix, else as an address.

    A name of the Hugging Face hub is downloaded if need be, and is then a path.

    Args:
        text: The value of ``-m``.
        fixed_revision: Refuse names of the hub without a commit hash or a tag.

    Raises:
        ModelNameError: It is none of them; the message says how it was read and what is valid.
    """
    path = _expanded(text)
    if text and _exists(path):
        return LocalModel(str(path))
    prefix, _, rest = text.partition(":")
    if prefix == "lerobot" and rest.startswith(hub.PREFIX):
        folder = hub.snapshot_folder(rest, fixed_revision=fixed_revision)
        return LocalModel(f"lerobot:{folder}")
    if prefix in ("python", "lerobot"):
        return LocalModel(text)
    if text.startswith(hub.PREFIX):
        return LocalModel(str(hub.snapshot_folder(text, fixed_revision=fixed_revision)))
    servers = " or ".join(f"{system}://HOST:PORT" for system in SYSTEMS)
    choices = (
        "a path that exists, HOST:PORT, [V6]:PORT, lerobot:PATH or python:PACKAGE.MODULE:FACTORY, "
        f"or another system's server: {servers}, or {hub.FORM} for the Hugging Face hub"
    )
    system, separator, rest = text.partition("://")
    if separator and system in SYSTEMS:
        return UpstreamModel(system, *_address(text, rest.removesuffix("/"), choices))
    if "/" in text.removeprefix("tcp://") or ":" not in text:
        raise ModelNameError(
            f"-m {text!r}: read as a path, which does not exist; expected {choices}"
        )
    return ServerAddress(*_address(text, text, choices))


def _address(text: str, address: str, choices: str) -> tuple[str, int]:
    """Return host and port of ``address``, a part of ``text``. Raises ``ModelNameError``."""
    try:
        host, port = parse_address(address)
    except TransportError as error:
        raise ModelNameError(f"-m {text!r}: {error}; expected {choices}") from error
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ModelNameError(
            f"-m {text!r}: read as host {host!r}, port {port}; the host does not resolve "
            f"({error}); expected {choices}"
        ) from error
    return host, port


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
