"""Proof of being whoever runs a server: a secret in a file that only they can read.

A port on loopback is open to every user of the machine; orders are not. A server leaves the token
beside its port's number, and who can send it back may give orders.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
import tempfile
from pathlib import Path

_BYTES = 32


class AdminToken:
    """A server's, until ``close``."""

    def __init__(self, port: int) -> None:
        """Raises ``OSError``: the folder is somebody else's, or cannot be written."""
        self._secret = secrets.token_hex(_BYTES)
        self.path = _path(port)
        folder = self.path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise OSError(f"{folder}: it must be a folder of this user alone")
        self.path.unlink(missing_ok=True)  # of a server that was killed
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self._secret)

    def matches(self, given: object) -> bool:
        return isinstance(given, str) and hmac.compare_digest(
            given.encode("utf-8", "replace"), self._secret.encode()
        )

    def close(self) -> None:
        """Idempotent. A successor's on the same port stays."""
        if read_token(self.port_of(self.path)) == self._secret:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def port_of(path: Path) -> int:
        return int(path.stem)


def read_token(port: int) -> str:
    """What a server of this user on this machine left; empty without."""
    try:
        return _path(port).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _path(port: int) -> Path:
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(folder) / f"metronome-{os.geteuid()}" / f"{port}.operator"
