"""Files of the keys that clients authenticate with, in protocols that have a place for them."""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

MAX_BYTES = 65_536
"""Largest key file."""
MIN_CHARS = 16
"""Shortest key."""


class ApiKeys:
    """The keys of a file, one a line; empty lines and lines that begin with ``#`` are ignored.

    Args:
        path: A file that only its owner, this user, can read.

    Raises:
        OSError: The file cannot be read.
        ValueError: Other users can read it, it has no key, or a key is too short.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ValueError(
                    f"{path}: got mode {stat.S_IMODE(status.st_mode):04o} and owner "
                    f"{status.st_uid}, expected a file that only this user can read: mode 0600 and "
                    f"owner {os.geteuid()}"
                )
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{path}: got a longer file, expected at most {MAX_BYTES} bytes")
        lines = [line.strip() for line in content.splitlines()]
        self._keys = [line for line in lines if line and not line.startswith(b"#")]
        if not self._keys:
            raise ValueError(f"{path}: got no key, expected one a line")
        if min(map(len, self._keys)) < MIN_CHARS:
            raise ValueError(
                f"{path}: got a key of {min(map(len, self._keys))} characters, expected at least "
                f"{MIN_CHARS}"
            )

    def only(self) -> str:
        """Return the file's only key. Raises ``ValueError``: it has several, or one not ASCII."""
        if len(self._keys) > 1:
            raise ValueError(f"{self._path}: got {len(self._keys)} keys, expected one")
        if not (self._keys[0].isascii() and self._keys[0].decode("latin-1").isprintable()):
            raise ValueError(f"{self._path}: got a key with other characters, expected ASCII")
        return self._keys[0].decode("ascii")

    def match(self, given: object) -> bool:
        """Return whether ``given`` is one of the keys; every key is compared in constant time."""
        if not isinstance(given, str):
            return False
        data = given.encode("utf-8", "replace")
        return any([hmac.compare_digest(data, key) for key in self._keys])
