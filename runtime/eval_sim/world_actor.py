"""The Ray actor that runs episodes on a node: an ``EpisodeWorker`` in a process of its own."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import RequestTimeout, ServerBusy, ServerLost
from runtime.eval_sim.episode_worker import EpisodeWorker
from runtime.eval_sim.reports import EpisodeSpooled, RunInfo, WorkerFailed
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.evaluation.episode_result import Episode
from runtime.fleet.folder_transfer import FilePart, OutgoingFolder
from runtime.fleet.package_stamp import package_stamp
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.upstream import UpstreamOptions
from transport.errors import PeerGone, TransportTimeout
from transport.zeromq.malloc import keep_freed_memory

OUTPUT, DATASET = "output", "dataset"
"""Folders of a worker; the driver's are ``--output_dir`` and ``--dataset``."""
SERVER_ERRORS = (ServerLost, ServerBusy, RequestTimeout, TransportTimeout, PeerGone)


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """Where an actor runs.

    Attributes:
        node_id: Ray's id of the node.
        address: The node's IP address.
        pid: Process id on the node.
        stamp: Of the sources that it runs; see ``package_stamp``.
    """

    node_id: str
    address: str
    pid: int
    stamp: str


@dataclass(frozen=True, slots=True)
class ActorFailure:
    """A ``WorkerFailed`` of an actor.

    Attributes:
        message, bad_input: As there.
        server_lost: Whether another server could help.
    """

    message: str
    bad_input: bool
    server_lost: bool


@dataclass(frozen=True, slots=True)
class EpisodeAnswer:
    """A finished episode.

    Attributes:
        episode: Its result.
        spool: For the dataset, below the worker's folder; empty without ``--dataset``.
        parts: Of its files, to be fetched before it counts.
    """

    episode: Episode
    spool: str
    parts: tuple[FilePart, ...]


class WorldActor:
    """Runs one episode after another; created by the driver, one for each world.

    Args:
        config: The evaluation. Its folders are replaced by temporary ones.
    """

    def __init__(self, config: EvalSimConfig) -> None:
        keep_freed_memory()
        self._folder = OutgoingFolder()
        root = self._folder.path
        recording = config.recording
        if recording.dataset is not None:
            recording = dataclasses.replace(recording, dataset=root / DATASET)
        self._config = dataclasses.replace(
            config, output_dir=str(root / OUTPUT), recording=recording
        )
        self._worker: EpisodeWorker | None = None

    def place(self) -> ActorPlace:
        """Return where this actor runs."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        return ActorPlace(node_id, ray.util.get_node_ip_address(), os.getpid(), package_stamp())

    def prepare(self, server: str) -> RunInfo | ActorFailure:
        """Create the policy and the world anew.

        Args:
            server: ``HOST:PORT`` of the policy server; empty for the policy that ``-m`` names.
        """
        config = self._config
        if server:
            config = dataclasses.replace(
                config,
                model_name_or_path=server,
                checkpoint=CheckpointOptions(),
                upstream=UpstreamOptions(),
            )
        if self._worker is not None:
            self._worker.close()
            self._worker = None
        try:
            self._worker = EpisodeWorker(config)
        except WorkerFailed as error:
            return _failure(error)
        return self._worker.info

    def run(self, seed: int) -> EpisodeAnswer | ActorFailure:
        """Run the episode of ``seed`` with the policy of the last ``prepare``."""
        if self._worker is None:
            raise RuntimeError("run: got no prepared worker, expected one")
        self._folder.clear()
        spool = ""
        try:
            for report in self._worker.run(seed):
                if isinstance(report, EpisodeSpooled):
                    spool = str(Path(report.folder).relative_to(self._folder.path.resolve()))
                else:
                    episode = report
        except WorkerFailed as error:
            return _failure(error)
        return EpisodeAnswer(episode, spool, self._folder.parts())

    def close(self) -> None:
        """Release the policy and the world, and remove the files."""
        if self._worker is not None:
            self._worker.close()
        self._folder.remove()

    def read(self, part: FilePart) -> bytes:
        """Return a part of a file of the last episode."""
        return self._folder.read(part)


def _failure(error: WorkerFailed) -> ActorFailure:
    server_lost = isinstance(error.__cause__, SERVER_ERRORS)
    return ActorFailure(str(error), error.bad_input, server_lost)
