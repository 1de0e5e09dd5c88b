"""Traces: whole, true to what was measured, and not there when they are not wanted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from policies.types import STAGES
from runtime.control.clock import ManualClock
from runtime.control.control_loop import ControlLoop
from runtime.eval_sim import cli as eval_sim
from runtime.server.server_process import ServerProcess
from runtime.trace import chrome_format, merge
from runtime.trace import recorder as trace
from runtime.trace.buffer import EventKind, FlowPosition, TraceBuffer, TraceError

TOY = "python:tests.runtime.toy_policy:make"
TICKS, EPISODES = 25, 2
EVALUATION = ["-e", "fake", f"--env.max_timesteps={TICKS}", "-n", str(EPISODES), "--videos", "0"]

Events = list[dict[str, Any]]


def load(path: Path) -> Events:
    events: Events = merge.read(path)["traceEvents"]
    assert_spans_nest(events)
    return events


def assert_spans_nest(events: Events) -> None:
    """What a viewer draws as boxes in boxes must be that; to the ns, which µs are given to."""
    open_until: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in events:
        if event["ph"] != "X":
            continue
        stack = open_until[event["pid"], event["tid"]]
        while stack and stack[-1] <= event["ts"] + 5e-4:
            stack.pop()
        end = event["ts"] + event["dur"]
        assert not stack or end <= stack[-1] + 1e-3, f"{event} overlaps what it is in"
        stack.append(end)


def durations_us(events: Events) -> dict[str, dict[str, float]]:
    """Request id to the durations of its parts, the whole under its own name."""
    began: dict[tuple[str, str], float] = {}
    lasted: dict[str, dict[str, float]] = defaultdict(dict)
    for event in events:
        if event["ph"] in ("b", "e"):
            flow, name = event["id2"]["local"], event["name"]
            if event["ph"] == "b":
                began[flow, name] = event["ts"]
            else:
                lasted[flow][name] = event["ts"] - began.pop((flow, name))
    assert not began
    return dict(lasted)


def named(events: Events, name: str, ph: str = "X") -> Events:
    return [e for e in events if e["name"] == name and e["ph"] == ph]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where an evaluation writes; its traces are elsewhere."""
    return tmp_path / "results"


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_served_evaluation_is_traced_on_both_sides(
    tmp_path: Path, folder: Path, transport: str
) -> None:
    ours, theirs, both = (tmp_path / f"{name}.json" for name in ("ours", "theirs", "both"))
    with ServerProcess(["-m", TOY, "--trace", str(theirs)]) as server:
        flags = ["-m", server.address, "--transport", transport, "--trace", str(ours)]
        assert eval_sim.main([*EVALUATION, *flags, "-o", str(folder)]) == 0
    client, served = load(ours), load(theirs)
    timing = json.loads((folder / "fake" / "fake.json").read_text())["timing"]

    ticks = named(client, "tick")
    assert [e["args"]["tick"] for e in ticks] == [*range(TICKS)] * EPISODES
    assert len(named(client, "episode")) == EPISODES
    assert len(named(client, "world_step")) == len(named(client, "execute")) == TICKS * EPISODES

    requests = durations_us(client)
    asked = 1 + EPISODES * 3  # a warm-up; 25 ticks, 10 of each chunk
    assert len(requests) == asked
    for parts in requests.values():
        assert parts.keys() == {"request", *STAGES}
        assert sum(parts[s] for s in STAGES) == pytest.approx(parts["request"], abs=0.01)
    # The evaluation's own report is of the same requests, but for the warm-up.
    reported = timing["request"]
    counted = sorted(parts["request"] / 1e6 for parts in list(requests.values())[1:])
    assert reported["count"] == len(counted) == asked - 1
    assert reported["max"] == pytest.approx(counted[-1], abs=2e-8)
    for stage in STAGES:
        longest = max(parts[stage] for parts in list(requests.values())[1:])
        assert timing["stages"][stage]["max"] == pytest.approx(longest / 1e6, abs=2e-8)

    assert Counter(e["name"] for e in served if e["ph"] == "X") == dict.fromkeys(
        ("serve", "preprocess", "infer", "postprocess", "answer"), asked
    )
    # The same requests, the same clock: an answer is computed while its asker waits.
    assert durations_us(served).keys() == requests.keys()
    whole = {e["id2"]["local"]: e["ts"] for e in named(client, "request", "b")}
    for serve, (flow, began_us) in zip(named(served, "serve"), whole.items(), strict=True):
        assert began_us <= serve["ts"]
        assert serve["ts"] <= began_us + requests[flow]["request"]

    assert merge.main([str(ours), str(theirs), "-o", str(both)]) == 0
    events = load(both)
    names = {e["args"]["name"] for e in named(events, "process_name", "M")}
    assert names == {"eval_sim", "policy server"}
    arrows = Counter(e["ph"] for e in events if e["ph"] in "stf")
    assert arrows == {"s": asked, "t": asked, "f": asked}
    for flow in whole:
        ends = [e["pid"] for e in events if e.get("id") == flow]
        assert len(ends) == 3
        assert ends[0] == ends[2] != ends[1]


def test_a_policy_in_process_shows_its_stages(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "run.json"
    flags = ["-m", TOY, "--trace", str(file), "-o", str(folder)]
    assert eval_sim.main([*EVALUATION, *flags]) == 0
    events = load(file)
    calls = named(events, "infer_call")
    assert len(calls) == 1 + EPISODES * 3  # a warm-up; 25 ticks, 10 of each chunk
    for stage, dur_us in {"preprocess": 1e-3, "infer": 2e-3, "postprocess": 3e-3}.items():
        assert [e["dur"] for e in named(events, stage)] == [dur_us] * len(calls)


def test_side_by_side_and_real_time_leave_a_file_per_process(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "many.json"
    flags = ["-m", TOY, "-o", str(folder), "--trace", str(file)]
    assert eval_sim.main([*EVALUATION, *flags, "--num_envs", "2"]) == 0
    assert len(list(tmp_path.glob("many.worker-*.json"))) == 2
    file = tmp_path / "real.json"
    assert eval_sim.main([*EVALUATION, *flags[:-1], str(file), "--realtime"]) == 0
    merged = tmp_path / "all.json"
    assert merge.main([str(file), str(tmp_path / "real.server.json"), "-o", str(merged)]) == 0
    events = load(merged)
    ticks = named(events, "tick")
    missed = sum(e["args"]["count"] for e in named(events, "missed", "i"))
    assert len(ticks) + missed == TICKS * EPISODES
    assert [e["args"]["us"] for e in named(events, "lateness", "C")] == [
        e["args"]["late_us"] for e in ticks
    ]


def test_a_robots_evaluation_is_traced_in_every_process(tmp_path: Path) -> None:
    robot = tmp_path / "robot.yaml"
    shipped = Path("configs/robot/dummy.yaml").read_text()
    robot.write_text(shipped.replace("(240, 320, 3)", "(24, 32, 3)"))
    command = [
        *(sys.executable, "eval_real.py", "-m", TOY, "-c", str(robot), "--yes", "--near", "100"),
        *("--max_timesteps", "20", "--video_fps", "0", "-o", str(tmp_path / "results")),
        *("--trace", str(tmp_path / "run.json")),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob("run*.json"))
    processes = {merge.read(file)["otherData"]["process"]: file for file in files}
    assert processes.keys() == {"eval_real", "control", "sensing", "policy server"}
    assert len(named(load(processes["eval_real"]), "rollout")) == 1

    control = load(processes["control"])
    ticks = [e["args"]["tick"] for e in named(control, "tick")]
    missed = sum(e["args"]["count"] for e in named(control, "missed", "i"))
    assert ticks[0] == 0
    assert ticks[-1] + 1 == len(ticks) + missed
    assert len(named(control, "send_action")) == len(named(control, "execute")) == len(ticks)
    asked = durations_us(load(processes["sensing"]))
    assert asked
    assert asked.keys() <= durations_us(load(processes["policy server"])).keys()
    assert merge.main([*map(str, files), "-o", str(tmp_path / "all.json")]) == 0
    load(tmp_path / "all.json")


def test_without_a_trace_there_is_no_file_and_no_allocation(tmp_path: Path) -> None:
    assert not trace.on
    with trace.tracing(None, "nobody"):
        assert not trace.on
        assert trace.span("a") is trace.span("b")
        assert trace.new_key() == 0
    loop = ControlLoop(ManualClock(), 0.02, capacity=10)

    def step(_: int) -> None:
        with trace.span("step"):
            trace.add_instant("nothing")

    loop.run(step, 100)
    files = [trace.__file__]
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        blocks = sys.getallocatedblocks()
        loop.run(step, 10_000)
        grown = sys.getallocatedblocks() - blocks
        after = tracemalloc.take_snapshot()
    finally:
        tracemalloc.stop()
    only = [tracemalloc.Filter(inclusive=True, filename_pattern=name) for name in files]
    held = after.filter_traces(only).compare_to(before.filter_traces(only), "filename")
    assert sum(stat.size_diff for stat in held) == 0
    assert grown < 100  # the snapshot itself, and nothing of 10,000 ticks
    assert not list(tmp_path.iterdir())


def test_when_memory_is_full_the_oldest_go_and_the_file_says_so(tmp_path: Path) -> None:
    file = tmp_path / "full.json"
    with trace.tracing(file, "test", capacity=10):
        for number in range(25):
            trace.add("a", number * 1000, number * 1000 + 500, number)
    written = merge.read(file)
    kept = [e["args"]["tick"] for e in written["traceEvents"] if e["ph"] == "X"]
    assert kept == [*range(15, 25)]
    about = written["otherData"]
    assert (about["recorded"], about["dropped"]) == (10, 15)
    assert "15 records were dropped" in about["note"]


def test_times_are_exact_to_the_nanosecond(tmp_path: Path) -> None:
    file, week_ns = tmp_path / "exact.json", 7 * 24 * 3600 * 1_000_000_000
    with trace.tracing(file, "test"):
        trace.add("a", week_ns + 1, week_ns + 124)
    event = named(load(file), "a")[0]
    assert round(event["ts"] * 1000) == week_ns + 1
    assert event["dur"] == 0.123


def test_threads_have_names_and_tracks_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "threads.json"
    with trace.tracing(file, "test"):
        trace.add_instant("here")
        other = threading.Thread(target=lambda: trace.add_instant("there"), name="second")
        other.start()
        other.join()
    events = load(file)
    tracks = {e["name"]: e["tid"] for e in events if e["ph"] == "i"}
    assert tracks["here"] == threading.get_native_id() != tracks["there"]
    names = {e["tid"]: e["args"]["name"] for e in named(events, "thread_name", "M")}
    assert names == {tracks["here"]: "MainThread", tracks["there"]: "second"}


def test_parts_that_begin_and_end_together_stay_inside_their_request() -> None:
    memory = TraceBuffer("test", 100)
    for name, begin_ns, end_ns, kind in [
        ("request", 10, 30, EventKind.REQUEST),
        ("pack", 10, 10, EventKind.PART),
        ("publish", 10, 20, EventKind.PART),
        ("unpack", 20, 30, EventKind.PART),
    ]:
        memory.add(name, begin_ns, end_ns, flow=7, kind=kind)
    memory.add("inner", 10, 20, flow=7, position=FlowPosition.FIRST)
    memory.add("outer", 10, 30)
    events = [e for e in chrome_format.events(memory.records(), 1) if e["ph"] != "M"]
    parts = [(e["name"], e["ph"]) for e in events if e["ph"] in "be"]
    assert parts == [
        *(("request", "b"), ("pack", "b"), ("pack", "e"), ("publish", "b"), ("publish", "e")),
        *(("unpack", "b"), ("unpack", "e"), ("request", "e")),
    ]
    assert [e["name"] for e in events if e["ph"] == "X"] == ["outer", "inner"]
    assert [e["ts"] for e in events if e["ph"] == "s"] == [0.01]


def test_stages_are_cut_to_the_span_that_contains_them(tmp_path: Path) -> None:
    """A server's durations are not trusted: neither negative nor endless ones break the file."""
    file = tmp_path / "odd.json"
    with trace.tracing(file, "test"):
        key = trace.new_key()
        now_ns = time.monotonic_ns()
        stages = {"preprocess": -5, "infer": 2**62, "postprocess": 2**62}
        trace.add_served(stages, now_ns, now_ns, now_ns, trace.flow_id(key, 3))
        trace.add_inference(stages, now_ns, 4)
    assert {e["name"] for e in load(file)} >= {"infer", "serve", "server_wait"}


@pytest.mark.parametrize("said", [None, True, -1, 1 << 40, "7", 1.5, [1]])
def test_an_invalid_key_is_ignored(said: object) -> None:
    assert trace.read_key(said) == 0
    assert trace.flow_id(trace.read_key(said), 5) == 0


def _write(path: Path, **other: Any) -> None:
    with trace.tracing(path, path.stem):
        trace.add_instant("here")
    written = json.loads(path.read_text())
    written["otherData"] |= other
    path.write_text(json.dumps(written))


def test_processes_of_one_number_are_kept_apart(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    _write(one)
    _write(two)
    merge.merge([one, two], tmp_path / "all.json")
    whole = merge.read(tmp_path / "all.json")
    names = {e["pid"]: e["args"]["name"] for e in named(whole["traceEvents"], "process_name", "M")}
    assert sorted(names.values()) == ["one", "two"]
    assert [other["process"] for other in whole["otherData"]["merged"]] == ["one", "two"]


def test_two_hosts_are_not_put_on_one_time_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    _write(one)
    _write(two, host="elsewhere", clock_id="another boot")
    assert merge.main([str(one), str(two), "-o", str(tmp_path / "all.json")]) == 2
    error = capsys.readouterr().err
    assert "two.json: got the clock of elsewhere (another boot), expected that of" in error
    assert not (tmp_path / "all.json").exists()


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"ph": "Q"}, "ph: got 'Q', expected one of"),
        ({"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": 1}, "dur: got None"),
        ({"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": -1, "dur": 1}, "ts: got -1"),
        ({"ph": "X", "name": "a", "pid": "1", "tid": 1, "ts": 1, "dur": 1}, "pid: got '1'"),
        ({"ph": "i", "name": "a", "pid": 1, "tid": 1, "ts": 1, "s": "x"}, "s: got 'x'"),
        ({"ph": "f", "name": "a", "cat": "c", "pid": 1, "tid": 1, "ts": 1, "id": "1"}, "bp"),
        (
            {
                "ph": "b",
                "name": "a",
                "cat": "c",
                "pid": 1,
                "tid": 1,
                "ts": 1,
                "id2": {"local": "1"},
            },
            "got +1 b than e",
        ),
        ("text", "got 'text', expected an object"),
    ],
)
def test_events_that_a_viewer_would_reject_are_errors(
    tmp_path: Path, event: dict[str, Any], message: str
) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"traceEvents": [event]}))
    with pytest.raises(TraceError) as caught:
        merge.read(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_process_leaves_its_trace(tmp_path: Path, number: signal.Signals) -> None:
    file = tmp_path / "cut.json"
    code = (
        "import sys, signal; from pathlib import Path\n"
        "from runtime.trace import recorder as trace\n"
        "with trace.tracing(Path(sys.argv[1]), 'cut'):\n"
        "    trace.add_instant('begun'); print(flush=True); signal.pause()\n"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert not file.exists()
        process.send_signal(number)
        assert process.wait(30) != 0
    assert len(named(load(file), "begun", "i")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cut.json"]


def test_an_unwritable_path_is_an_error_before_the_run(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    flags = ["-m", TOY, "--trace", str(tmp_path / "file" / "t.json"), "-o", str(folder)]
    assert eval_sim.main([*EVALUATION, *flags]) == eval_sim.BAD_INPUT
    assert "--trace: " in capsys.readouterr().err
    with pytest.raises(TraceError, match="is a folder"), trace.tracing(tmp_path, "test"):
        pass


def test_a_disk_that_is_full_at_the_end_costs_the_trace_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(chrome_format, "write", full)
    with trace.tracing(tmp_path / "t.json", "test"):
        pass
    assert not trace.on
    assert "the trace was not written" in caplog.text


def test_one_trace_per_process(tmp_path: Path) -> None:
    with (
        trace.tracing(tmp_path / "t.json", "test"),
        pytest.raises(ValueError, match="traced already"),
        trace.tracing(tmp_path / "u.json", "test"),
    ):
        pass
