"""Children that run code which is not ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from robots.errors import ConnectFailed, SensorLost
from robots.processes import TIMED_OUT, Child

HEAD = """
import os, select, sys, threading
from robots.processes import isolate, say, write_line
isolation = isolate()
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch):
    """Runs code as a child; found because what the parent can import, the child can."""
    monkeypatch.syspath_prepend(tmp_path)
    children: list[Child] = []

    def start(code: str, **options) -> Child:
        (tmp_path / "vendors_code.py").write_text(HEAD + code)
        children.append(Child("vendors_code", [], name="arm", **options))
        return children[-1]

    yield start
    for started in children:
        started.close()


def test_what_code_prints_is_not_taken_for_an_answer(child, capfd) -> None:
    code = """
print("Welcome to the arm")
os.system("echo and from a program of its own")
say(pid=os.getpid())
select.select([isolation.input_fd], [], [])
"""
    started = child(code)
    assert started.said == {"pid": started.pid}
    started.close()
    assert started.poll() == 0  # the parent's end was seen
    assert "Welcome to the arm\nand from a program of its own\n" in capfd.readouterr().err


def test_code_that_asks_is_an_error_with_its_question(child) -> None:
    code = """
try:
    input("Press ENTER to calibrate: ")
except Exception as error:
    say(error=isolation.explain(error))
"""
    with pytest.raises(ConnectFailed, match=r"^arm: it asked 'Press ENTER to calibrate:', and nob"):
        child(code)


def test_an_error_is_one_line_with_its_type(child) -> None:
    code = """
say(error=isolation.explain(ConnectionError("no port\\n  try another")), kind="SensorLost")
"""
    with pytest.raises(SensorLost, match=r"^arm: ConnectionError: no port try another$"):
        child(code)


def test_code_that_hangs_is_given_up_with_what_it_printed(child) -> None:
    code = """
with isolation.deadline(0.2, "connect()"):
    print("Turn the arm on")
    threading.Event().wait()
"""
    with pytest.raises(
        ConnectFailed, match=r"^arm: connect\(\) took longer than 0.2 s; it printed last: 'Turn th"
    ):
        child(code)


def test_a_deadline_that_is_kept_ends_nothing(child) -> None:
    code = """
with isolation.deadline(60, "connect()"):
    pass
say(threads=[t.name for t in threading.enumerate()])
"""
    assert child(code).said == {"threads": ["MainThread", "what is printed"]}


def test_a_deadline_tells_the_parent_in_its_own_words(child) -> None:
    code = """
with isolation.deadline(0.2, "it", lambda why: write_line('{"error": "%s, in other words"}' % why)):
    threading.Event().wait()
"""
    with pytest.raises(ConnectFailed, match=r"^arm: it took longer than 0.2 s, in other words$"):
        child(code)
    assert TIMED_OUT > 2


def test_one_that_outlives_hears_no_signals_of_its_parents(child) -> None:
    code = """
say(group=os.getpgrp())
select.select([isolation.input_fd], [], [])
"""
    started = child(code, outlives=True)
    assert started.said["group"] == started.pid != os.getpgrp()
