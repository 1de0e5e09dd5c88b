"""``--resume``: what an earlier evaluation finished, if it was of the same run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policies.yaml_config import as_plain
from runtime.datasets.dataset_recorder import DatasetRecorder, recorded_episodes
from runtime.errors import RuntimeFault
from runtime.eval_sim.reports import RunInfo
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.evaluation.episode_journal import EpisodeJournal, JournalContent
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.repeatable_fields import HOW_RUN, flattened, repeatable_config
from runtime.evaluation.results import versions

NOT_COMPARED = {*HOW_RUN, "dataset_features"}
"""Fields of ``RunInfo``: how the policy is reached, and what follows from the others."""
DESCRIBED = {"num_rollout", "dataset_episodes", "config", "versions", "info"}
"""What the first line of a journal has."""


class ResumeRefused(RuntimeFault):
    """``--resume`` on the result of another run; nothing is overwritten."""


@dataclass(frozen=True, slots=True, eq=False)
class EarlierRun:
    """The evaluation that is continued.

    Attributes:
        content: Its journal.
        episodes: Those that are kept: finished and, with ``--dataset``, in the dataset.
    """

    content: JournalContent
    episodes: tuple[Episode, ...]


def read_earlier(config: EvalSimConfig, journal: EpisodeJournal) -> EarlierRun | None:
    """Return what ``--resume`` continues; None without it, or if nothing is finished.

    Raises:
        ResumeRefused: The journal is of another run, or the result has none.
        JournalError, DatasetError: It, or the dataset, cannot be read.
    """
    if not config.resume:
        return None
    content = journal.read()
    if content is None:
        if config.path.exists():
            raise ResumeRefused(
                f"--resume: {config.path}: got a result without {journal.path.name}, expected "
                "both: choose another --output_dir, or leave out --resume to replace it"
            )
        return None
    missing = sorted(DESCRIBED - content.run.keys())
    if missing:
        raise ResumeRefused(
            f"--resume: {journal.path}: line 1: got no {missing[0]}, expected {sorted(DESCRIBED)}: "
            "it is of another version"
        )
    _check_same(journal, content.run["config"], _config(config), "")
    _check_same(journal, content.run["versions"], versions(), "versions.")
    finished = [episode.seed - config.seed + 1 for episode in content.episodes]
    least = max([content.run["num_rollout"], *finished])
    if config.num_rollout < least:
        raise ResumeRefused(
            f"--resume: -n/--num_rollout: got {config.num_rollout}, expected at least {least}, as "
            f"in {journal.path}"
        )
    return EarlierRun(content, content.episodes[: _recorded(config, content)])


def _recorded(config: EvalSimConfig, content: JournalContent) -> int:
    """Return how many of the first episodes are finished.

    They were given to the dataset's recorder in their order, after they were in the journal.
    """
    finished = len(content.episodes)
    if config.recording.dataset is None:
        return finished
    before = content.run["dataset_episodes"]
    total = recorded_episodes(config.recording.dataset)
    if not before <= total <= before + finished:
        raise ResumeRefused(
            f"--resume: --dataset {config.recording.dataset}: got {total} episodes, expected "
            f"{before} to {before + finished}: it is not as this run left it"
        )
    return int(total - before)


def check_same_run(journal: EpisodeJournal, earlier: EarlierRun, run_info: RunInfo) -> None:
    """Raise ``ResumeRefused`` if policy, strategy or world differ from the earlier run's."""
    _check_same(journal, earlier.content.run["info"], _info(run_info), "")


def check_dataset(earlier: EarlierRun, recorder: DatasetRecorder) -> None:
    """Raise ``ResumeRefused`` if another run has recorded since ``read_earlier``."""
    expected = earlier.content.run["dataset_episodes"] + len(earlier.episodes)
    if recorder.episodes != expected:
        raise ResumeRefused(
            f"--resume: --dataset {recorder.root}: got {recorder.episodes} episodes, expected "
            f"{expected}: another run has recorded into it"
        )


def describe_run(config: EvalSimConfig, run_info: RunInfo, dataset_episodes: int) -> dict[str, Any]:
    """Return the first line of a journal.

    Args:
        config: The evaluation.
        run_info: What it runs with.
        dataset_episodes: In the dataset before this run.
    """
    return {
        "num_rollout": config.num_rollout,
        "dataset_episodes": dataset_episodes,
        "config": _config(config),
        "versions": versions(),
        "info": _info(run_info),
    }


def _config(config: EvalSimConfig) -> dict[str, Any]:
    plain = repeatable_config(as_plain(config))
    del plain["num_rollout"]
    return plain


def _info(run_info: RunInfo) -> dict[str, Any]:
    info = {
        name: value
        for name, value in dataclasses.asdict(run_info).items()
        if name not in NOT_COMPARED
    }
    info["policy.contract"] = json.loads(info.pop("contract_json"))
    info["policy"] = info.pop("policy_info")
    info["action_manager"] = info.pop("execution")
    return flattened(info)


def _check_same(
    journal: EpisodeJournal, expected: Mapping[str, Any], now: Mapping[str, Any], prefix: str
) -> None:
    got = json.loads(json.dumps(now))  # tuples are lists, as in the journal
    for name in dict.fromkeys((*expected, *got)):
        if got.get(name) != expected.get(name):
            raise ResumeRefused(
                f"--resume: {prefix}{name}: got {got.get(name)!r:.200}, expected "
                f"{expected.get(name)!r:.200}, as in {journal.path}: it is of another run"
            )
