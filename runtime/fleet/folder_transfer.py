"""Brings files from the nodes to the driver's folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CHUNK_BYTES = 16 * 2**20
_PREFIX = "metronome-fleet-"


@dataclass(frozen=True, slots=True)
class FilePart:
    """A part of a file to be asked for.

    Attributes:
        name: The file's path below the worker's folder.
        offset: In bytes.
    """

    name: str
    offset: int


class OutgoingFolder:
    """A temporary folder of a worker. Those of processes that were killed are removed first."""

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        for left in root.glob(f"{_PREFIX}*-*"):
            pid = left.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdecimal() and not Path("/proc", pid).exists():
                shutil.rmtree(left, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))

    def parts(self) -> tuple[FilePart, ...]:
        """Return the parts of all files; an empty file has one."""
        return tuple(
            FilePart(str(path.relative_to(self.path)), offset)
            for path in sorted(self.path.rglob("*"))
            if path.is_file()
            for offset in range(0, max(1, path.stat().st_size), CHUNK_BYTES)
        )

    def read(self, part: FilePart) -> bytes:
        """Return the bytes of ``part``."""
        with (self.path / part.name).open("rb") as file:
            file.seek(part.offset)
            return file.read(CHUNK_BYTES)

    def remove(self) -> None:
        """Remove the folder. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)

    def clear(self) -> None:
        """Remove all files."""
        for path in self.path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class IncomingFolder:
    """Parts of files, collected in a folder until all are there.

    Args:
        beside: The files lie below this folder until they are moved, on the same file system.

    Raises:
        OSError: The folder cannot be created.
    """

    def __init__(self, beside: Path) -> None:
        beside.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix=".fleet-", dir=beside))

    def write(self, part: FilePart, content: bytes) -> None:
        """Append a part; a file's parts arrive in order. Raises ``OSError``."""
        path = self.path / part.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(content)

    def files(self) -> Iterator[Path]:
        """Yield the path of each file below this folder."""
        for path in sorted(self.path.rglob("*")):
            if path.is_file():
                yield path.relative_to(self.path)

    def remove(self) -> None:
        """Remove the folder with what is in it. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
