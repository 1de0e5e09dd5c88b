"""Keeps compiled engines from one start to the next.

A compiled engine holds code and weights in its compiler's format, and the compiler's parser trusts
it. So a file is used only if no other user can write it and its hash matches its content; anything
else is compiled again. A failing cache never stops a server from starting.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MAGIC = b"metronome engine 1\n"
DIGEST_BYTES, MAX_HEAD_BYTES = 32, 4096
CAPACITY_BYTES = 2 << 30
"""Total size of all files; the least recently used ones are deleted first."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A compiled engine.

    Attributes:
        blob: The compiler's output.
        error: Relative error against float32 torch, measured when the engine was compiled.
    """

    blob: bytes
    error: float


def default_folder() -> Path:
    """Return ``$METRONOME_CACHE``, else ``metronome`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    chosen = os.environ.get("METRONOME_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "metronome"


class BlobCache:
    """Files in ``folder``, one for each key. A folder that cannot be used is an empty cache.

    Args:
        folder: ``default_folder()`` where None.
        capacity_bytes: Total size of all files.
    """

    def __init__(self, folder: Path | None = None, *, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self._folder = folder
        self._capacity_bytes = capacity_bytes

    def read(self, key: str) -> Stored | None:
        """Return what ``write`` stored, or None.

        None means that the file is missing, that another user could have written it, or that its
        content does not match its hash.
        """
        try:
            path = self._path(key)
            if not path.exists():
                return None
            with path.open("rb", buffering=0) as file:
                _check_owner(os.fstat(file.fileno()), path)
                stored = _decode(file)
            os.utime(path)
        except (OSError, ValueError, RuntimeError) as error:
            logger.warning("engine cache: %s; compiling again", error)
            return None
        return stored

    def write(self, key: str, stored: Stored) -> bool:
        """Store atomically; return whether that worked. A reader gets the whole file or none."""
        try:
            path = self._path(key)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_owner(path.parent.stat(), path.parent)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                try:
                    for part in _encode(stored):
                        file.write(part)
                    file.flush()
                    Path(file.name).replace(path)
                except BaseException:
                    Path(file.name).unlink(missing_ok=True)
                    raise
            self._evict(path)
        except (OSError, ValueError, RuntimeError) as error:
            logger.info("engine cache: not stored: %s", error)
            return False
        return True

    def remove(self, key: str) -> None:
        """Delete an entry that turned out to be unusable."""
        with contextlib.suppress(OSError, RuntimeError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        # Path.expanduser raises RuntimeError where there is no home folder.
        return (self._folder or default_folder()) / f"{key}.engine"

    def _evict(self, kept: Path) -> None:
        files = {path: path.stat() for path in kept.parent.glob("*.engine")}
        used = sum(status.st_size for status in files.values())
        for path, status in sorted(files.items(), key=lambda item: item[1].st_mtime_ns):
            if used <= self._capacity_bytes:
                break
            if path != kept:
                path.unlink(missing_ok=True)
                used -= status.st_size


def _encode(stored: Stored) -> list[bytes]:
    body = json.dumps({"error": stored.error}).encode() + b"\n"
    digest = hashlib.sha256(body)
    digest.update(stored.blob)
    return [MAGIC, digest.digest(), body, stored.blob]


def _decode(file: io.FileIO) -> Stored:
    """Read the blob once and copy it never.

    A copy would hold the GIL while a server may be serving requests.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError("a file of another format")
    digest, head = file.read(DIGEST_BYTES), file.readline(MAX_HEAD_BYTES)
    blob = file.read()
    found = hashlib.sha256(head)
    found.update(blob)
    if found.digest() != digest:
        raise ValueError("a file that is truncated or was changed")
    return Stored(blob, float(json.loads(head)["error"]))


def _check_owner(status: os.stat_result, path: Path) -> None:
    """Raise ``ValueError`` unless only this user can write ``path``: its code will be executed."""
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{path} can be written by another user")
