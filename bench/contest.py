"""Contestants measured side by side: in alternating blocks of one run, on the same two cores.

A machine's speed drifts by more than the differences that matter; alternation gives every
contestant the same share of every phase, so that a ratio of medians means something where a time
does not.
"""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bench.contestant import Absent, Exchange, check, find
from bench.payload import PAYLOADS, Payload, Source
from bench.process import ServerProcess, cores, pinned

WARM_UP, WARM_UP_S = 20, 0.05
TURN_S = 60.0
"""No turn takes this long, unless a message was lost and somebody waits for it."""
Samples = Mapping[str, NDArray[np.float64]]
"""Microseconds per exchange, by contestant."""


class Stuck(Exception):
    """An exchange that did not end."""


@dataclass(slots=True)
class Pair:
    """A contestant at work: its server, and one exchange with it."""

    server: ServerProcess
    source: Source
    exchange: Exchange


@dataclass
class Contest:
    """Open contestants of one payload.

    Attributes:
        group: What it is called in records.
        pairs: Those that run, by name.
        absent: Those that do not, with the reason.
    """

    payload: Payload
    group: str = ""
    pairs: dict[str, Pair] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def turn(self, name: str, *, limit_s: float | None = None) -> Iterator[Exchange]:
        """``name``'s exchange, verified and warm; the others' servers do not run meanwhile.

        Raises:
            Stuck: The whole turn took longer than ``limit_s``.
        """
        pair = self.pairs[name]
        pair.server.resume()
        try:
            with _patience(TURN_S if limit_s is None else limit_s):
                pair.source.verify(pair.exchange)
                timed(pair.exchange, WARM_UP, WARM_UP_S)
                yield pair.exchange
        finally:
            pair.server.pause()

    def rounds(self, *, blocks: int, block: int, block_s: float) -> Samples:
        """Every contestant in turn, ``blocks`` times.

        Args:
            block: Exchanges in a block, and
            block_s: how long one may take: whichever ends first.
        """
        samples: dict[str, list[float]] = {name: [] for name in self.pairs}
        names = list(self.pairs)
        for number in range(blocks if names else 0):
            # Whoever is next inherits the clock rate of whoever was before: take turns in that.
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if name not in self.pairs:
                    continue
                try:
                    with self.turn(name) as exchange:
                        samples[name].extend(timed(exchange, block, block_s))
                except Stuck as error:
                    # A peer that loses a message must not cost the others theirs.
                    self.absent[name] = f"{error}, after {len(samples.pop(name))} that did"
                    del self.pairs[name]
        return {name: np.array(values) for name, values in samples.items()}


def timed(exchange: Exchange, count: int, limit_s: float) -> list[float]:
    """Microseconds of each of up to ``count`` exchanges within ``limit_s`` (three at least)."""
    clock, samples = time.perf_counter_ns, []
    until = clock() + round(limit_s * 1e9)
    before = clock()
    for number in range(count):
        exchange()
        after = clock()
        samples.append((after - before) / 1000)
        before = after
        if after > until and number >= 2:
            break
    return samples


@contextmanager
def contest(names: Sequence[str], payload: str, *, gc_on: bool = True) -> Iterator[Contest]:
    """Start every contestant that can run here.

    Raises:
        ValueError: No such contestant or payload, or one that does not take the other.
        Absent: None can, for want of a second core.
    """
    for name in names:
        check(name, payload)
    opened = Contest(PAYLOADS[payload])
    with ExitStack() as stack:
        stack.enter_context(pinned(cores()[0]))
        stack.enter_context(_collector(gc_on))
        for name in names:
            with ExitStack() as one:
                try:
                    contestant = find(name)
                    server = ServerProcess(contestant, opened.payload, gc_on=gc_on)
                except Absent as error:
                    opened.absent[name] = str(error)
                    continue
                one.callback(server.close)
                source = Source(opened.payload)
                try:
                    with _patience(TURN_S):
                        exchange = one.enter_context(contestant.connect(source, server.link))
                        source.verify(exchange)
                except Stuck as error:
                    opened.absent[name] = str(error)
                    continue
                server.pause()
                opened.pairs[name] = Pair(server, source, exchange)
                stack.push(one.pop_all())
        yield opened


@contextmanager
def _collector(on: bool) -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    (gc.enable if on else gc.disable)()
    try:
        yield
    finally:
        (gc.enable if was_on else gc.disable)()


@contextmanager
def _patience(limit_s: float) -> Iterator[None]:
    """Raise ``Stuck`` in this, the main thread, whatever it waits for.

    By a signal of its own: pytest-timeout has the alarm clock.
    """

    def give_up(*_: object) -> None:
        raise Stuck(f"an exchange did not end within {limit_s:g} s")

    before = signal.signal(signal.SIGUSR1, give_up)
    arguments = (threading.get_ident(), signal.SIGUSR1)
    timer = threading.Timer(limit_s, signal.pthread_kill, arguments)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGUSR1, before)
