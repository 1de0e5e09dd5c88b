"""Real-time options of the kernel for a control loop: requested once, never required.

Each option is tried separately. Options that are refused (usually for lack of privilege) are
reported in one line, and the loop runs without them: less exact timing is better than no loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import platform
import resource
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

_PR_SET_TIMERSLACK = 29
_MCL_CURRENT, _MCL_FUTURE = 1, 2
DMA_LATENCY = Path("/dev/cpu_dma_latency")
"""While it is open with a latency of 0, CPUs stay out of deep idle states."""

_libc = ctypes.CDLL(None, use_errno=True)


SLICE_NS = 1_000_000
"""A third of the usual 2.8 ms, and enough for a spin and a tick."""


@dataclass(frozen=True, slots=True)
class RealtimeOptions:
    """Which options to request. The defaults do not disturb other processes.

    Attributes:
        priority: SCHED_FIFO priority, 1 to 99; 0 keeps the scheduling policy. Interrupt threads
            have 50; a loop whose driver depends on them must stay below.
        lock_memory: Keep all present and future pages in memory, so that no tick waits for one.
        timer_slack_ns: How late the kernel may fire this thread's timers to batch them; its default
            is 50 µs. 0 keeps it. No effect under SCHED_FIFO.
        slice_ns: Time slice for a thread that is not SCHED_FIFO: the scheduler (EEVDF, Linux 6.12
            and later; no effect before) runs a thread with a shorter slice earlier. It must hold
            a tick's work and spin. 0 keeps it.
        forbid_deep_idle: Keep the machine's CPUs out of idle states with a long wake-up, until
            closed.
        threads: Whether the process' other threads, and those that they start, get SCHED_FIFO too,
            one priority below. For a driver with threads of its own: if an ordinary process keeps
            such a thread from the CPU while it holds the GIL, the loop waits as well.

    Raises:
        ValueError: A value is out of range.
    """

    priority: int = 80
    lock_memory: bool = True
    timer_slack_ns: int = 1
    slice_ns: int = SLICE_NS
    forbid_deep_idle: bool = True
    threads: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.priority <= 99:
            raise ValueError(f"priority: got {self.priority}, expected 0 (none) to 99")
        if self.timer_slack_ns < 0:
            raise ValueError(f"timer_slack_ns: got {self.timer_slack_ns}, expected 0 or more")
        if self.slice_ns and not 100_000 <= self.slice_ns <= 100_000_000:
            raise ValueError(f"slice_ns: got {self.slice_ns}, expected 0, or 100 µs to 100 ms")


UNPRIVILEGED = RealtimeOptions(priority=0, lock_memory=False, forbid_deep_idle=False)
"""Options that need no privilege."""


class Realtime:
    """The options in force for the calling thread, until closed or the process ends.

    Scheduling and timer slack belong to a thread: create this in the thread that runs the loop.
    Threads and processes started later do not inherit the scheduling. A context manager.

    Attributes:
        granted: The options granted, as text.
        refused: The options refused, each with its reason.
    """

    def __init__(self, options: RealtimeOptions) -> None:
        self._undo: list[Callable[[], None]] = []
        self.granted: tuple[str, ...] = ()
        self.refused: tuple[str, ...] = ()
        if options.timer_slack_ns:
            slack_ns = options.timer_slack_ns
            self._try(f"timer slack {slack_ns} ns", lambda: _prctl_timer_slack(slack_ns))
        if options.slice_ns and not options.priority:
            slice_ns = options.slice_ns
            self._try(f"slice {slice_ns / 1e6:g} ms", lambda: self._slice(slice_ns))
        if options.lock_memory:
            self._try("locked memory", self._lock_memory)
        if options.forbid_deep_idle:
            self._try("no deep idle states", self._hold_dma_latency)
        if options.priority:
            self._try(
                f"SCHED_FIFO priority {options.priority}",
                lambda: self._scheduler(options.priority),
            )
        if options.priority and options.threads:
            below = max(1, options.priority - 1)
            self._try(f"its threads {below}", lambda: self._threads(below))

    def _try(self, name: str, apply: Callable[[], None]) -> None:
        try:
            apply()
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            self.refused += (f"{name} ({reason})",)
        else:
            self.granted += (name,)

    def report(self) -> str:
        """One line: the options granted, and those refused with their reasons."""
        line = f"real time: {', '.join(self.granted) or 'nothing requested'}"
        return f"{line}; refused: {', '.join(self.refused)}" if self.refused else line

    def log(self) -> None:
        """Log ``report``, as a warning if an option was refused."""
        logger.log(logging.WARNING if self.refused else logging.INFO, "%s", self.report())

    def close(self) -> None:
        """Undo all options but the timer slack, which disturbs no other thread. Idempotent."""
        while self._undo:
            with contextlib.suppress(OSError):
                self._undo.pop()()

    def __enter__(self) -> Realtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _slice(self, slice_ns: int) -> None:
        _sched_slice(slice_ns)
        self._undo.append(lambda: _sched_slice(0))

    def _scheduler(self, priority: int) -> None:
        policy, parameter = os.sched_getscheduler(0), os.sched_getparam(0)
        # A child process that computes for seconds at this priority would block the machine.
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
        self._undo.append(lambda: os.sched_setscheduler(0, policy, parameter))

    def _threads(self, priority: int) -> None:
        # Without SCHED_RESET_ON_FORK: threads started by these serve the loop as well.
        _schedule_others(os.SCHED_FIFO, priority)
        self._undo.append(lambda: _schedule_others(os.SCHED_OTHER, 0))

    def _lock_memory(self) -> None:
        # Under a finite limit, MCL_FUTURE would make a later allocation fail.
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        unlimited = soft == resource.RLIM_INFINITY or _has_capability(_CAP_IPC_LOCK)
        _check(_libc.mlockall(_MCL_CURRENT | _MCL_FUTURE if unlimited else _MCL_CURRENT))
        self._undo.append(lambda: _check(_libc.munlockall()))

    def _hold_dma_latency(self) -> None:
        # The request lasts while the descriptor is open.
        descriptor = os.open(DMA_LATENCY, os.O_WRONLY | os.O_CLOEXEC)
        self._undo.append(lambda: os.close(descriptor))
        os.write(descriptor, struct.pack("=i", 0))


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect garbage now, and not again until the block ends; for an episode.

    Existing objects are frozen (``gc.freeze``), so that they are not scanned again.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


_CAP_IPC_LOCK = 14


def _has_capability(number: int) -> bool:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


class _SchedAttr(ctypes.Structure):
    """The fields of the kernel's ``struct sched_attr`` that every version has."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("sched_policy", ctypes.c_uint32),
        ("sched_flags", ctypes.c_uint64),
        ("sched_nice", ctypes.c_int32),
        ("sched_priority", ctypes.c_uint32),
        ("sched_runtime", ctypes.c_uint64),
        ("sched_deadline", ctypes.c_uint64),
        ("sched_period", ctypes.c_uint64),
    )


_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


def _sched_slice(slice_ns: int) -> None:
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        raise ValueError(f"system call number unknown on {platform.machine()}")
    attributes = _SchedAttr(
        size=ctypes.sizeof(_SchedAttr),
        sched_policy=os.SCHED_OTHER,
        sched_nice=os.getpriority(os.PRIO_PROCESS, 0),
        sched_runtime=slice_ns,
    )
    _check(_libc.syscall(number, 0, ctypes.byref(attributes), 0))


def _schedule_others(policy: int, priority: int) -> None:
    """Set the scheduling of every thread of this process but the calling one."""
    for entry in Path("/proc/self/task").iterdir():
        if (thread := int(entry.name)) != threading.get_native_id():
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setscheduler(thread, policy, os.sched_param(priority))


def _prctl_timer_slack(slack_ns: int) -> None:
    _check(_libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(slack_ns), 0, 0, 0))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
