"""Real-time options are tried one by one, reported in one line, and given back."""

from __future__ import annotations

import errno
import gc
import logging
import os
import threading
from pathlib import Path

import pytest

from runtime.control import realtime
from runtime.control.realtime import UNPRIVILEGED, Realtime, RealtimeOptions, no_garbage_collection

PR_GET_TIMERSLACK = 30


def refuse(number: int):
    def ask(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return ask


def test_refused_options_are_reported_in_one_line_and_not_fatal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "sched_setscheduler", refuse(errno.EPERM))
    monkeypatch.setattr(Realtime, "_lock_memory", refuse(errno.ENOMEM))
    monkeypatch.setattr(realtime, "DMA_LATENCY", tmp_path / "absent")
    with caplog.at_level(logging.INFO), Realtime(RealtimeOptions()) as held:
        held.log()
    assert held.granted == ("timer slack 1 ns",)
    assert held.report() == (
        "real time: timer slack 1 ns; refused: locked memory (Cannot allocate memory), "
        "no deep idle states (No such file or directory), "
        "SCHED_FIFO priority 80 (Operation not permitted)"
    )
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == held.report()


def test_without_options_nothing_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    options = RealtimeOptions(0, False, timer_slack_ns=0, slice_ns=0, forbid_deep_idle=False)
    with caplog.at_level(logging.INFO), Realtime(options) as held:
        held.log()
    assert held.report() == "real time: nothing requested"
    assert caplog.records[0].levelno == logging.INFO


def test_timer_slack_and_slice_need_no_privilege() -> None:
    with Realtime(UNPRIVILEGED) as held:
        assert realtime._libc.prctl(PR_GET_TIMERSLACK, 0, 0, 0, 0) == 1
        assert held.granted == ("timer slack 1 ns", "slice 1 ms")
        assert held.refused == ()


def test_close_undoes_the_options() -> None:
    policy = os.sched_getscheduler(0)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    held = Realtime(RealtimeOptions(lock_memory=False))
    try:
        if "SCHED_FIFO priority 80" in held.granted:
            assert os.sched_getscheduler(0) == os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            assert os.sched_getparam(0).sched_priority == 80
    finally:
        held.close()
    held.close()
    assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == policy
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_under_a_finite_limit_only_what_exists_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(realtime._libc, "mlockall", lambda flags: asked.append(flags) or 0)
    monkeypatch.setattr(realtime._libc, "munlockall", lambda: 0)
    monkeypatch.setattr(realtime.resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    options = RealtimeOptions(0, timer_slack_ns=0, slice_ns=0, forbid_deep_idle=False)
    for privileged in (False, True):
        monkeypatch.setattr(realtime, "_has_capability", lambda _, p=privileged: p)
        with Realtime(options) as held:
            assert held.granted == ("locked memory",)
    assert asked == [1, 3]


def test_garbage_is_collected_before_a_block_and_never_in_it() -> None:
    assert gc.isenabled()
    with no_garbage_collection():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 0
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="the episode's own"), no_garbage_collection():
            raise RuntimeError("the episode's own")
        assert not gc.isenabled()  # as it was
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priority": 100}, "priority: got 100, expected 0 .none. to 99"),
        ({"slice_ns": 5}, "slice_ns: got 5, expected 0, or 100 µs to 100 ms"),
        ({"timer_slack_ns": -1}, "timer_slack_ns: got -1, expected 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RealtimeOptions(**options)


def test_threads_of_the_process_and_those_they_start_get_the_priority() -> None:
    """A thread that is preempted by an ordinary process while it holds the GIL stops the loop."""
    begin, running, ended = threading.Event(), threading.Event(), threading.Event()
    born: list[int] = []

    def child() -> None:
        born.append(threading.get_native_id())
        running.set()
        ended.wait(10)

    def driver() -> None:
        begin.wait(10)
        started = threading.Thread(target=child)
        started.start()
        started.join()

    parent = threading.Thread(target=driver)
    parent.start()
    try:
        with Realtime(RealtimeOptions(priority=3, threads=True, lock_memory=False)) as held:
            if held.refused:
                pytest.skip(held.report())
            begin.set()
            assert running.wait(10)
            for thread in (parent.native_id, born[0]):
                assert os.sched_getscheduler(thread) == os.SCHED_FIFO
                assert os.sched_getparam(thread).sched_priority == 2
        for thread in (parent.native_id, born[0]):
            assert os.sched_getscheduler(thread) == os.SCHED_OTHER
    finally:
        ended.set()
        parent.join()
