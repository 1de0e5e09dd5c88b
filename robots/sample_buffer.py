"""The newest samples of a sensor whose stamps come from its own clock."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Generic, NamedTuple, Protocol, TypeVar

from robots.errors import RobotError, SensorLost, StampFault

KEPT = 256
"""Samples that a stream keeps; more than a second of any sensor here."""


class Stamped(Protocol):
    """A sample with two times."""

    @property
    def stamp_ns(self) -> int:
        """The sensor's own clock."""
        ...

    @property
    def received_ns(self) -> int:
        """This host's monotonic clock."""
        ...


STAMPS_HINT = "expected stamps that increase: does its publisher set header.stamp?"

SampleT = TypeVar("SampleT", bound=Stamped)


class _Fault(NamedTuple):
    kind: type[RobotError]
    message: str
    until_ns: int


class SampleBuffer(Generic[SampleT]):
    """The newest samples of one sensor, added by its thread and read by another.

    A stamp that goes back, or an invalid sample, is a fault. Readers get it as an error until
    ``timeout_s`` have passed without another one; samples from before it are dropped. A sensor
    whose stamp does not change for ``timeout_s`` although samples arrive is frozen; one without
    samples for ``timeout_s`` is lost. Both errors end when stamps advance again; the caller decides
    whether to continue then.

    Args:
        name: The sensor's name in errors, e.g. a topic.
        timeout_s: A sensor without a new stamp for so long is lost.
        keep: Samples kept for ``nearest``.
        longest_jump_s: A stamp that advances by so much more than the time of arrival is a fault.
    """

    def __init__(
        self, name: str, *, timeout_s: float, keep: int = KEPT, longest_jump_s: float = math.inf
    ) -> None:
        self.name, self._longest_jump_s = name, longest_jump_s
        self._timeout_ns = round(timeout_s * 1e9)
        self._samples: deque[SampleT] = deque(maxlen=keep)
        self._fault: _Fault | None = None
        self._changed_ns = 0
        self._repeats = 0
        self._arrival = threading.Condition()

    def add(self, sample: SampleT) -> None:
        """Add a sample that has arrived. Called by the sensor's thread."""
        with self._arrival:
            last = self._samples[-1] if self._samples else None
            if last is not None:
                self._check_jump(sample, last)
            if last is None or sample.stamp_ns > last.stamp_ns:
                self._samples.append(sample)
                self._changed_ns, self._repeats = sample.received_ns, 0
            elif sample.stamp_ns < last.stamp_ns:
                self._fail(
                    StampFault,
                    f"stamp went back by {(last.stamp_ns - sample.stamp_ns) / 1e9:.6f} s, "
                    f"from {last.stamp_ns} to {sample.stamp_ns} ns, expected stamps that increase: "
                    "was its clock set, or has its publisher restarted?",
                )
                self._samples.append(sample)
                self._changed_ns, self._repeats = sample.received_ns, 0
            else:
                self._repeats += 1
            self._arrival.notify_all()

    def _check_jump(self, sample: SampleT, last: SampleT) -> None:
        arrived_ns = sample.received_ns - last.received_ns
        jump_s = (sample.stamp_ns - last.stamp_ns - arrived_ns) / 1e9
        if jump_s > self._longest_jump_s:
            self._fail(
                StampFault,
                f"stamp jumped ahead by {jump_s:.3f} s, from {last.stamp_ns} to {sample.stamp_ns} "
                f"ns, expected at most {self._longest_jump_s:g} s: was its clock set?",
            )

    def fail(self, kind: type[RobotError], message: str) -> None:
        """Record a fault of the sensor, e.g. an invalid sample. Called by the sensor's thread."""
        with self._arrival:
            self._fail(kind, message)
            self._arrival.notify_all()

    def _fail(self, kind: type[RobotError], message: str) -> None:
        until_ns = time.monotonic_ns() + self._timeout_ns
        self._fault = _Fault(kind, f"{self.name}: {message}", until_ns)
        self._samples.clear()

    @property
    def fault_until_ns(self) -> int:
        """When the last fault ends, by this host's monotonic clock; 0 before the first."""
        with self._arrival:
            return self._fault.until_ns if self._fault is not None else 0

    def newest(self) -> SampleT:
        """The newest sample.

        Raises:
            StampFault: Its stamps went back, or do not change.
            SensorLost: It sends nothing.
            RobotError: The fault recorded by ``fail``.
        """
        with self._arrival:
            self._check()
            return self._samples[-1]

    def nearest(self, stamp_ns: int) -> SampleT:
        """The kept sample whose stamp is nearest to ``stamp_ns``. Raises as ``newest``."""
        with self._arrival:
            self._check()
            return min(self._samples, key=lambda sample: abs(sample.stamp_ns - stamp_ns))

    def wait(self, deadline_s: float) -> bool:
        """Wait until two samples with different stamps have arrived.

        Returns:
            False if ``time.monotonic()`` passes ``deadline_s`` first.

        Raises:
            StampFault: Its stamps went back, or did not change until the deadline.
            RobotError: The fault recorded by ``fail``.
        """
        with self._arrival:
            while len(self._samples) < 2 and self._fault is None:
                if not self._arrival.wait(max(0.0, deadline_s - time.monotonic())):
                    break
            self._raise_fault()
            if len(self._samples) < 2 and self._repeats:
                raise StampFault(
                    f"{self.name}: stamp stands still at {self._samples[-1].stamp_ns} ns, "
                    f"{self._repeats + 1} messages carried it, {STAMPS_HINT}"
                )
            return len(self._samples) >= 2

    def _check(self) -> None:
        self._raise_fault()
        if not self._samples:
            raise SensorLost(
                f"{self.name}: nothing received yet, expected a message: is its publisher running?"
            )
        quiet_ns = time.monotonic_ns() - self._changed_ns
        if quiet_ns <= self._timeout_ns:
            return
        if self._repeats:
            raise StampFault(
                f"{self.name}: stamp stands still at {self._samples[-1].stamp_ns} ns for "
                f"{quiet_ns / 1e9:.2f} s, {self._repeats} messages carried it again, {STAMPS_HINT}"
            )
        raise SensorLost(
            f"{self.name}: nothing received for {quiet_ns / 1e9:.2f} s, expected a message within "
            f"{self._timeout_ns / 1e9:g} s: is its publisher running?"
        )

    def _raise_fault(self) -> None:
        if self._fault is not None and time.monotonic_ns() < self._fault.until_ns:
            raise self._fault.kind(self._fault.message)
