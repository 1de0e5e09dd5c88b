"""The harness of the benchmarks: what it verifies, what it counts, what it calls exceeded."""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from bench import budgets, compare
from bench.contest import Contest, Pair, contest, timed
from bench.contestant import HOMES, Absent, find, payloads_of
from bench.paced import paced
from bench.payload import PAYLOADS, Sink, Source
from bench.records import Records

two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="a process each on two cores"
)


def test_every_home_holds_the_contestants_it_is_listed_for() -> None:
    for name in HOMES:
        try:
            assert find(name).name == name
        except Absent as error:
            assert "not installed" in str(error)


def test_an_unknown_contestant_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"got 'udp', expected one of .*'floor'"):
        find("udp")


@pytest.mark.parametrize("payload", PAYLOADS)
def test_verify_accepts_the_same_bytes_only(payload: str) -> None:
    source, sink = Source(PAYLOADS[payload]), Sink(PAYLOADS[payload])
    source.verify(lambda: source.take(sink.take(source.arrays)))

    def one_byte_lost() -> None:
        arrays = {name: array.copy() for name, array in source.arrays.items()}
        arrays["state"].view(np.uint8)[-1] ^= 1
        source.take(sink.take(arrays))

    with pytest.raises(AssertionError, match="not what the bytes sent give"):
        source.verify(one_byte_lost)


def test_an_exchange_is_not_verified_by_yesterdays_bytes() -> None:
    source, sink = Source(PAYLOADS["1"]), Sink(PAYLOADS["1"])
    source.verify(lambda: source.take(sink.take(source.arrays)))
    stale = {name: array.copy() for name, array in source.arrays.items()}
    stale["state"][0] = -1.0
    with pytest.raises(AssertionError):
        source.verify(lambda: source.take(sink.take(stale)))


real_contest = contest
OURS = tuple(name for name, home in HOMES.items() if "peers" not in home)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("name", HOMES)
def test_compare_takes_a_payload_or_says_which_ones(name, payload, capsys, monkeypatch) -> None:
    """Before anything starts: a contestant that got another payload would crash or hang."""
    started = []

    @contextmanager
    def contest(names, payload, **_):
        started.append((names, payload))
        yield Contest(PAYLOADS[payload])

    monkeypatch.setattr(compare, "contest", contest)
    with pytest.raises(SystemExit) as ended:
        compare.main(["--only", name.replace(" ", "-"), "--payload", payload])
    said = capsys.readouterr().err.splitlines()
    if payload in payloads_of(name):
        assert (started, ended.value.code, said) == ([([name], payload)], 1, [])
    else:
        assert (started, ended.value.code) == ([], 2)
        assert said[-1].endswith(
            f"payload: got {payload!r} for {name!r}, which takes only {list(payloads_of(name))}"
        )
        with pytest.raises(ValueError, match="which takes only"), real_contest([name], payload):
            pass


@pytest.mark.alone
@pytest.mark.long
@two_cores
@pytest.mark.parametrize("payload", ["64B", "2"])
def test_ours_exchange_every_payload_that_they_say(payload: str) -> None:
    names = [name for name in OURS if payload in payloads_of(name)]
    with contest(names, payload) as running:
        assert not running.absent
        samples = running.rounds(blocks=1, block=3, block_s=1.0)
    assert {name: values.size for name, values in samples.items()} == dict.fromkeys(names, 3)


def test_compare_by_default_takes_all_that_exchange_the_payload(monkeypatch, capsys) -> None:
    asked = []

    @contextmanager
    def contest(names, payload, **_):
        asked.append(names)
        yield Contest(PAYLOADS[payload], absent={"floor": "not today"})

    monkeypatch.setattr(compare, "contest", contest)
    with pytest.raises(SystemExit):
        compare.main(["--payload", "64B"])
    assert "ring fused" in asked[0]
    assert "policy shm" not in asked[0]
    assert capsys.readouterr().out == "floor                   absent: not today\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "udp"], r"contestant: got 'udp', expected one of .*'floor'"),
        (["--only", "floor,"], r"contestant: got '', expected one of"),
        (["--payload", "3"], r"--payload: invalid choice: '3'"),
        (["--blocks", "0"], r"--blocks: got '0', expected a whole number, 1 or more"),
        (["--block", "-1"], r"--block: got '-1', expected a whole number, 1 or more"),
        (["--block_s", "nan"], r"--block_s: got 'nan', expected a positive number of seconds"),
        (["--block_s", "x"], r"--block_s: got 'x', expected a positive number of seconds"),
    ],
)
def test_compare_refuses_in_one_line(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.alone
@two_cores
@pytest.mark.parametrize(
    ("name", "payload"),
    [("floor", "1"), ("shm spin", "1"), ("shm block", "64B"), ("ring", "64B"), ("zmq", "1")],
)
def test_contestants_exchange_every_byte(name: str, payload: str) -> None:
    with contest([name], payload) as running:
        assert not running.absent
        with running.turn(name) as exchange:
            assert len(timed(exchange, 5, 10.0)) == 5


@two_cores
def test_a_missing_package_is_reported_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HOMES, "nowhere", "bench.peers.nowhere")
    with contest(["floor", "nowhere"], "64B") as running:
        assert running.pairs.keys() == {"floor"}
    assert "not installed" in running.absent["nowhere"]
    records = Records()
    records.absent["64 B/nowhere"] = running.absent["nowhere"]
    assert "nowhere                 absent: not installed" in records.table("64 B")


def test_a_lost_message_costs_its_own_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.contest.TURN_S", 0.05)

    class Server:
        def pause(self) -> None: ...

        resume = pause

    source, sink = Source(PAYLOADS["64B"]), Sink(PAYLOADS["64B"])
    never = threading.Event()
    fine = Pair(Server(), source, lambda: source.take(sink.take(source.arrays)))
    stuck = Pair(Server(), source, never.wait)
    running = Contest(PAYLOADS["64B"], pairs={"fine": fine, "stuck": stuck})
    samples = running.rounds(blocks=2, block=3, block_s=1.0)
    assert samples.keys() == {"fine"}
    assert samples["fine"].size == 6
    assert "did not end within" in running.absent["stuck"]


def test_blocks_alternate() -> None:
    order: list[str] = []

    class Quiet(Contest):
        @contextmanager
        def turn(self, name, **_):
            yield lambda: order.append(name)

    pairs = dict.fromkeys(("a", "b"), Pair(None, None, None))
    samples = Quiet(PAYLOADS["64B"], pairs=pairs).rounds(blocks=2, block=2, block_s=10.0)
    assert order == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert {name: values.size for name, values in samples.items()} == {"a": 4, "b": 4}


def test_a_stall_counts_for_everything_that_fell_due_meanwhile() -> None:
    """One exchange of 50 ms at 1 kHz: a closed loop would show one late exchange."""
    calls = 0

    def stall_once() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            until = time.perf_counter() + 0.05
            while time.perf_counter() < until:
                pass

    latencies = paced(stall_once, 1000.0, 30)
    assert latencies[0] >= 50_000
    assert all(latency >= 50_000 - 1000 * n for n, latency in enumerate(latencies))


def test_budgets_are_ratios_of_one_run_and_nothing_is_guessed() -> None:
    records = Records()
    records.add("1 image", {"floor": np.full(10, 100.0), "shm": np.full(10, 150.0)})
    records.values["idle, %"] = 0.5
    listed = [
        budgets.Budget("met", "1 image/shm", 2.0, ("1 image/floor",)),
        budgets.Budget("missed", "1 image/shm", 1.3, ("1 image/floor", "1 image/absent")),
        budgets.Budget("distance", "1 image/shm", 60.0, ("1 image/floor",), minus=True),
        budgets.Budget("alone", "idle, %", 1.0),
        budgets.Budget("unmeasured", "4 images/shm", 1.0, ("4 images/floor",)),
    ]
    assert [budget.value(records) for budget in listed] == [1.5, 1.5, 50.0, 0.5, None]
    table, exceeded = budgets.report(listed, records)
    assert exceeded == ["missed: got 1.5, at most 1.3"]
    assert table.count("EXCEEDED") == 1


def test_the_budgets_file_names_contestants_that_exist() -> None:
    groups = ("64 B", "1 image", "2 images", "4 images")
    keys = [key for budget in budgets.load() for key in (budget.of, *budget.over)]
    named = [key.rpartition("/")[2] for key in keys if key.rpartition("/")[0] in groups]
    assert named
    assert set(named) <= set(HOMES)


def test_records_survive_a_round_trip_and_keep_other_groups(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bench.records.RESULTS", tmp_path)
    first, second, both = Records(), Records(), Records()
    first.add("a", {"x": np.array([1.25, 2.5])})
    first.save("run", "a")
    second.add("b", {"y": np.array([3.0])})
    second.save("run", "b")
    both.load("run")
    assert both.samples.keys() == {"a/x", "b/y"}
    assert both.samples["a/x"].tolist() == [1.25, 2.5]
