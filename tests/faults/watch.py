"""What a process holds: memory, descriptors, threads, shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holdings:
    """Of one process, now.

    Attributes:
        rss_bytes: Resident memory that is its own (anonymous), without mapped files.
        segments: Mappings of shared memory, whose names may be long gone.
    """

    rss_bytes: int
    descriptors: int
    threads: int
    segments: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        fields = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        )
        return cls(
            int(fields["RssAnon"].split()[0]) * 1024,
            len(list(Path(f"/proc/{pid}/fd").iterdir())),
            int(fields["Threads"]),
            Path(f"/proc/{pid}/maps").read_text().count("/dev/shm/metronome-"),
        )
