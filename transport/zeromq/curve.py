"""Encryption and admission on ZMQ: CURVE (RFC 26), with the public keys that are let in.

A server with keys speaks to nobody without: what is not on its list does not get past ZMQ's own
handshake, so nothing of it is ever parsed here. Certificates are ZMQ's own text files.
"""

from __future__ import annotations

import logging
import os
import stat
import struct
import time
from dataclasses import dataclass, field
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

    The folder is looked at anew for every connection, and a file read again where it has changed:
    who is removed stays out from the next one on.
    """

    public: bytes
    secret: bytes
    allowed: Path
    _read: dict[str, tuple[tuple[int, ...], bytes | None]] = field(
        default_factory=dict, compare=False, repr=False
    )

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
        for path in self._files():
            if self._key_in(path) == key:
                name = Path(path).relative_to(self.allowed).with_suffix("").as_posix()
                return name.encode("utf-8", "replace").decode()
        return None

    def _files(self) -> list[str]:
        found = [
            os.path.join(folder, name)  # noqa: PTH118  for thousands of files, in the serving thread
            for folder, _, names in os.walk(self.allowed)
            for name in names
            if name.endswith(".key")
        ]
        return sorted(found)[:MAX_LISTED]

    def _key_in(self, path: str) -> bytes | None:
        """The public key in that file, None where it has none; parsed once for each state of it."""
        try:
            now = os.stat(path)  # noqa: PTH116
        except OSError:
            return None
        state = now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
        known = self._read.get(path)
        if known is not None and known[0] == state:
            return known[1]
        try:
            key: bytes | None = public_key(path)
        except KeyFileError as error:
            _log.warning("passed over: %s", error)
            key = None
        if len(self._read) >= MAX_LISTED:
            self._read.clear()
        self._read[path] = state, key
        return key


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
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise KeyFileError(
            f"{path}: got {error}, expected a key file of runtime.tools.keys"
        ) from error
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
        """One question; ``waiting`` says whether there are more."""
        if not self.waiting:
            return
        question = self._socket.recv_multipart(zmq.DONTWAIT)
        try:
            answer = self._reply(question)
        except Exception:
            # Not let in, and nobody else's trouble.
            _log.exception("a key could not be looked up")
            answer = [*[*question, b"", b""][:2], b"500", b"an error of the server's", b"", b""]
        self._socket.send_multipart(answer)

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
