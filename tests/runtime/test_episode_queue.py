"""The queue of an evaluation's episodes: each is finished once, or an error."""

from __future__ import annotations

import random

import pytest

from runtime.eval_sim.episode_queue import EpisodeQueue
from runtime.evaluation.episode_result import ErroredEpisode


def test_seeds_are_handed_out_in_order_and_finished_once() -> None:
    queue = EpisodeQueue([5, 6, 7])
    assert [queue.take() for _ in range(4)] == [5, 6, 7, None]
    assert (queue.waiting, queue.running, queue.empty) == (0, 3, False)
    for seed in (6, 5, 7):
        queue.finish(seed)
    assert queue.empty
    with pytest.raises(ValueError, match=r"^seed: got 6, expected one of \[\]$"):
        queue.finish(6)


def test_a_lost_episode_is_next_and_the_third_loss_is_an_error() -> None:
    queue = EpisodeQueue([1, 2, 3], retries=2)
    for _ in range(2):
        assert queue.take() == 1
        assert queue.lose(1, "killed") is None
    assert queue.take() == 1
    assert queue.lose(1, "hung") == ErroredEpisode(1, "hung", 3)
    assert [queue.take(), queue.take(), queue.take()] == [2, 3, None]


def test_giving_back_is_no_loss() -> None:
    queue = EpisodeQueue([1, 2], retries=0)
    for _ in range(5):
        assert queue.take() == 1
        queue.give_back(1)
    assert queue.take() == 1
    assert queue.lose(1, "killed") == ErroredEpisode(1, "killed", 1)


def test_a_seed_that_occurs_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^seeds: got 4 more than once"):
        EpisodeQueue([4, 5, 4])


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_each_episode_ends_exactly_once(seed: int) -> None:
    rng = random.Random(seed)
    queue, running, ended = EpisodeQueue(range(30), retries=1), [], []
    while not queue.empty:
        if len(running) < 4 and (taken := queue.take()) is not None:
            running.append(taken)
            continue
        one = running.pop(rng.randrange(len(running)))
        match rng.randrange(3):
            case 0:
                queue.finish(one)
                ended.append(one)
            case 1:
                queue.give_back(one)
            case _:
                if queue.lose(one, "killed"):
                    ended.append(one)
    assert sorted(ended) == list(range(30))
