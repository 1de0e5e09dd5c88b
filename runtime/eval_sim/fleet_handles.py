"""The actors of a fleet as the driver sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.eval_sim.reports import FleetWorker, RunInfo
from runtime.eval_sim.world_actor import ActorPlace, EpisodeAnswer
from runtime.fleet.folder_transfer import FilePart, IncomingFolder
from runtime.fleet.server_actor import ServerPlace

PLACES = {"transport", "transport_reason", "pictures"}
"""Fields of ``RunInfo`` that depend on the worker's node."""


@dataclass(eq=False, slots=True)
class ServerHandle:
    """A policy server's actor; ``place`` is None until it is ready."""

    actor: Any
    node_id: str
    place: ServerPlace | None = None


@dataclass(eq=False, slots=True)
class WorkerHandle:
    """A world's actor as the driver sees it.

    Attributes:
        actor: Ray's handle.
        place: None until its process runs.
        server: Of its policy; None if it has none.
        info: Of its policy and world; None until they are ready.
        busy: Whether it has a task.
        seed: Of its episode; None if it has none.
        deadline_s: When the episode has to have ended, by the monotonic clock.
        answer: Of the episode while its files are fetched.
        incoming: Those files.
        spool: Its last episode for the dataset, on this machine.
        record: Of it in the result; None until it was ready once.
    """

    actor: Any
    place: ActorPlace | None = None
    server: ServerHandle | None = None
    info: RunInfo | None = None
    busy: bool = True
    seed: int | None = None
    deadline_s: float = float("inf")
    answer: EpisodeAnswer | None = None
    incoming: IncomingFolder | None = None
    parts: list[FilePart] = field(default_factory=list)
    spool: Path | None = None
    record: FleetWorker | None = None


def first_line(error: object) -> str:
    """Describe the end of an actor: Ray's errors have a page of hints after the first line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
