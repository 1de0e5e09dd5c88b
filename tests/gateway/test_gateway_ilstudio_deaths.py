"""kill -9 of ILStudio's clients, of their gateway and of the server, in mid-request.

Our stand-in for ILStudio's client, and the client itself where ``METRONOME_ILSTUDIO`` and
``METRONOME_ILSTUDIO_PYTHON`` are set. ``METRONOME_LONG=1`` kills each 20 times.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateway import deaths
from tests.gateway.ilstudio_messages import RawClient, meta_obs
from tests.gateway.ilstudio_peer import FOLDER, PYTHON
from tests.runtime.toy_policy import observation

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
EMPTY = r"raised RuntimeError: Server returned empty action list"


@contextlib.contextmanager
def connect(port: int) -> Iterator[Callable[[], object]]:
    ticks = itertools.count()
    with RawClient(port) as client:
        yield lambda: client.actions(meta_obs(t=next(ticks)))


ILSTUDIO = deaths.Protocol(
    "ilstudio",
    "BriefPolicy",
    "ilstudio",
    PYTHON,
    FOLDER,
    connect,
    gateway_lost={"ilstudio_stand_in": r"raised (EOFError|Connection\w+)", "ilstudio": EMPTY},
    server_lost={"ilstudio_stand_in": "the answer is empty", "ilstudio": EMPTY},
)


def test_killed_clients(tmp_path: Path) -> None:
    deaths.kill_clients(ILSTUDIO, tmp_path)


@pytest.mark.alone
def test_a_killed_gateway(tmp_path: Path) -> None:
    deaths.kill_gateway(ILSTUDIO, tmp_path, observation())


def test_a_killed_server(tmp_path: Path) -> None:
    said = deaths.kill_server(ILSTUDIO, tmp_path)
    deaths.check_log(said, "ilstudio 127")
