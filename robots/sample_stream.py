"""Sensor streams that come with stamps of a clock that is not ours."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Generic, NamedTuple, Protocol, TypeVar

from robots.errors import RobotError, SensorLost, StampFault

KEPT = 256
"""Newest samples of a stream; more than a second of any sensor here."""


class Stamped(Protocol):
    """What a stream is made of."""

    @property
    def stamp_ns(self) -> int: ...
    @property
    def received_ns(self) -> int: ...


SampleT = TypeVar("SampleT", bound=Stamped)


class _Fault(NamedTuple):
    kind: type[RobotError]
    message: str
    until_ns: int


class SampleStream(Generic[SampleT]):
    """The newest samples of one sensor, put in by its thread and read by ours.

    A stamp that goes back is a fault at once, and so is a sample that cannot be used; it is raised
    until ``timeout_s`` have passed without another, and nothing from before it is shown any more.
    A stamp that stands still for ``timeout_s`` while samples keep coming is a frozen sensor, none
    for ``timeout_s`` a lost one, until it moves again. Whether to go on then is the caller's.

    Args:
        name: Of the sensor, for errors, e.g. a topic.
        timeout_s: After how long without news the sensor is lost.
        keep: Samples kept for ``nearest``.
    """

    def __init__(self, name: str, *, timeout_s: float, keep: int = KEPT) -> None:
        self.name = name
        self._timeout_ns = round(timeout_s * 1e9)
        self._samples: deque[SampleT] = deque(maxlen=keep)
        self._fault: _Fault | None = None
        self._changed_ns = 0
        self._repeats = 0
        self._news = threading.Condition()

    def add(self, sample: SampleT) -> None:
        """Take a sample as it arrives. Called by the sensor's thread."""
        with self._news:
            last = self._samples[-1] if self._samples else None
            if last is None or sample.stamp_ns > last.stamp_ns:
                self._samples.append(sample)
                self._changed_ns, self._repeats = sample.received_ns, 0
            elif sample.stamp_ns < last.stamp_ns:
                self._fail(
                    StampFault,
                    f"stamp went back by {(last.stamp_ns - sample.stamp_ns) / 1e9:.6f} s, "
                    f"from {last.stamp_ns} to {sample.stamp_ns} ns",
                )
                self._samples.append(sample)
                self._changed_ns, self._repeats = sample.received_ns, 0
            else:
                self._repeats += 1
            self._news.notify_all()

    def fail(self, kind: type[RobotError], message: str) -> None:
        """Note that the sensor sends what cannot be used. Called by the sensor's thread."""
        with self._news:
            self._fail(kind, message)
            self._news.notify_all()

    def _fail(self, kind: type[RobotError], message: str) -> None:
        until_ns = time.monotonic_ns() + self._timeout_ns
        self._fault = _Fault(kind, f"{self.name}: {message}", until_ns)
        self._samples.clear()

    def newest(self) -> SampleT:
        """The newest sample.

        Raises:
            StampFault: Its stamps went back, or stand still.
            SensorLost: It is silent.
            RobotError: What ``fail`` was told.
        """
        with self._news:
            self._check()
            return self._samples[-1]

    def nearest(self, stamp_ns: int) -> SampleT:
        """Of the samples kept, the one whose stamp is nearest. Raises as ``newest``."""
        with self._news:
            self._check()
            return min(self._samples, key=lambda sample: abs(sample.stamp_ns - stamp_ns))

    def wait(self, deadline_s: float) -> bool:
        """Until the sensor runs: two samples with different stamps.

        Returns:
            False if ``time.monotonic()`` passes ``deadline_s`` first.

        Raises:
            StampFault: Its stamps went back, or did not move until the deadline.
            RobotError: What ``fail`` was told.
        """
        with self._news:
            while len(self._samples) < 2 and self._fault is None:
                if not self._news.wait(max(0.0, deadline_s - time.monotonic())):
                    break
            self._raise_fault()
            if len(self._samples) < 2 and self._repeats:
                raise StampFault(
                    f"{self.name}: stamp stands still at {self._samples[-1].stamp_ns} ns, "
                    f"{self._repeats + 1} messages carried it"
                )
            return len(self._samples) >= 2

    def _check(self) -> None:
        self._raise_fault()
        if not self._samples:
            raise SensorLost(f"{self.name}: nothing received yet")
        quiet_ns = time.monotonic_ns() - self._changed_ns
        if quiet_ns <= self._timeout_ns:
            return
        if self._repeats:
            raise StampFault(
                f"{self.name}: stamp stands still at {self._samples[-1].stamp_ns} ns for "
                f"{quiet_ns / 1e9:.2f} s, {self._repeats} messages carried it again"
            )
        raise SensorLost(
            f"{self.name}: nothing received for {quiet_ns / 1e9:.2f} s, expected something within "
            f"{self._timeout_ns / 1e9:g} s"
        )

    def _raise_fault(self) -> None:
        if self._fault is not None and time.monotonic_ns() < self._fault.until_ns:
            raise self._fault.kind(self._fault.message)
