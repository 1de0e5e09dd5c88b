"""What an evaluation reports while it runs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import RuntimeFault
from runtime.evaluation.episode_result import Episode, ErroredEpisode


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What an evaluation runs with; known once the policy and the world are created.

    Attributes:
        contract_json: The policy's contract, at the rate used.
        execution: The fields of ``Execution``: strategy and its numbers.
        assumed: One line per value that neither checkpoint, user nor world defines.
        policy_info: The fields of ``PolicyInfo``.
        transport, transport_reason: How the policy is reached, and why so.
        pictures: How images are sent to the policy.
        deterministic: Whether the result depends on the seeds alone.
        world: ``World.info()``.
        dataset_features: ``DatasetFeatures`` of the episodes, as JSON; empty without ``--dataset``.
    """

    contract_json: str
    execution: dict[str, Any]
    assumed: tuple[str, ...]
    policy_info: dict[str, Any]
    transport: str
    transport_reason: str
    pictures: str
    deterministic: bool
    world: dict[str, Any]
    dataset_features: str

    def require(self, expected: RunInfo, of: str, *, but: Collection[str]) -> None:
        """Require the policy and the world of ``expected``.

        Args:
            expected: What the first worker runs with.
            of: The worker that runs with this, for the message.
            but: Fields that may differ between workers.

        Raises:
            WorkerFailed: A field differs.
        """
        own, first = dataclasses.asdict(self), dataclasses.asdict(expected)
        for name in first.keys() - but:
            if own[name] != first[name]:
                raise WorkerFailed(
                    f"{name} of {of}: got {own[name]!r:.200}, expected that of the first, "
                    f"{first[name]!r:.200}",
                    bad_input=False,
                )


@dataclass(frozen=True, slots=True)
class EpisodeSpooled:
    """An episode for the dataset.

    Attributes:
        folder: Of the ``SpooledEpisode``, which is complete.
    """

    folder: Path


@dataclass(slots=True)
class FleetWorker:
    """A worker of a fleet, as the result records it; changes while the evaluation runs.

    Attributes:
        node: IP address.
        pid: Process id on the node.
        ready_s: When it was ready for its first episode, in seconds from the first actor's start.
        server: ``HOST:PORT`` of its last policy server of the fleet; empty without ``--servers``.
        transport, transport_reason: As of ``RunInfo``, with that server.
        episodes: How many it finished.
    """

    node: str
    pid: int
    ready_s: float
    server: str = ""
    transport: str = ""
    transport_reason: str = ""
    episodes: int = 0


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """The workers and the servers of a fleet, after one was ready or lost.

    Attributes:
        event: What happened, in words; empty if a worker is ready.
        ready, wanted: Workers that have a policy and a world, and how many there should be.
        servers: Policy servers that are ready.
        workers_lost, servers_lost: Since the start.
        workers: All that were ever ready.
    """

    event: str
    ready: int
    wanted: int
    servers: int
    workers_lost: int
    servers_lost: int
    workers: list[FleetWorker]


EpisodeReport = Episode | EpisodeSpooled
"""What a worker reports of an episode."""
Report = RunInfo | EpisodeReport | ErroredEpisode | FleetStatus


class WorkerFailed(RuntimeFault):
    """The evaluation cannot continue.

    Attributes:
        bad_input: Whether the user's input is invalid; otherwise a server, a process or the
            policy's device was lost.
    """

    def __init__(self, message: str, *, bad_input: bool) -> None:
        super().__init__(message)
        self.bad_input = bad_input

    def __reduce__(self) -> tuple[Callable[[], WorkerFailed], tuple[()]]:
        """Survive the way between processes, which pass on positional arguments only."""
        return functools.partial(WorkerFailed, str(self), bad_input=self.bad_input), ()
