"""``metronome trace``: check the trace files of one host and merge them into one."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from policies.command_line import CommandLine
from policies.flag_builder import Flag, add_flags, from_flags
from runtime.trace.buffer import TraceError
from runtime.trace.chrome_format import Event, save


def read(path: Path) -> dict[str, Any]:
    """Read and check a trace file.

    Raises:
        TraceError: The file cannot be read, or is not a trace; the message names the event.
    """
    try:
        trace = json.loads(path.read_text(encoding="utf-8"))
        check(trace)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TraceError) as error:
        raise TraceError(f"{path}: {error}") from error
    return dict(trace)


def check(trace: Any) -> None:
    """Check that each event has the fields that Perfetto and Chrome require.

    Raises:
        TraceError: A field is missing or wrong; the message names event, got and expected.
    """
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise TraceError("got no traceEvents, expected an object with a list of them")
    open_parts: dict[tuple[Any, ...], int] = {}
    for index, event in enumerate(trace["traceEvents"]):
        if not isinstance(event, dict):
            raise TraceError(f"event {index}: got {event!r:.80}, expected an object")
        ph = event.get("ph")
        needs = {**_COMMON_FIELDS, **_FIELDS[ph]} if ph in _FIELDS else None
        if needs is None:
            raise TraceError(f"event {index}: ph: got {ph!r}, expected one of {sorted(_FIELDS)}")
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


FieldCheck = tuple[Callable[[Any], bool], str]
_TIME: FieldCheck = (_is_time, "microseconds, 0 or more")
_COMMON_FIELDS: dict[str, FieldCheck] = {
    "name": (_is_text, "a text"),
    "pid": (_is_number, "a process"),
    "tid": (_is_number, "a thread"),
    "ts": _TIME,
}
_FLOW_FIELDS: dict[str, FieldCheck] = {"id": (_is_text, "a text"), "cat": (_is_text, "a text")}
_FLOW_END: dict[str, FieldCheck] = {**_FLOW_FIELDS, "bp": (lambda value: value == "e", "'e'")}
_PART: dict[str, FieldCheck] = {
    "cat": (_is_text, "a text"),
    "id2": (lambda v: isinstance(v, dict) and _is_text(v.get("local")), "{'local': a text}"),
}
_FIELDS: Mapping[Any, dict[str, FieldCheck]] = {
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
    "s": _FLOW_FIELDS,
    "t": _FLOW_END,
    "f": _FLOW_END,
}


def merge(paths: Sequence[Path], out: Path) -> None:
    """Merge traces of one host into one file, on one time line.

    Args:
        paths: The trace files.
        out: The merged file.

    Raises:
        TraceError: A file is not a trace of this package, or its clock is not the first one's.
        OSError: ``out`` cannot be written.
    """
    merged: list[Event] = []
    about: list[Mapping[str, Any]] = []
    pids: set[int] = set()
    for path in paths:
        trace = read(path)
        other = trace.get("otherData")
        if not isinstance(other, dict) or "clock_id" not in other:
            raise TraceError(
                f"{path}: otherData.clock_id: got nothing, expected the id of its clock"
            )
        if about and other["clock_id"] != about[0]["clock_id"]:
            raise TraceError(
                f"{path}: got the clock of {other.get('host')} ({other['clock_id']}), expected "
                f"that of {about[0].get('host')} ({about[0]['clock_id']}) as in {paths[0]}: two "
                "hosts' clocks, or one host's before and after a boot, are unrelated"
            )
        renamed = _unique_pids({event["pid"] for event in trace["traceEvents"]}, pids)
        merged += ({**event, "pid": renamed[event["pid"]]} for event in trace["traceEvents"])
        about.append(other)
    merged.sort(key=lambda event: (event["ph"] != "M", event["ts"]))
    whole = {name: about[0].get(name) for name in ("host", "clock", "clock_id")}
    dropped = sum(int(other.get("dropped", 0)) for other in about)
    save(out, merged, {**whole, "dropped": dropped, "merged": about})


def _unique_pids(theirs: set[int], taken: set[int]) -> dict[int, int]:
    """Return a process id for each of ``theirs``: itself, or a new one if it is in ``taken``.

    Processes in different containers may have the same id.
    """
    renamed = {}
    for pid in sorted(theirs):
        renamed[pid] = pid if pid not in taken else max(taken | theirs) + 1
        taken.add(renamed[pid])
    return renamed


@dataclass(frozen=True, slots=True)
class MergeCommand:
    """The arguments of ``metronome trace``."""

    traces: Annotated[
        tuple[Path, ...], Flag("files written by --trace", positional=True, metavar="TRACE")
    ]
    out: Annotated[Path, Flag("the merged file, for ui.perfetto.dev", "-o")]


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one argument per flag of ``MergeCommand``."""
    cli = CommandLine(
        prog="metronome trace", description="Merge the trace files of one host into one file."
    )
    add_flags(cli, MergeCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Merge the files; return the exit status: 0, or 2 for bad input."""
    command = from_flags(MergeCommand, parser().parse_args(argv))
    try:
        merge(command.traces, command.out)
    except (TraceError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0
