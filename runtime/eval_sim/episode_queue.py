"""The episodes of an evaluation that are still to be run."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from runtime.evaluation.episode_result import ErroredEpisode

DEFAULT_RETRIES = 2
"""An episode that kills its worker three times becomes an error."""


class EpisodeQueue:
    """Hands out seeds, and takes back those whose worker died or hung.

    It starts no process and waits for none: who has workers asks it.

    Args:
        seeds: One per episode, in the order in which they are handed out.
        retries: How often an episode is run again after it killed its worker, at least 0.

    Attributes:
        retries: As given.

    Raises:
        ValueError: A seed occurs twice.
    """

    def __init__(self, seeds: Iterable[int], retries: int = DEFAULT_RETRIES) -> None:
        self._waiting = deque(seeds)
        self.retries = retries
        self._running: set[int] = set()
        self._killed: Counter[int] = Counter()
        twice = [seed for seed, count in Counter(self._waiting).items() if count > 1]
        if twice:
            raise ValueError(f"seeds: got {twice[0]} more than once, expected each seed once")

    @property
    def waiting(self) -> int:
        """How many episodes no worker has."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many episodes workers have."""
        return len(self._running)

    @property
    def empty(self) -> bool:
        """Whether every episode is finished or an error."""
        return not self._waiting and not self._running

    def take(self) -> int | None:
        """Return the next seed for a worker; None while none waits."""
        if not self._waiting:
            return None
        seed = self._waiting.popleft()
        self._running.add(seed)
        return seed

    def finish(self, seed: int) -> None:
        """Count an episode as finished. Raises ``ValueError``: no worker has it."""
        self._end(seed)

    def give_back(self, seed: int) -> None:
        """Hand out ``seed`` again, next; its worker was lost by no fault of the episode.

        Raises:
            ValueError: No worker has it.
        """
        self._end(seed)
        self._waiting.appendleft(seed)

    def lose(self, seed: int, reason: str) -> ErroredEpisode | None:
        """Hand out ``seed`` again, next, unless it has killed its worker too often.

        Args:
            seed: Of the episode whose worker died or hung.
            reason: How the worker was lost.

        Returns:
            The record of the error if the episode is not run again.

        Raises:
            ValueError: No worker has it.
        """
        self._end(seed)
        self._killed[seed] += 1
        if self._killed[seed] > self.retries:
            return ErroredEpisode(seed, reason, self._killed[seed])
        self._waiting.appendleft(seed)
        return None

    def _end(self, seed: int) -> None:
        if seed not in self._running:
            raise ValueError(f"seed: got {seed}, expected one of {sorted(self._running)}")
        self._running.remove(seed)
