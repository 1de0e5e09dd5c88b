"""``OperatorConsole`` with keys, and with an input that has ended."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from runtime.eval_real.operator_console import QUIT, OperatorConsole


@contextmanager
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A pipe as standard input; the end to write into."""
    read, write = os.pipe()
    with os.fdopen(read) as stream, os.fdopen(write, "w") as other:
        monkeypatch.setattr(sys, "stdin", stream)
        yield other.fileno()


def test_keys_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with standard_input(monkeypatch) as keyboard, OperatorConsole(lambda line: None) as operator:
        assert operator.key(0.0) == ""
        os.write(keyboard, b"ab")
        assert [operator.key(1.0), operator.key(1.0), operator.key(0.0)] == ["a", "b", ""]


def test_keys_that_are_not_choices_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with standard_input(monkeypatch) as keyboard, OperatorConsole(said.append) as operator:
        os.write(keyboard, b"xF")
        assert operator.ask("well?", {"s": "success", "f": "failure"}, lambda: None) == "f"
    assert said == ["well?  [s] success, [f] failure"]


def test_waiting_for_a_key_takes_its_time_after_the_input_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or an unattended evaluation would burn a core that its policy needs."""
    read, write = os.pipe()
    os.close(write)
    with os.fdopen(read) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with OperatorConsole(lambda line: None) as operator:
            assert operator.ask("well?", {"s": "success"}, lambda: None) == QUIT
            busy_s, began_s = time.process_time(), time.monotonic()
            for _ in range(10):
                assert operator.key(0.02) == ""
            assert time.monotonic() - began_s >= 0.2
            assert time.process_time() - busy_s < 0.1
