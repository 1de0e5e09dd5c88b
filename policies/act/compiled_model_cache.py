"""Compiled engines kept from one start to the next.

A compiled engine is code and weights in its compiler's own format, and its parser trusts it. So a
file counts only if it is ours alone and its content is what was written, by its hash; anything
else is compiled again. Nothing here ever stops a server from starting.
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
"""Of all files together; the longest unused go first."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A compiled engine.

    Attributes:
        blob: The compiler's.
        error: Its relative error against float32 torch, measured when it was compiled.
    """

    blob: bytes
    error: float


def default_folder() -> Path:
    """``$METRONOME_CACHE``, else ``metronome`` in ``$XDG_CACHE_HOME`` or in ``~/.cache``."""
    chosen = os.environ.get("METRONOME_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "metronome"


class BlobCache:
    """Files in ``folder``, one for each key; a folder that cannot be used is an empty cache."""

    def __init__(self, folder: Path | None = None, *, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self._folder = folder
        self._capacity_bytes = capacity_bytes

    def read(self, key: str) -> Stored | None:
        """What ``write`` stored, or None: not there, not ours, or not what was written."""
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
        """Store, in one step: whoever reads sees all of it or nothing. Whether it worked."""
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
        """Forget one that turned out to be useless."""
        with contextlib.suppress(OSError, RuntimeError):
            self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        # Path.expanduser raises RuntimeError where there is no home.
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
    """The blob is read where it stays, and never copied: copying would keep the GIL, and a server
    may be answering robots meanwhile."""
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
    """Code is loaded from there: only what nobody else can write counts."""
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{path} is not ours alone to write")
