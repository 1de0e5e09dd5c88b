"""Traces as files: the JSON that ui.perfetto.dev and chrome://tracing open.

The format is the "JSON Object Format" of Google's "Trace Event Format" document: ``traceEvents``,
times in microseconds, and ``otherData`` for what is ours to say. Events written: X (time spent in a
thread), b/e (parts of a request), s/t/f (the arrow that follows a request from process to process),
i (a moment), C (a loop's lateness) and M (names).

Times are CLOCK_MONOTONIC, which all processes between one boot and the next share: files of one
host fit together. Two hosts' clocks have nothing in common, so their files are not put together.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from policies.command_line import CommandLine
from runtime.trace.buffer import EventKind, FlowPosition, Recorded
from runtime.trace.recorder import TraceError

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
    """Write ``path``, whole or not at all.

    Raises:
        OSError: It cannot be written.
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
    _save(path, list(events(recorded, os.getpid())), metadata)


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


def read(path: Path) -> dict[str, Any]:
    """A trace file, checked.

    Raises:
        TraceError: It is none; says where.
    """
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        check(trace)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TraceError) as error:
        raise TraceError(f"{path}: {error}") from error
    return dict(trace)


def check(trace: Any) -> None:
    """Whether Perfetto and Chrome will take it: the fields that each kind of event needs.

    Raises:
        TraceError: They will not; names event, got and expected.
    """
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise TraceError("got no traceEvents, expected an object with a list of them")
    open_parts: dict[tuple[Any, ...], int] = {}
    for index, event in enumerate(trace["traceEvents"]):
        if not isinstance(event, dict):
            raise TraceError(f"event {index}: got {event!r:.80}, expected an object")
        ph = event.get("ph")
        needs = {**_ALL, **_NEEDS[ph]} if ph in _NEEDS else None
        if needs is None:
            raise TraceError(f"event {index}: ph: got {ph!r}, expected one of {sorted(_NEEDS)}")
        for field, (holds, expected) in needs.items():
            if not holds(event.get(field)):
                raise TraceError(
                    f"event {index} ({event.get('name')!r}, ph {ph}): {field}: got "
                    f"{event.get(field)!r:.80}, expected {expected}"
                )
        if ph in ("b", "e"):
            key = (event["pid"], event["id2"]["local"], event["name"])
            open_parts[key] = open_parts.get(key, 0) + (1 if ph == "b" else -1)
    for (_, part, name), balance in open_parts.items():
        if balance:
            raise TraceError(f"{name!r} of {part}: got {balance:+d} b than e, expected as many")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 32


Need = tuple[Callable[[Any], bool], str]
_TIME: Need = (_is_time, "microseconds, 0 or more")
_ALL: dict[str, Need] = {
    "name": (_is_text, "a text"),
    "pid": (_is_number, "a process"),
    "tid": (_is_number, "a thread"),
    "ts": _TIME,
}
_FLOW: dict[str, Need] = {"id": (_is_text, "a text"), "cat": (_is_text, "a text")}
_END: dict[str, Need] = {**_FLOW, "bp": (lambda value: value == "e", "'e'")}
_PART: dict[str, Need] = {
    "cat": (_is_text, "a text"),
    "id2": (lambda v: isinstance(v, dict) and _is_text(v.get("local")), "{'local': a text}"),
}
_NEEDS: Mapping[Any, dict[str, Need]] = {
    "X": {"dur": _TIME},
    "i": {"s": (lambda value: value in ("t", "p", "g"), "'t', 'p' or 'g'")},
    "C": {
        "args": (
            lambda v: isinstance(v, dict) and all(type(x) in (int, float) for x in v.values()),
            "numbers by name",
        )
    },
    "M": {
        "name": (lambda v: v in ("process_name", "thread_name"), "process_name or thread_name"),
        "args": (lambda v: isinstance(v, dict) and _is_text(v.get("name")), "{'name': a text}"),
    },
    "b": _PART,
    "e": _PART,
    "s": _FLOW,
    "t": _END,
    "f": _END,
}


def merge(paths: Sequence[Path], out: Path) -> None:
    """Put traces of one host on one time line.

    Raises:
        TraceError: One is no trace of ours, or of another clock than the first.
        OSError: ``out`` cannot be written.
    """
    merged: list[Event] = []
    about: list[Mapping[str, Any]] = []
    pids: set[int] = set()
    for path in paths:
        trace = read(path)
        other = trace.get("otherData")
        if not isinstance(other, dict) or "clock_id" not in other:
            raise TraceError(f"{path}: otherData.clock_id: got nothing, expected whose clock it is")
        if about and other["clock_id"] != about[0]["clock_id"]:
            raise TraceError(
                f"{path}: got the clock of {other.get('host')} ({other['clock_id']}), expected "
                f"that of {about[0].get('host')} ({about[0]['clock_id']}) as in {paths[0]}: two "
                "hosts' clocks, or one's before and after a boot, have no common time"
            )
        renamed = _apart({event["pid"] for event in trace["traceEvents"]}, pids)
        merged += ({**event, "pid": renamed[event["pid"]]} for event in trace["traceEvents"])
        about.append(other)
    merged.sort(key=lambda event: (event["ph"] != "M", event["ts"]))
    whole = {name: about[0].get(name) for name in ("host", "clock", "clock_id")}
    dropped = sum(int(other.get("dropped", 0)) for other in about)
    _save(out, merged, {**whole, "dropped": dropped, "merged": about})


def _apart(theirs: set[int], taken: set[int]) -> dict[int, int]:
    """Numbers for processes: their own, but where another container's has that already."""
    renamed = {}
    for pid in sorted(theirs):
        renamed[pid] = pid if pid not in taken else max(taken | theirs) + 1
        taken.add(renamed[pid])
    return renamed


def _save(path: Path, trace_events: list[Event], metadata: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write('{"traceEvents":[\n')
            file.write(",\n".join(json.dumps(event) for event in trace_events))
            file.write(f'\n],\n"displayTimeUnit":"ms",\n"otherData":{json.dumps(metadata)}}}\n')
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    cli = CommandLine(
        prog="python -m runtime.trace", description="Put traces of one host on one time line."
    )
    cli.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="files of --trace")
    cli.add_argument("-o", "--out", type=Path, required=True, help="for ui.perfetto.dev")
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m runtime.trace``. Returns the exit status."""
    args = parser().parse_args(argv)
    try:
        merge(args.traces, args.out)
    except (TraceError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
