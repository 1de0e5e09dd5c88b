"""Traces as files: the JSON that ui.perfetto.dev and chrome://tracing open.

The format is the "JSON Object Format" of Google's "Trace Event Format" document: ``traceEvents``,
times in microseconds, and ``otherData`` for what is ours to say. Events written: X (time spent in a
thread), b/e (parts of a request), s/t/f (the arrow that follows a request from process to process),
i (a moment), C (a loop's lateness) and M (names).

Times are CLOCK_MONOTONIC, which all processes between one boot and the next share: files of one
host fit together. Two hosts' clocks have nothing in common, so their files are not put together.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.trace.buffer import EventKind, FlowPosition, Recorded

CLOCK = "CLOCK_MONOTONIC"
Event = dict[str, Any]

_LINKS: Mapping[int, str] = {
    FlowPosition.FIRST: "s",
    FlowPosition.ON_THE_WAY: "t",
    FlowPosition.LAST: "f",
}
_NUMBERED = {"episode": "seed", "rollout": "seed"}
"""What a span's number is, where it is neither a request nor a tick."""


def write(path: Path, recorded: Recorded) -> None:
    """Write what this process recorded.

    Raises:
        OSError: As ``save``.
    """
    metadata = {
        "process": recorded.process,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "clock": CLOCK,
        "clock_id": clock_id(),
        "recorded": len(recorded.records),
        "dropped": recorded.dropped,
    }
    if recorded.dropped:
        metadata["note"] = f"the oldest {recorded.dropped} records were dropped: memory was full"
    save(path, list(events(recorded, os.getpid())), metadata)


def clock_id() -> str:
    """Tells whether two processes read the same CLOCK_MONOTONIC: one boot, one time namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"host {socket.gethostname()}"
    try:
        return f"{boot} {os.readlink('/proc/self/ns/time')}"  # noqa: PTH115  no path: a name
    except OSError:
        return boot


def events(recorded: Recorded, pid: int) -> Iterator[Event]:
    """What is recorded, as events in the order of their time, names first."""
    yield _name("process_name", pid, 0, recorded.process)
    for thread, name in recorded.threads.items():
        yield _name("thread_name", pid, thread, name)
    spans: list[tuple[int, int, Event]] = []
    others: list[tuple[int, Event]] = []
    ends: list[tuple[int, Event]] = []
    for row in recorded.records.tolist():  # plain numbers: a field at a time is slow
        _sort_in(row, recorded.names, pid, (spans, others, ends))
    # Of spans that begin together the longer is around the others. A request's own end comes after
    # its parts' that end with it; they are recorded in their order, and stay in it.
    spans.sort(key=lambda item: item[:2])
    timed = [*((begin_ns, event) for begin_ns, _, event in spans), *others, *ends]
    timed.sort(key=lambda item: item[0])
    for _, event in timed:
        yield event


def _sort_in(
    row: tuple[int, ...],
    names: Sequence[str],
    pid: int,
    into: tuple[list[tuple[int, int, Event]], list[tuple[int, Event]], list[tuple[int, Event]]],
) -> None:
    spans, others, ends = into
    begin_ns, end_ns, flow, number, value, name_index, kind, link, thread = row
    name, duration_ns = names[name_index], end_ns - begin_ns
    event: Event = {
        "name": name,
        "cat": "request" if flow else "loop",
        "pid": pid,
        "tid": thread,
        "ts": begin_ns / 1e3,
    }
    args: Event = {}
    if number >= 0:
        args["request" if flow else _NUMBERED.get(name, "tick")] = number
    if kind in (EventKind.REQUEST, EventKind.PART):
        # Requests overlap, within one thread, too: each has a track of its own.
        event["id2"] = {"local": f"{flow:#x}"}
        others.append((begin_ns, {**event, "ph": "b", "args": args}))
        end = {**event, "ph": "e", "ts": end_ns / 1e3}
        (ends if kind == EventKind.REQUEST else others).append((end_ns, end))
    elif kind == EventKind.INSTANT:
        others.append((begin_ns, {**event, "ph": "i", "s": "t", "args": {"count": value}}))
    else:
        if kind == EventKind.TICK:
            args["late_us"] = late_us = value / 1e3
            counter = {**event, "name": "lateness", "ph": "C", "args": {"us": late_us}}
            others.append((begin_ns, counter))
        span = {**event, "ph": "X", "dur": duration_ns / 1e3, "args": args}
        spans.append((begin_ns, -duration_ns, span))
    if flow and (ph := _LINKS.get(link)):
        # Where its span begins: of these moments each is the cause of the next, whichever ends
        # first. A server may be at work before the call that woke it has returned.
        arrow = {**event, "name": "request", "ph": ph, "id": f"{flow:#x}"}
        others.append((begin_ns, arrow if ph == "s" else {**arrow, "bp": "e"}))


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def save(path: Path, trace_events: list[Event], metadata: Mapping[str, Any]) -> None:
    """Write ``path``, whole or not at all.

    Raises:
        OSError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write('{"traceEvents":[\n')
            file.write(",\n".join(json.dumps(event) for event in trace_events))
            file.write(f'\n],\n"displayTimeUnit":"ms",\n"otherData":{json.dumps(metadata)}}}\n')
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
