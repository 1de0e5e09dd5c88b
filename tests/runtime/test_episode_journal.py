"""The journal of an evaluation's episodes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from runtime.control.chunk_executor import ExecutorStatistics
from runtime.errors import JournalError
from runtime.evaluation import episode_journal
from runtime.evaluation.episode_journal import EpisodeJournal
from runtime.evaluation.episode_result import Episode, ErroredEpisode

RUN = {"num_rollout": 3}


def episode(seed: int) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        seed=seed,
        success=bool(seed % 2),
        reward=float(rng.uniform()),
        horizon=4,
        missed_ticks=1,
        executor=ExecutorStatistics(2, 0, 1, 0, float(rng.uniform()), 3),
        action_age_s=rng.uniform(size=4),
        lateness_s=rng.uniform(size=3),
        stages_ns={"infer": [int(n) for n in rng.integers(0, 2**53, 2)], "request": []},
        wall_s=float(rng.uniform()),
    )


def assert_same(got: Episode, expected: Episode) -> None:
    for field in dataclasses.fields(Episode):
        one, other = getattr(got, field.name), getattr(expected, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with the episodes 0 and 1, and the error of seed 2 between them."""
    path = tmp_path / "task_episodes.jsonl"
    with EpisodeJournal(path) as journal:
        journal.begin(RUN)
        journal.add(episode(0))
        journal.add(ErroredEpisode(2, "killed", 3))
        journal.add(episode(1))
    return path


def test_episodes_are_read_bit_for_bit(path: Path) -> None:
    with EpisodeJournal(path) as journal:
        content = journal.read()
    assert content is not None
    assert content.run == RUN
    assert [one.seed for one in content.episodes] == [0, 1]
    for one in content.episodes:
        assert_same(one, episode(one.seed))


def test_a_line_that_was_not_written_in_full_is_left_out_and_replaced(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)
    with EpisodeJournal(path) as journal:
        content = journal.read()
        assert content is not None
        assert [one.seed for one in content.episodes] == [0]
        journal.keep(content, 1)
        journal.add(episode(5))
        again = journal.read()
    assert again is not None
    assert [one.seed for one in again.episodes] == [0, 5]


def test_a_new_run_replaces_the_old_with_its_first_episode(path: Path) -> None:
    before = path.read_bytes()
    with EpisodeJournal(path) as journal:
        journal.begin({"num_rollout": 9})
        assert path.read_bytes() == before
        journal.add(episode(7))
        content = journal.read()
    assert content is not None
    assert content.run == {"num_rollout": 9}
    assert [one.seed for one in content.episodes] == [7]


def test_a_second_writer_is_refused(path: Path) -> None:
    with EpisodeJournal(path), pytest.raises(JournalError, match="another evaluation writes this"):
        EpisodeJournal(path)
    EpisodeJournal(path).close()


def test_a_journal_without_an_episode_leaves_no_file(tmp_path: Path) -> None:
    with EpisodeJournal(tmp_path / "empty.jsonl") as journal:
        journal.begin(RUN)
        assert journal.read() is None
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_episodes_before(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def half(fd: int, data: bytes) -> None:
        os.write(fd, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(episode_journal, "_write", half)
    with EpisodeJournal(path) as journal, pytest.raises(OSError, match="No space"):
        journal.add(episode(4))
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{\n", "line 2: no JSON"),
        (b"[]\n", r"line 2: got \[\], expected an object"),
        (b'{"episode": {"seed": 1}}\n', "line 2: no episode"),
    ],
)
def test_a_damaged_line_is_named(path: Path, line: bytes, message: str) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], line, *lines[2:]]))
    with EpisodeJournal(path) as journal, pytest.raises(JournalError, match=message):
        journal.read()
