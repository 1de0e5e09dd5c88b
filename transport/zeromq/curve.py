"""Encryption and authentication on ZMQ: CURVE (RFC 26), with a list of admitted public keys.

A server with keys rejects every client whose key is not on its list, in ZMQ's own handshake. So no
message of such a client is parsed here. Certificates are ZMQ's own text files.
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
"""Endpoint at which ZMQ requests the authentication of a key (RFC 27, ZAP)."""
DOMAIN = b"metronome"
OPERATORS = "operators"
"""Folder in the list: clients with a key in it may also send admin commands."""
MAX_LISTED = 10_000
_LOG_EVERY_S = 1.0
_log = logging.getLogger(__name__)


class KeyFileError(TransportError):
    """A key file or list cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """The keys of a client, as Z85 text.

    Attributes:
        server: The server's public key.
        public, secret: The client's own.
    """

    server: bytes
    public: bytes
    secret: bytes

    @classmethod
    def load(cls, server_key: str | Path, client_key: str | Path) -> ClientKeys:
        """Load the server's public file and the client's secret one. Raises ``KeyFileError``."""
        return cls(public_key(server_key), *secret_keys(client_key))

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Set the keys on ``socket``, before it connects."""
        socket.curve_serverkey = self.server
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """A server's own keys, and the folder with the public keys of admitted clients.

    The folder is listed again for every connection, and a changed file is read again. So a removed
    key is rejected from the next connection on.
    """

    public: bytes
    secret: bytes
    allowed: Path
    _read: dict[str, tuple[tuple[int, ...], bytes | None]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @classmethod
    def load(cls, server_key: str | Path, allowed: str | Path) -> ServerKeys:
        """Load the server's secret file. Raises ``KeyFileError``."""
        folder = Path(allowed)
        if not folder.is_dir():
            raise KeyFileError(f"{folder}: got no folder, expected one with clients' public keys")
        return cls(*secret_keys(server_key), folder)

    def apply(self, socket: zmq.Socket[bytes]) -> None:
        """Set the keys on ``socket``, before it binds."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        socket.zap_domain = DOMAIN

    def find_name(self, key: bytes) -> str | None:
        """Name of a public key (Z85): ``NAME`` or ``operators/NAME``; None if it is not listed."""
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
        """The public key in a file, or None. The file is parsed again only after it changed."""
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
            _log.warning("ignored a key file: %s", error)
            key = None
        if len(self._read) >= MAX_LISTED:
            self._read.clear()
        self._read[path] = state, key
        return key


def is_operator(user: str) -> bool:
    """Whether ``user`` (``ServerKeys.find_name``) may send admin commands."""
    return user.startswith(f"{OPERATORS}/")


def public_key(path: str | Path) -> bytes:
    """Load the public key of a public or secret file. Raises ``KeyFileError``."""
    return _load(path)[0]


def secret_keys(path: str | Path) -> tuple[bytes, bytes]:
    """Load (public, secret) of a secret file.

    Raises:
        KeyFileError: The file cannot be used, or other users can read it.
    """
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


class CurveAuthenticator:
    """Answers the authentication requests (RFC 27, ZAP) of one ZMQ context.

    Attributes:
        fd: Descriptor of its socket, edge-triggered as all of ZMQ's.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: ServerKeys) -> None:
        self._keys = keys
        self._socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self._socket.bind(ENDPOINT)
        self.fd = int(self._socket.get(zmq.FD))
        self._quiet_until_s = 0.0

    @property
    def waiting(self) -> bool:
        """Whether a request can be answered at once."""
        return bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)

    def answer_request(self) -> None:
        """Answer one request; ``waiting`` says whether there are more."""
        if not self.waiting:
            return
        request = self._socket.recv_multipart(zmq.DONTWAIT)
        try:
            answer = self._reply(request)
        except Exception:
            # This client is rejected; the others are not affected.
            _log.exception("a key could not be checked")
            answer = [*[*request, b"", b""][:2], b"500", b"an error of the server's", b"", b""]
        self._socket.send_multipart(answer)

    def _reply(self, request: list[bytes]) -> list[bytes]:
        version, number, *_ = [*request, b"", b""]
        if len(request) != 7 or request[5] != b"CURVE" or len(request[6]) != 32:
            return [version or b"1.0", number, b"400", b"CURVE only", b"", b""]
        key = z85.encode(request[6])
        user = self._keys.find_name(key)
        address = request[3].decode("utf-8", "replace")
        if user is None:
            self.log_refusal(f"{address} with the key {key.decode()}, which is not listed")
            return [version, number, b"400", b"this key is not listed", b"", b""]
        _log.debug("admitted %s from %s", user, address)
        return [version, number, b"200", b"", user.encode(), b""]

    def log_refusal(self, peer: str) -> None:
        """Log a refused connection, at most once per second."""
        now_s = time.monotonic()
        if now_s >= self._quiet_until_s:
            self._quiet_until_s = now_s + _LOG_EVERY_S
            _log.warning("refused a connection of %s", peer)
