"""What happened when: every tick and every stage of this process, recorded in memory.

``--trace FILE`` of the command lines; ``runtime.trace.chrome_format`` writes what Perfetto and
Chrome show.

    with trace.tracing(Path("run.json"), "eval_sim"):
        ...

    python -m runtime.trace run.json run.server.json -o all.json

Guaranteed:

* Without a trace a hook costs a check of ``on`` and allocates nothing; no file appears.
* With one, a record is packed into memory that was reserved and touched beforehand. Nothing is
  written while recording; when the memory is full, the oldest records go, and the file says so.
* The file appears whole or not at all, when the block ends: also by an exception, by SIGINT, and
  by SIGTERM. After SIGKILL there is none.

A hook that has taken the times already says ``if trace.on: trace.add(...)``; one that has not says
``with trace.span("..."):``. There is one trace per process, as there is one log, so that no layer
has to hand it to the next.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from runtime.trace.buffer import CAPACITY, EventKind, FlowPosition, Trace, TraceError

logger = logging.getLogger(__name__)

_NUMBER_BITS = 24
KEY_BITS = 64 - _NUMBER_BITS


class _Span:
    """``with`` form of ``add``."""

    __slots__ = ("_begin_ns", "_name", "_number")

    def __init__(self, name: str, number: int) -> None:
        self._name, self._number = name, number

    def __enter__(self) -> None:
        self._begin_ns = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        add(self._name, self._begin_ns, time.monotonic_ns(), self._number)


class _Nothing:
    """What ``span`` gives without a trace: always the same object."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


on = False
"""Whether this process is traced. Changed by ``tracing`` alone."""
_trace: Trace | None = None
_NOTHING = _Nothing()


def add(
    name: str,
    begin_ns: int,
    end_ns: int,
    number: int = -1,
    *,
    value: int = 0,
    flow: int = 0,
    kind: EventKind = EventKind.SPAN,
    link: FlowPosition = FlowPosition.NONE,
) -> None:
    """``Trace.add`` of this process' trace, if there is one."""
    if _trace is not None:
        _trace.add(name, begin_ns, end_ns, number, value=value, flow=flow, kind=kind, link=link)


def span(name: str, number: int = -1) -> _Span | _Nothing:
    """Record how long a ``with`` block takes."""
    return _Span(name, number) if on else _NOTHING


def instant(name: str) -> None:
    """Note that something happened now."""
    if on:
        now_ns = time.monotonic_ns()
        add(name, now_ns, now_ns, value=1, kind=EventKind.INSTANT)


def tick(number: int, begin_ns: int, late_ns: int, missed: int) -> None:
    """A control loop's tick that ends now.

    Args:
        late_ns: Time at which its step had returned − its deadline.
        missed: Ticks that were skipped after it.
    """
    now_ns = time.monotonic_ns()
    add("tick", begin_ns, now_ns, number, value=late_ns, kind=EventKind.TICK)
    if missed:
        add("missed", now_ns, now_ns, value=missed, kind=EventKind.INSTANT)


def new_key() -> int:
    """By which the two sides of a session know its requests; 0 without a trace."""
    return secrets.randbits(KEY_BITS) | 1 if on else 0


def read_key(said: object) -> int:
    """The key in a peer's handshake, which is not trusted; 0 for none."""
    return said if type(said) is int and 0 <= said < 1 << KEY_BITS else 0


def flow(key: int, request_id: int) -> int:
    """A request's number in all processes; 0 without a key."""
    return key << _NUMBER_BITS | request_id & (1 << _NUMBER_BITS) - 1 if key else 0


def _number(flow: int) -> int:
    return flow & (1 << _NUMBER_BITS) - 1


def published(begin_ns: int, flow: int) -> None:
    """A request that a client has sent, now."""
    add("publish", begin_ns, time.monotonic_ns(), _number(flow), flow=flow, link=FlowPosition.FIRST)


def answered(stages_ns: Mapping[str, int], begin_ns: int, received_ns: int, flow: int) -> None:
    """A request that a client got its answer to, now.

    Its stages are laid end to end, in their order: as long as they were, which is all that one
    side's durations say. When they were is in the server's own trace.
    """
    now_ns = time.monotonic_ns()
    number = _number(flow)
    add("unpack", received_ns, now_ns, number, flow=flow, link=FlowPosition.LAST)
    end_ns = begin_ns + sum(stages_ns.values())
    add("request", begin_ns, end_ns, number, flow=flow, kind=EventKind.REQUEST)
    _lay(stages_ns, begin_ns, end_ns, flow=flow, kind=EventKind.PART)


def inferred(stages_ns: Mapping[str, int], begin_ns: int, tick: int) -> None:
    """What a policy in this process did, until now."""
    now_ns = time.monotonic_ns()
    add("infer_call", begin_ns, now_ns, tick)
    _lay(stages_ns, begin_ns, now_ns, flow=0, kind=EventKind.SPAN)


def served(
    stages_ns: Mapping[str, int], arrived_ns: int, taken_ns: int, reply_ns: int, flow: int
) -> None:
    """A request that a server has answered, now.

    Args:
        stages_ns: The policy's.
        arrived_ns, taken_ns: When it was seen, and when its turn came.
        reply_ns: When the policy had returned.
    """
    now_ns = time.monotonic_ns()
    number = _number(flow)
    add("server_wait", arrived_ns, taken_ns, number, flow=flow, kind=EventKind.PART)
    add("serve", taken_ns, now_ns, number, flow=flow, link=FlowPosition.ON_THE_WAY)
    _lay(stages_ns, taken_ns, reply_ns, flow=flow, kind=EventKind.SPAN)
    add("answer", reply_ns, now_ns, number, flow=flow)


def _lay(
    stages_ns: Mapping[str, int], at_ns: int, end_ns: int, *, flow: int, kind: EventKind
) -> None:
    for name, duration_ns in stages_ns.items():
        # Durations come from elsewhere: whatever they are, nothing leaves what it is a part of.
        until_ns = min(max(at_ns, at_ns + duration_ns), end_ns)
        add(name, at_ns, until_ns, _number(flow) if flow else -1, flow=flow, kind=kind)
        at_ns = until_ns


def sibling(path: Path | None, process: str) -> Path | None:
    """Where another process of the same run writes: ``run.json``, ``run.server.json``."""
    return None if path is None else path.with_name(f"{path.stem}.{process}{path.suffix}")


@contextlib.contextmanager
def tracing(path: Path | None, process: str, *, capacity: int = CAPACITY) -> Iterator[None]:
    """Trace this process until the block ends, then write ``path``; do nothing without one.

    A process that would die of SIGTERM without a word ends by ``SystemExit`` meanwhile.

    Args:
        process: What it is called in the picture.

    Raises:
        TraceError: Nothing can be written there.
        ValueError: This process is traced already.
    """
    global on, _trace
    if path is None:
        yield
        return
    if _trace is not None:
        raise ValueError("tracing: this process is traced already")
    _must_be_writable(path)
    _trace, on = Trace(process, capacity), True
    try:
        with _ending_by_exception():
            yield
    finally:
        ended, _trace, on = _trace, None, False
        _write(path, ended)


def _write(path: Path, ended: Trace) -> None:
    from runtime.trace import chrome_format

    try:
        chrome_format.write(path, ended.recorded())
    except OSError as error:
        # What was traced is worth more than its trace: its own outcome stands.
        logger.error("the trace was not written: %s", error)


def _must_be_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise TraceError(f"--trace: {path} cannot be written: {error}") from error


@contextlib.contextmanager
def _ending_by_exception() -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _exit:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    from policies.standard_streams import run_command
    from runtime.trace.merge import main

    raise SystemExit(run_command(main))
