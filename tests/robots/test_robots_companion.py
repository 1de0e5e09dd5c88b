"""Starting a process beside a robot, and the errors that its failures become."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from robots.companion_launcher import start_companion
from robots.errors import ConnectFailed, RobotError, SensorLost
from transport.errors import ChildFailed

HEAD = "import sys\nfrom transport.child_process import send_event\n"


@pytest.fixture
def start(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def start(code: str, **options):
        (tmp_path / "companions_code.py").write_text(HEAD + code)
        return start_companion("companions_code", ["--config", "{}"], name="arm", **options)

    return start


def test_a_companion_is_ready_and_gets_its_parents_pid(start) -> None:
    code = 'send_event("ready", words=sys.argv[1:])\nsys.stdin.read()\n'
    with start(code) as child:
        assert child.ready["words"] == ["--config", "{}", "--parent", str(os.getpid())]
        assert child.alive
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ('send_event("failed", error="no bus")', ConnectFailed, "arm: no bus"),
        ('send_event("failed", error="dark", kind="SensorLost")', SensorLost, "arm: dark"),
        ('send_event("failed", error="x", kind="KeyError")', ConnectFailed, "arm: x"),
        ("sys.exit(4)", ConnectFailed, r"arm did not start \(exit status 4\)"),
        ("sys.stdin.read()", ConnectFailed, "arm was not ready within 0.3 s"),
    ],
)
def test_a_failure_becomes_an_error_of_robots(
    start, code: str, kind: type[RobotError], message: str
) -> None:
    within_s = 0.3 if "stdin" in code else 30.0
    with pytest.raises(RobotError, match=f"^{message}$") as raised:
        start(code, ready_within_s=within_s)
    assert type(raised.value) is kind
    assert isinstance(raised.value.__cause__, ChildFailed)
