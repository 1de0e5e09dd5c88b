"""``metronome eval-sim``, also ``eval_sim.py``: evaluate a policy in simulation.

Writes ``<output_dir>/<env>/<task>.json``, with videos and raw samples beside it, from a journal
that has each episode as soon as it is finished. Exit status: 0 done, 1 the server or the policy's
device was lost or an episode has no outcome (finished episodes are kept), 2 bad input, 130
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from envs.errors import EnvError
from envs.factory import load_env_config
from policies.command_line import CommandLine
from policies.execution import Execution
from policies.flag_builder import add_flags, flag_value, from_flags
from policies.standard_streams import run_command
from policies.types import PolicyContract, PolicyInfo
from policies.yaml_config import InvalidConfig, as_plain
from runtime.control import strategy_selection
from runtime.datasets.dataset_recorder import DatasetRecorder
from runtime.datasets.errors import RecorderFailed
from runtime.datasets.features import DatasetFeatures
from runtime.errors import RuntimeFault
from runtime.eval_sim.latency_dial import NO_DELAY
from runtime.eval_sim.reports import EpisodeSpooled, FleetStatus, Report, RunInfo, WorkerFailed
from runtime.eval_sim.resumed_run import (
    EarlierRun,
    check_dataset,
    check_same_run,
    describe_run,
    read_earlier,
)
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.runner import run
from runtime.evaluation.episode_journal import EpisodeJournal
from runtime.evaluation.episode_result import Episode, ErroredEpisode
from runtime.evaluation.plots import write_timing_plot
from runtime.evaluation.results import (
    format_report,
    policy_record,
    remove_unfinished,
    summarize,
    versions,
    write_result,
)
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.connection import check_flags
from runtime.options.model_name import ServerAddress
from runtime.options.overrides import read_overrides
from runtime.options.upstream import check_upstream
from runtime.trace import recorder as trace
from runtime.trace.buffer import TraceError
from transport.zeromq.malloc import keep_freed_memory

BAD_INPUT, LOST, INTERRUPTED = 2, 1, 130
SAVED_EVERY = 0.05
"""Share of the episodes after which the result file is computed anew while the evaluation runs, so
that this takes time proportional to their number. The journal has every episode at once."""


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one argument per flag of ``EvalSimConfig``."""
    cli = CommandLine(
        prog="metronome eval-sim",
        description="Evaluate a policy in simulation.",
        epilog="--env.KEY VALUE overrides KEY of the environment's configuration.",
    )
    add_flags(cli, EvalSimConfig)
    return cli


def read_config(argv: Sequence[str] | None) -> EvalSimConfig:
    """Return the configuration that the command line describes.

    Args:
        argv: The arguments; None for ``sys.argv``.

    Raises:
        InvalidConfig, RuntimeFault, EnvError, ValueError: A flag or an override is invalid.
    """
    args, rest = parser().parse_known_args(argv)
    overrides = read_overrides(rest, "env.", "metronome eval-sim")
    env = load_env_config(flag_value(EvalSimConfig, "env_name", args), overrides)
    config = from_flags(EvalSimConfig, args, env=env)
    check_flags(config.connection)
    # Not as overrides: a dot in a camera's name does not separate keys.
    env = dataclasses.replace(env, camera_map={**env.camera_map, **config.camera_map})
    return dataclasses.replace(config, env=env)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation. Returns the exit status."""
    try:
        config = read_config(argv)
        model = config.model
        check_upstream(model, config.upstream, config.checkpoint)
        config.live_view.check()
        _must_be_writable(config.path.parent)
    except (InvalidConfig, EnvError, RuntimeFault, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    logging.basicConfig(level=config.log_level, format="%(levelname)s %(name)s: %(message)s")
    if isinstance(model, ServerAddress) and config.checkpoint != CheckpointOptions():
        print(
            f"note: {', '.join(config.checkpoint.given_flags())}: ignored; they are for the server "
            f"at {model}, which loads the checkpoint",
            file=sys.stderr,
        )
    try:
        with trace.tracing(config.trace, "eval_sim"):
            status = _evaluate(config)
    except TraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if config.trace is not None:
        print(f"trace        {config.trace}")
    return status


def _evaluate(config: EvalSimConfig) -> int:
    try:
        with EpisodeJournal(config.journal_path) as journal:
            remove_unfinished(config.path)
            return _evaluate_into(journal, config, read_earlier(config, journal))
    except RuntimeFault as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except OSError as error:
        print(f"error: {config.journal_path} cannot be written: {error}", file=sys.stderr)
        return BAD_INPUT


@dataclasses.dataclass(slots=True)
class _Progress:
    """What an evaluation has so far.

    Attributes:
        run_info: Of the policy and the world; None before they are created.
        episodes: The finished ones, those of the earlier run first.
        errored: Those without an outcome.
        fleet: Of ``--ray``, as it is now.
    """

    episodes: list[Episode]
    errored: list[ErroredEpisode] = dataclasses.field(default_factory=list)
    run_info: RunInfo | None = None
    fleet: FleetStatus | None = None


def _evaluate_into(
    journal: EpisodeJournal, config: EvalSimConfig, earlier: EarlierRun | None
) -> int:
    progress = _Progress(list(earlier.episodes) if earlier is not None else [])
    failure, status = "", 0
    try:
        _run_remaining(journal, config, earlier, progress)
    except WorkerFailed as error:
        failure, status = str(error), BAD_INPUT if error.bad_input else LOST
    except RecorderFailed as error:
        failure, status = str(error), LOST
    except RuntimeFault as error:
        failure, status = str(error), BAD_INPUT
    except OSError as error:
        failure, status = f"the result cannot be written: {error}", LOST
    except KeyboardInterrupt:
        failure, status = "interrupted", INTERRUPTED
    if progress.run_info is not None and (progress.episodes or progress.errored):
        try:
            _conclude(config, progress, failure)
        except OSError as error:
            failure, status = failure or f"the result cannot be written: {error}", status or LOST
        except KeyboardInterrupt:
            failure, status = "interrupted", INTERRUPTED
    if failure:
        kept = f"; {len(progress.episodes)} of {config.num_rollout} episodes were finished and kept"
        print(f"error: {failure}{kept if status != BAD_INPUT else ''}", file=sys.stderr)
    elif progress.errored:
        status = LOST
        print(
            f"error: {len(progress.errored)} of {config.num_rollout} episodes have no outcome, and "
            "are in no success rate; --resume runs them again",
            file=sys.stderr,
        )
    return status


def _run_remaining(
    journal: EpisodeJournal,
    config: EvalSimConfig,
    earlier: EarlierRun | None,
    progress: _Progress,
) -> None:
    """Run the episodes that the earlier run did not finish; add them to ``progress``.

    Raises as ``_recorded`` and ``run``.
    """
    episodes, saved = progress.episodes, 0
    finished = {episode.seed for episode in episodes}
    reports = run(config, [seed for seed in config.seeds if seed not in finished])
    with tqdm(
        total=config.num_rollout, initial=len(episodes), unit="episode", desc=config.env.task
    ) as bar:
        for item in _recorded(journal, config, earlier, reports):
            if isinstance(item, RunInfo):
                progress.run_info = item
                for line in _summary_lines(config, item):
                    bar.write(line, file=sys.stderr)
                continue
            if isinstance(item, FleetStatus):
                progress.fleet = item
                if item.event:
                    bar.write(item.event, file=sys.stderr)
                bar.set_description_str(f"{config.env.task}, {_fleet_line(item)}")
                continue
            journal.add(item)
            bar.update()
            if isinstance(item, ErroredEpisode):
                progress.errored.append(item)
                bar.write(f"seed {item.seed}: {item.error}, {item.attempts} times", sys.stderr)
                continue
            episodes.append(item)
            bar.set_postfix_str(f"{sum(e.success for e in episodes)} of {len(episodes)} succeeded")
            if len(episodes) - saved > saved * SAVED_EVERY:
                _save(config, progress, "")
                saved = len(episodes)


def _recorded(
    journal: EpisodeJournal,
    config: EvalSimConfig,
    earlier: EarlierRun | None,
    reports: Iterator[Report],
) -> Iterator[RunInfo | Episode | ErroredEpisode | FleetStatus]:
    """Yield the other reports, and give the spooled episodes to a recorder.

    Before the first episode, the journal is ready for it.

    Raises:
        ResumeRefused: The earlier run had another policy, strategy or world.
        DatasetError: The dataset cannot be created or continued, or an episode not recorded.
    """
    root = config.recording.dataset
    with contextlib.ExitStack() as stack:
        recorder: DatasetRecorder | None = None
        for report in reports:
            if isinstance(report, EpisodeSpooled):
                if recorder is not None:
                    recorder.add(report.folder)
                continue
            if isinstance(report, RunInfo):
                if earlier is not None:
                    check_same_run(journal, earlier, report)
                if root is not None:
                    features = DatasetFeatures.from_json(report.dataset_features)
                    recorder = stack.enter_context(DatasetRecorder(root, features))
                if earlier is not None:
                    if recorder is not None:
                        check_dataset(earlier, recorder)
                    journal.keep(earlier.content, len(earlier.episodes))
                else:
                    before = recorder.episodes if recorder is not None else 0
                    journal.begin(describe_run(config, report, before))
            yield report
        if recorder is not None:
            recorder.finish()


def _summary_lines(config: EvalSimConfig, run_info: RunInfo) -> list[str]:
    contract = PolicyContract.from_json(run_info.contract_json)
    execution = Execution(**run_info.execution)
    lines = strategy_selection.summary_lines(contract, execution, run_info.assumed)
    if config.latency != NO_DELAY:
        lines.append(f"latency      {config.latency}")
    warning = strategy_selection.latency_warning(execution, config.latency.largest_ms)
    return lines if warning is None else [*lines, f"warning: {warning}"]


def _fleet_line(fleet: FleetStatus) -> str:
    lost = f", {fleet.workers_lost} lost" if fleet.workers_lost else ""
    servers = f", {fleet.servers} servers" if fleet.servers or fleet.servers_lost else ""
    lost_servers = f", {fleet.servers_lost} lost" if fleet.servers_lost else ""
    return f"{fleet.ready} of {fleet.wanted} workers{lost}{servers}{lost_servers}"


def _fleet_record(fleet: FleetStatus) -> dict[str, Any]:
    counts = {"workers_lost": fleet.workers_lost, "servers_lost": fleet.servers_lost}
    return counts | {"workers": [dataclasses.asdict(worker) for worker in fleet.workers]}


def _must_be_writable(folder: Path) -> None:
    """Raise ``ValueError`` before the first episode if ``folder`` cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"a few bytes, to detect a full disk")
            probe.flush()
    except OSError as error:
        raise ValueError(f"--output_dir: {folder} cannot be written: {error}") from error


def _conclude(config: EvalSimConfig, progress: _Progress, failure: str) -> None:
    path = config.path
    print(format_report(_save(config, progress, failure)))
    print(f"result       {path}")
    if episodes := progress.episodes:
        plot = path.with_name(f"{path.stem}_timing.png")
        write_timing_plot(plot, episodes, f"{config.env.task}, {len(episodes)} episodes")
        print(f"timing       {plot}")
    if config.videos:
        print(f"videos       {config.video_dir}/")
    if config.recording.dataset is not None:
        print(f"dataset      {config.recording.dataset}/")
    if config.live_view.file is not None:
        print(f"rerun        {config.live_view.file}")


def _save(config: EvalSimConfig, progress: _Progress, failure: str) -> dict[str, Any]:
    result, run_info = summarize(progress.episodes), progress.run_info
    if run_info is not None:
        contract = PolicyContract.from_json(run_info.contract_json)
        execution = Execution(**run_info.execution)
        result |= {
            "action_manager": strategy_selection.result_entry(contract, execution),
            "assumed": list(run_info.assumed),
            "transport": run_info.transport,
            "transport_reason": run_info.transport_reason,
            "pictures": run_info.pictures,
            "deterministic": run_info.deterministic,
            "policy": policy_record(contract, PolicyInfo(**run_info.policy_info)),
            "world": run_info.world,
        }
    if progress.fleet is not None:
        result["fleet"] = _fleet_record(progress.fleet)
    result |= {
        "requested": config.num_rollout,
        "failure": failure,
        "errors": [
            dataclasses.asdict(error)
            for error in sorted(progress.errored, key=lambda error: error.seed)
        ],
        "mode": "realtime" if config.realtime else "lockstep",
        "env": as_plain(config.env),
        "config": as_plain(config),
        "versions": versions(),
    }
    write_result(config.path, result, progress.episodes)
    return result


if __name__ == "__main__":
    raise SystemExit(run_command(main))
