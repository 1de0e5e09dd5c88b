"""Records the ticks and stages of this process in memory: ``--trace FILE`` of the commands.

``runtime.trace.chrome_format`` writes the file for Perfetto and Chrome.

    with trace.tracing(Path("run.json"), "eval_sim"):
        ...

    metronome trace run.json run.server.json -o all.json

Guaranteed:

* While tracing is off, a hook costs one check of ``on`` and allocates nothing; no file is written.
* While it is on, a record is packed into memory that was allocated and touched beforehand. Nothing
  is written to disk while recording. When the memory is full, the oldest records are overwritten,
  and the file contains their number.
* The file is written when the block ends, in full or not at all; also after an exception, SIGINT or
  SIGTERM. After SIGKILL there is none.

Code that has measured the times already calls ``if trace.on: trace.add(...)``; other code uses
``with trace.span("..."):``. There is one trace per process, as there is one log, so that it need
not be passed through the layers.
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

from runtime.trace.buffer import CAPACITY, EventKind, FlowPosition, TraceBuffer, TraceError

logger = logging.getLogger(__name__)

_NUMBER_BITS = 24
KEY_BITS = 64 - _NUMBER_BITS


class _Span:
    """A context manager that adds a record of its duration."""

    __slots__ = ("_begin_ns", "_name", "_number")

    def __init__(self, name: str, number: int) -> None:
        self._name, self._number = name, number

    def __enter__(self) -> None:
        self._begin_ns = time.monotonic_ns()

    def __exit__(self, *_: object) -> None:
        add(self._name, self._begin_ns, time.monotonic_ns(), self._number)


class _NoSpan:
    """The context manager that ``span`` returns while tracing is off; it does nothing."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


on = False
"""Whether this process is traced. Only ``tracing`` changes it."""
_trace: TraceBuffer | None = None
_NO_SPAN = _NoSpan()


def add(
    name: str,
    begin_ns: int,
    end_ns: int,
    number: int = -1,
    *,
    value: int = 0,
    flow: int = 0,
    kind: EventKind = EventKind.SPAN,
    position: FlowPosition = FlowPosition.NONE,
) -> None:
    """Call ``TraceBuffer.add`` of this process' trace; do nothing while tracing is off."""
    if _trace is not None:
        _trace.add(
            name, begin_ns, end_ns, number, value=value, flow=flow, kind=kind, position=position
        )


def span(name: str, number: int = -1) -> _Span | _NoSpan:
    """Return a context manager that records the duration of its block."""
    return _Span(name, number) if on else _NO_SPAN


def add_instant(name: str) -> None:
    """Record that an event happened now."""
    if on:
        now_ns = time.monotonic_ns()
        add(name, now_ns, now_ns, value=1, kind=EventKind.INSTANT)


def add_tick(number: int, begin_ns: int, late_ns: int, missed: int) -> None:
    """Record a control loop's tick that ends now.

    Args:
        number: The tick.
        begin_ns: When its step was called.
        late_ns: The time at which its step returned, minus its deadline.
        missed: Number of ticks skipped after it.
    """
    now_ns = time.monotonic_ns()
    add("tick", begin_ns, now_ns, number, value=late_ns, kind=EventKind.TICK)
    if missed:
        add("missed", now_ns, now_ns, value=missed, kind=EventKind.INSTANT)


def new_key() -> int:
    """Return a random key that makes a session's request ids unique; 0 while tracing is off."""
    return secrets.randbits(KEY_BITS) | 1 if on else 0


def read_key(value: object) -> int:
    """Return the key in a peer's handshake, which is not trusted; 0 if it is no key."""
    return value if type(value) is int and 0 <= value < 1 << KEY_BITS else 0


def flow_id(key: int, request_id: int) -> int:
    """Return a request's id in all processes; 0 without a key."""
    return key << _NUMBER_BITS | request_id & (1 << _NUMBER_BITS) - 1 if key else 0


def _number(flow: int) -> int:
    return flow & (1 << _NUMBER_BITS) - 1


def add_send(begin_ns: int, flow: int) -> None:
    """Record a client's request whose sending began at ``begin_ns`` and ends now."""
    add(
        "publish",
        begin_ns,
        time.monotonic_ns(),
        _number(flow),
        flow=flow,
        position=FlowPosition.FIRST,
    )


def add_reply(stages_ns: Mapping[str, int], begin_ns: int, received_ns: int, flow: int) -> None:
    """Record a client's request whose reply is unpacked now.

    Only the durations of the server's stages are known here: they are drawn one after another, in
    their order. Their real times are in the server's own trace.

    Args:
        stages_ns: Duration of each stage.
        begin_ns: When the request was sent.
        received_ns: When the reply arrived.
        flow: The request's ``flow_id``.
    """
    now_ns = time.monotonic_ns()
    number = _number(flow)
    add("unpack", received_ns, now_ns, number, flow=flow, position=FlowPosition.LAST)
    end_ns = begin_ns + sum(stages_ns.values())
    add("request", begin_ns, end_ns, number, flow=flow, kind=EventKind.REQUEST)
    _add_stages(stages_ns, begin_ns, end_ns, flow=flow, kind=EventKind.PART)


def add_inference(stages_ns: Mapping[str, int], begin_ns: int, tick: int) -> None:
    """Record an inference of a policy in this process that ends now."""
    now_ns = time.monotonic_ns()
    add("infer_call", begin_ns, now_ns, tick)
    _add_stages(stages_ns, begin_ns, now_ns, flow=0, kind=EventKind.SPAN)


def add_served(
    stages_ns: Mapping[str, int], arrived_ns: int, taken_ns: int, reply_ns: int, flow: int
) -> None:
    """Record a request whose reply a server has sent now.

    Args:
        stages_ns: Duration of each of the policy's stages.
        arrived_ns: When the request was received.
        taken_ns: When its processing began.
        reply_ns: When the policy returned.
        flow: The request's ``flow_id``.
    """
    now_ns = time.monotonic_ns()
    number = _number(flow)
    add("server_wait", arrived_ns, taken_ns, number, flow=flow, kind=EventKind.PART)
    add("serve", taken_ns, now_ns, number, flow=flow, position=FlowPosition.MIDDLE)
    _add_stages(stages_ns, taken_ns, reply_ns, flow=flow, kind=EventKind.SPAN)
    add("answer", reply_ns, now_ns, number, flow=flow)


def _add_stages(
    stages_ns: Mapping[str, int], at_ns: int, end_ns: int, *, flow: int, kind: EventKind
) -> None:
    for name, duration_ns in stages_ns.items():
        # Durations may come from a peer: a stage is cut to the span that contains it.
        until_ns = min(max(at_ns, at_ns + duration_ns), end_ns)
        add(name, at_ns, until_ns, _number(flow) if flow else -1, flow=flow, kind=kind)
        at_ns = until_ns


def sibling(path: Path | None, process: str) -> Path | None:
    """Return the trace file of another process of the run: ``run.server.json`` for ``run.json``."""
    return None if path is None else path.with_name(f"{path.stem}.{process}{path.suffix}")


@contextlib.contextmanager
def tracing(path: Path | None, process: str, *, capacity: int = CAPACITY) -> Iterator[None]:
    """Trace this process until the block ends, then write ``path``.

    Within the block SIGTERM raises ``SystemExit``, unless the process has its own handler.

    Args:
        path: The trace file; None for no trace.
        process: The process' name in the viewer.
        capacity: Number of records kept.

    Raises:
        TraceError: ``path`` cannot be written.
        ValueError: This process is traced already.
    """
    global on, _trace
    if path is None:
        yield
        return
    if _trace is not None:
        raise ValueError("tracing: this process is traced already")
    _must_be_writable(path)
    _trace, on = TraceBuffer(process, capacity), True
    try:
        with _exit_on_sigterm():
            yield
    finally:
        ended, _trace, on = _trace, None, False
        _write(path, ended)


def _write(path: Path, ended: TraceBuffer) -> None:
    from runtime.trace import chrome_format

    try:
        chrome_format.write(path, ended.records())
    except OSError as error:
        # A lost trace must not change the outcome of the traced work.
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
def _exit_on_sigterm() -> Iterator[None]:
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _raise_system_exit)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _raise_system_exit:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _raise_system_exit(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    from policies.standard_streams import run_command
    from runtime.trace.merge import main

    raise SystemExit(run_command(main))
