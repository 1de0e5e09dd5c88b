"""Children: ready, failed, late, deaf, stopped; and what code in them that is not ours may do."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from transport import child_process
from transport.child_process import TIMED_OUT, ChildProcess
from transport.errors import ChildFailed

PATIENCE_S = 30.0
HEAD = """
import os, select, signal, subprocess, sys, threading
from transport.child_process import isolate, send_event, write_event
"""
ISOLATED = HEAD + "isolation = isolate()\n"
STAY = "sys.stdin.read()\n"

Start = Callable[..., ChildProcess]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Runs code as a child; found because what the parent can import, the child can."""
    monkeypatch.syspath_prepend(tmp_path)
    children: list[ChildProcess] = []

    def start(code: str, **options) -> ChildProcess:
        (tmp_path / "childs_code.py").write_text(code)
        children.append(ChildProcess("childs_code", name="arm", **options))
        return children[-1]

    yield start
    for child in children:
        child.close()


@pytest.fixture
def isolated(start: Start) -> Start:
    """The same, ready, and with ``isolation`` as a variable."""

    def start_isolated(code: str, **options) -> ChildProcess:
        child = start(ISOLATED + code, **options)
        child.wait_ready(PATIENCE_S)
        return child

    return start_isolated


def until_ended(child: ChildProcess) -> list[dict]:
    """Every event up to the last."""
    received: list[dict] = []
    deadline_s = time.monotonic() + PATIENCE_S
    while not received or received[-1]["event"] != "ended":
        assert time.monotonic() < deadline_s, received
        received += child.events()
        time.sleep(0.001)
    return received


# Ready or not


def test_ready_event_is_kept(start: Start) -> None:
    child = start(HEAD + 'send_event("ready", pid=os.getpid())\n' + STAY)
    assert child.wait_ready(PATIENCE_S) is child.ready
    assert child.ready == {"event": "ready", "pid": child.pid}
    assert child.alive
    assert child.status == "alive"


def test_failure_is_reported_with_its_exceptions_name(start: Start) -> None:
    child = start(HEAD + 'send_event("failed", error="no port", kind="SensorLost")\n')
    with pytest.raises(ChildFailed, match=r"^arm: no port$") as raised:
        child.wait_ready(PATIENCE_S)
    assert (raised.value.error, raised.value.kind) == ("no port", "SensorLost")


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("sys.exit(7)", "exit status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    ],
)
def test_end_before_ready_is_reported_with_exit_status(start: Start, end: str, status: str) -> None:
    child = start(HEAD + end)
    with pytest.raises(ChildFailed, match=rf"^arm did not start \({status}\)$") as raised:
        child.wait_ready(PATIENCE_S)
    assert raised.value.error == raised.value.kind == ""


def test_slow_start_is_reported_while_waiting(start: Start) -> None:
    child = start(HEAD + STAY)
    told: list[str] = []
    with pytest.raises(ChildFailed, match=r"^arm was not ready within 0.1 s$"):
        child.wait_ready(0.1, told.append, 0.04)
    assert told[0] == "waiting for arm to be ready, 0 s so far"
    assert child.alive  # nobody has closed it


# What is said between them


def test_lines_and_events_are_exchanged_and_the_end_is_an_event(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    code = """
send_event("ready")
for line in sys.stdin:
    send_event("heard", line=line.strip())
    print("not an event", flush=True)
    print('["nor is this"]', flush=True)
"""
    child = start(HEAD + code)
    child.wait_ready(PATIENCE_S)
    assert list(child.events()) == []
    for line in ("one", "two"):
        child.send_line(line)
    child.close()
    assert list(child.events()) == [
        {"event": "heard", "line": "one"},
        {"event": "heard", "line": "two"},
        {"event": "ended"},
    ]
    assert caplog.messages.count("arm: not an event") == 2
    assert caplog.messages.count('arm: ["nor is this"]') == 2


def test_send_line_to_an_ended_child_does_nothing(start: Start) -> None:
    child = start(HEAD)
    assert until_ended(child) == [{"event": "ended"}]
    child.send_line("go")
    child.close()
    child.send_line("go")
    assert child.status == "exit status 0"


def test_printed_lines_are_logged_and_in_the_error(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    code = """
print("loading")
print("\\n  no such file  ", file=sys.stderr)
sys.exit(2)
"""
    child = start(HEAD + code, events_flag="--events")
    with pytest.raises(
        ChildFailed, match=r"^arm did not start \(exit status 2\): loading no such file$"
    ):
        child.wait_ready(PATIENCE_S)
    assert "arm: loading" in caplog.messages


def test_events_use_a_separate_pipe_with_events_flag(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    code = """
assert sys.argv[1] == "--events"
print('{"event": "failed", "error": "this is for people"}')
write_event(int(sys.argv[2]), "ready", address="here")
"""
    child = start(HEAD + code + STAY, events_flag="--events")
    assert child.wait_ready(PATIENCE_S)["address"] == "here"
    child.close()
    assert 'arm: {"event": "failed", "error": "this is for people"}' in caplog.messages


def test_a_child_can_share_its_parents_output(
    start: Start, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    code = 'print("out"); print("err", file=sys.stderr); write_event(int(sys.argv[2]), "ready")\n'
    child = start(HEAD + code + STAY, events_flag="--events", shares_output=True)
    child.wait_ready(PATIENCE_S)
    assert capfd.readouterr() == ("out\n", "err\n")
    assert caplog.messages == []


def test_send_event_without_reader_does_nothing(start: Start) -> None:
    source, sink = os.pipe()
    os.close(source)
    child_process.write_event(sink, "ready")
    os.close(sink)


# The end


def test_outliving_child_gets_no_terminal_signals(start: Start) -> None:
    code = 'send_event("ready", group=os.getpgrp())\n' + STAY
    outlives, does_not = start(HEAD + code, outlives=True), start(HEAD + code)
    assert outlives.wait_ready(PATIENCE_S)["group"] == outlives.pid
    assert does_not.wait_ready(PATIENCE_S)["group"] == os.getpgrp()


def test_child_ends_with_its_standard_input(start: Start) -> None:
    child = start(HEAD + 'send_event("ready")\n' + STAY + "sys.exit(5)")
    with child:
        child.wait_ready(PATIENCE_S)
    assert child.returncode == 5
    child.close()  # idempotent
    assert child.pidfd == -1


def test_child_that_does_not_end_gets_sigterm_first(start: Start) -> None:
    code = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(6))
send_event("ready")
threading.Event().wait()
"""
    child = start(HEAD + code)
    child.wait_ready(PATIENCE_S)
    child.close(0.05)
    assert child.returncode == 6


@pytest.mark.parametrize("stopped", [False, True])
def test_child_that_ignores_sigterm_is_killed_and_logged(
    start: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    stopped: bool,
) -> None:
    monkeypatch.setattr(child_process, "KILL_AFTER_S", 0.05)
    code = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
send_event("ready")
threading.Event().wait()
"""
    child = start(HEAD + code)
    child.wait_ready(PATIENCE_S)
    if stopped:
        os.kill(child.pid, signal.SIGSTOP)
    child.close(0.05)
    assert child.status == "killed by SIGKILL"
    assert caplog.messages == ["arm did not end within 0.1 s: killed"]


def test_leftover_grandchild_does_not_block_close(start: Start) -> None:
    code = """
left = subprocess.Popen(["sleep", "1000"], pass_fds=[int(sys.argv[2])])
write_event(int(sys.argv[2]), "ready", left=left.pid)
"""
    child = start(HEAD + code + STAY, events_flag="--events")
    left = child.wait_ready(PATIENCE_S)["left"]
    try:
        child.close()  # its two pipes are still open in there
        os.kill(left, 0)
    finally:
        os.kill(left, signal.SIGKILL)


# Code that is not ours


def test_printed_text_is_not_taken_for_an_event(isolated: Start, capfd) -> None:
    code = """
print("Welcome to the arm")
os.system("echo and from a program of its own")
send_event("ready", pid=os.getpid())
select.select([isolation.input_fd], [], [])
"""
    child = isolated(code)
    assert child.ready["pid"] == child.pid
    printed, deadline_s = "", time.monotonic() + 30
    while "program of its own" not in printed and time.monotonic() < deadline_s:
        time.sleep(0.01)  # a thread of the child passes it on
        printed += capfd.readouterr().err
    child.close()
    assert child.returncode == 0  # the parent's end was seen
    assert "Welcome to the arm\nand from a program of its own\n" in printed


def test_code_that_reads_stdin_is_an_error_with_its_question(isolated: Start) -> None:
    code = """
try:
    input("Press ENTER to calibrate: ")
except Exception as error:
    send_event("failed", error=isolation.explain(error))
"""
    with pytest.raises(ChildFailed, match=r"^arm: it asked 'Press ENTER to calibrate:', and nob"):
        isolated(code)


def test_an_error_is_one_line_with_its_type(isolated: Start) -> None:
    code = """
send_event("failed", error=isolation.explain(ConnectionError("no port\\n  try another")))
"""
    with pytest.raises(ChildFailed, match=r"^arm: ConnectionError: no port try another$"):
        isolated(code)


def test_hanging_code_is_ended_with_its_printed_text_in_the_error(isolated: Start) -> None:
    code = """
with isolation.deadline(0.2, "connect()"):
    print("Turn the arm on")
    threading.Event().wait()
"""
    with pytest.raises(
        ChildFailed, match=r"^arm: connect\(\) took longer than 0.2 s; it printed last: 'Turn the"
    ):
        isolated(code)


def test_kept_deadline_does_not_end_the_process(isolated: Start) -> None:
    code = """
with isolation.deadline(60, "connect()"):
    pass
send_event("ready", threads=[t.name for t in threading.enumerate()])
"""
    assert isolated(code).ready["threads"] == ["MainThread", "what is printed"]


def test_deadline_error_contains_the_hint(start: Start) -> None:
    code = """
with isolation.deadline(0.2, "it", "check its power"):
    threading.Event().wait()
"""
    child = start(ISOLATED + code)
    with pytest.raises(ChildFailed, match=r"^arm: it took longer than 0.2 s; check its power$"):
        child.wait_ready(PATIENCE_S)
    until_ended(child)
    assert child.returncode == TIMED_OUT > 2
