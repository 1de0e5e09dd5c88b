"""Encryption and admission on ZMQ: CURVE (RFC 26), with the public keys that are let in.

A server with keys speaks to nobody without: what is not on its list does not get past ZMQ's own
handshake, so nothing of it is ever parsed here. Certificates are ZMQ's own text files.
"""

from __future__ import annotations

import logging
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq import auth
from zmq.utils import z85

from transport.errors import TransportError

ENDPOINT = "inproc://zeromq.zap.01"
"""Where ZMQ asks whether a key may come in (RFC 27)."""
DOMAIN = b"metronome"
OPERATORS = "operators"
"""A folder in the list: whose keys are here may also give orders."""
MAX_LISTED = 10_000
_LOG_EVERY_S = 1.0
_log = logging.getLogger(__name__)


class KeyFileError(TransportError):
    """A key file or list that cannot be used; says which and why."""


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """Whom to trust, and who one is; Z85 text.

    Attributes:
        server: The server's public key.
        public, secret: The client's own.
    """

    server: bytes
    public: bytes
    secret: bytes

    @classmethod
    def load(cls, server_key: str | Path, client_key: str | Path) -> ClientKeys:
        """From the server's public file and the client's secret one. Raises ``KeyFileError``."""
        return cls(public_key(server_key), *secret_keys(client_key))

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Before it connects."""
        socket.curve_serverkey = self.server
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """A server's own, and the folder with the public keys that it lets in.

    The folder is read anew for every connection: who is removed stays out from the next one on.
    """

    public: bytes
    secret: bytes
    allowed: Path

    @classmethod
    def load(cls, server_key: str | Path, allowed: str | Path) -> ServerKeys:
        """Raises ``KeyFileError``."""
        folder = Path(allowed)
        if not folder.is_dir():
            raise KeyFileError(f"{folder}: got no folder, expected one with clients' public keys")
        return cls(*secret_keys(server_key), folder)

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Before it binds."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        socket.zap_domain = DOMAIN

    def name_of(self, key: bytes) -> str | None:
        """Whose public key (Z85) that is: ``NAME`` or ``operators/NAME``; None if not listed."""
        for path in sorted(self.allowed.rglob("*.key"))[:MAX_LISTED]:
            try:
                if public_key(path) == key:
                    return path.relative_to(self.allowed).with_suffix("").as_posix()
            except KeyFileError as error:
                _log.warning("passed over: %s", error)
        return None


def is_operator(user: str) -> bool:
    """Whether ``user`` (``ServerKeys.name_of``) may give orders."""
    return user.startswith(f"{OPERATORS}/")


def public_key(path: str | Path) -> bytes:
    """Of a public or secret file. Raises ``KeyFileError``."""
    return _load(path)[0]


def secret_keys(path: str | Path) -> tuple[bytes, bytes]:
    """(public, secret) of a secret file that nobody else can read. Raises ``KeyFileError``."""
    public, secret = _load(path)
    if secret is None:
        raise KeyFileError(f"{path}: got a public key, expected a file with the secret one")
    mode = stat.S_IMODE(Path(path).stat().st_mode)
    if mode & 0o077:
        raise KeyFileError(f"{path}: others can read it (mode {mode:o}); chmod 600 {path}")
    return public, secret


def _load(path: str | Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = auth.load_certificate(path)
        for key in (public, secret or public):
            if len(z85.decode(key)) != 32:
                raise ValueError("a key of another length")
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path}: got {error}, expected a key file of runtime.keys") from error
    return public, secret


class Gatekeeper:
    """Answers ZMQ's question, for one context, whether a key may come in.

    Attributes:
        fd: Edge-triggered, as ZMQ's are.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> None:
        self._keys = keys
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._socket.bind(ENDPOINT)
        self.fd = int(self._socket.get(zmq.FD))
        self._quiet_until_s = 0.0

    @property
    def waiting(self) -> bool:
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def answer(self) -> None:
        """Every question there is."""
        while self.waiting:
            question = self._socket.recv_multipart(zmq.DONTWAIT)
            self._socket.send_multipart(self._reply(question))

    def _reply(self, question: list[bytes]) -> list[bytes]:
        version, number, *_ = [*question, b"", b""]
        if len(question) != 7 or question[5] != b"CURVE" or len(question[6]) != 32:
            return [version or b"1.0", number, b"400", b"CURVE only", b"", b""]
        key = z85.encode(question[6])
        user = self._keys.name_of(key)
        address = question[3].decode("utf-8", "replace")
        if user is None:
            self.refused(f"{address} with the key {key.decode()}, which is not listed")
            return [version, number, b"400", b"this key is not listed", b"", b""]
        _log.debug("%s from %s may come in", user, address)
        return [version, number, b"200", b"", user.encode(), b""]

    def refused(self, who: str) -> None:
        """Log it, but not for everyone in a flood."""
        now_s = time.monotonic()
        if now_s >= self._quiet_until_s:
            self._quiet_until_s = now_s + _LOG_EVERY_S
            _log.warning("refused a connection of %s", who)
