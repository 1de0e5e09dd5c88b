"""Writes traces as JSON for ui.perfetto.dev and chrome://tracing.

The format is the "JSON Object Format" of Google's "Trace Event Format" document: ``traceEvents``,
with times in microseconds, and ``otherData`` for metadata. The events are X (time spent in a
thread), b/e (parts of a request), s/t/f (the arrow that follows a request through the processes),
i (a point in time), C (a loop's lateness) and M (names).

Times are CLOCK_MONOTONIC, which all processes of a host share until its next boot: their files can
be merged. Files of different hosts cannot, for their clocks are unrelated.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.trace.buffer import EventKind, FlowPosition, TraceRecords

CLOCK = "CLOCK_MONOTONIC"
Event = dict[str, Any]

_FLOW_PHASES: Mapping[int, str] = {
    FlowPosition.FIRST: "s",
    FlowPosition.MIDDLE: "t",
    FlowPosition.LAST: "f",
}
_NUMBER_NAMES = {"episode": "seed", "rollout": "seed"}
"""The meaning of a span's number, if it is neither a request's nor a tick's."""


def write(path: Path, records: TraceRecords) -> None:
    """Write the records of this process to ``path``.

    Raises:
        OSError: The file cannot be written.
    """
    metadata = {
        "process": records.process,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "clock": CLOCK,
        "clock_id": clock_id(),
        "recorded": len(records.records),
        "dropped": records.dropped,
    }
    if records.dropped:
        metadata["note"] = f"the oldest {records.dropped} records were dropped: memory was full"
    save(path, list(events(records, os.getpid())), metadata)


def clock_id() -> str:
    """Return an id of CLOCK_MONOTONIC: equal for equal boots and time namespaces."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = f"host {socket.gethostname()}"
    try:
        return f"{boot} {os.readlink('/proc/self/ns/time')}"  # noqa: PTH115  no path: a name
    except OSError:
        return boot


def events(records: TraceRecords, pid: int) -> Iterator[Event]:
    """Convert records to events: the names first, then the others in the order of time."""
    yield _name("process_name", pid, 0, records.process)
    for thread, name in records.threads.items():
        yield _name("thread_name", pid, thread, name)
    spans: list[tuple[int, int, Event]] = []
    others: list[tuple[int, Event]] = []
    ends: list[tuple[int, Event]] = []
    for row in records.records.tolist():  # converting field by field would be slow
        _append_events(row, records.names, pid, (spans, others, ends))
    # Of spans with the same begin the longest comes first, for it contains the others. The end of a
    # request comes after its parts' ends at the same time; stable sorts keep that order.
    spans.sort(key=lambda item: item[:2])
    timed = [*((begin_ns, event) for begin_ns, _, event in spans), *others, *ends]
    timed.sort(key=lambda item: item[0])
    for _, event in timed:
        yield event


def _append_events(
    row: tuple[int, ...],
    names: Sequence[str],
    pid: int,
    lists: tuple[list[tuple[int, int, Event]], list[tuple[int, Event]], list[tuple[int, Event]]],
) -> None:
    spans, others, ends = lists
    begin_ns, end_ns, flow, number, value, name_index, kind, position, thread = row
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
        args["request" if flow else _NUMBER_NAMES.get(name, "tick")] = number
    if kind in (EventKind.REQUEST, EventKind.PART):
        # Requests overlap, even within a thread: each gets a track of its own.
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
    if flow and (ph := _FLOW_PHASES.get(position)):
        # The arrow joins the begins of spans, which are always in causal order. Their ends are not:
        # a server may work on a request before the client's sending call has returned.
        arrow = {**event, "name": "request", "ph": ph, "id": f"{flow:#x}"}
        others.append((begin_ns, arrow if ph == "s" else {**arrow, "bp": "e"}))


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def save(path: Path, trace_events: list[Event], metadata: Mapping[str, Any]) -> None:
    """Write a trace file in full or not at all, by renaming a temporary file.

    Raises:
        OSError: The file cannot be written.
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
