"""Authentication of admin commands: a secret in a file that only the server's user can read.

Every user of the machine can connect to a port on loopback, but only the user that runs the server
may send it admin commands. The server writes a token to a file named after its port; a client that
sends the token may use admin commands.
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
    """The token file of a server, from construction until ``close``."""

    def __init__(self, port: int) -> None:
        """Write a new token for the server on ``port``.

        Raises:
            OSError: The folder belongs to another user, is open to others, or cannot be written.
        """
        self._secret = secrets.token_hex(_BYTES)
        self.path = _path(port)
        folder = self.path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise OSError(f"{folder}: expected a folder that only this user can access")
        self.path.unlink(missing_ok=True)  # left by a server that was killed
        descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self._secret)

    def matches(self, given: object) -> bool:
        """Whether ``given`` is the token; compared in constant time."""
        return isinstance(given, str) and hmac.compare_digest(
            given.encode("utf-8", "replace"), self._secret.encode()
        )

    def close(self) -> None:
        """Remove the file, unless a later server on the port has replaced it. Idempotent."""
        if read_token(self.port_of(self.path)) == self._secret:
            self.path.unlink(missing_ok=True)

    @staticmethod
    def port_of(path: Path) -> int:
        """The port in a token file's name."""
        return int(path.stem)


def read_token(port: int) -> str:
    """The token of this user's server on ``port`` of this machine; empty if there is none."""
    try:
        return _path(port).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""


def _path(port: int) -> Path:
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    return Path(folder) / f"metronome-{os.geteuid()}" / f"{port}.operator"
