"""kill -9 of LeRobot's clients, of their gateway and of the server, in mid-request.

Our stand-in for LeRobot's client, and the client itself with LeRobot's mock robot where
``METRONOME_LEROBOT_PYTHON`` and ``METRONOME_LEROBOT_SOURCE`` are set. ``METRONOME_LONG=1`` kills
each 20 times.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gateway import deaths
from tests.gateway.lerobot_client import LerobotClient
from tests.gateway.lerobot_pickles import MOTORS, TimedObservation, dumps, features
from tests.runtime.toy_policy import observation

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
SEEN = {**dict.fromkeys(MOTORS, 0.5), "task": ""}


@contextlib.contextmanager
def connect(port: int) -> Iterator[Callable[[], object]]:
    ticks = itertools.count()
    with LerobotClient(port) as client:
        client.start(lerobot_features=features(cameras=()))

        def ask() -> None:
            client.send(dumps(TimedObservation(1.0, next(ticks), SEEN)))
            assert client.act()

        yield ask


def said(call: str, code: str) -> str:
    return rf"{call}[^\n]*\n\s*status = StatusCode\.{code}"


LEROBOT = deaths.Protocol(
    "lerobot",
    "BriefBlindPolicy",
    "lerobot",
    "METRONOME_LEROBOT_PYTHON",
    "METRONOME_LEROBOT_SOURCE",
    connect,
    gateway_lost={
        "lerobot_stand_in": said("raised", "UNAVAILABLE"),
        "lerobot": said("Error receiving actions", "UNAVAILABLE"),
    },
    server_lost={
        "lerobot_stand_in": said("raised", "ABORTED"),
        "lerobot": said("Error receiving actions", "ABORTED"),
    },
)


def test_killed_clients(tmp_path: Path) -> None:
    deaths.kill_clients(LEROBOT, tmp_path)


@pytest.mark.alone
def test_a_killed_gateway(tmp_path: Path) -> None:
    deaths.kill_gateway(LEROBOT, tmp_path, dataclasses.replace(observation(), images={}))


def test_a_killed_server(tmp_path: Path) -> None:
    log = deaths.kill_server(LEROBOT, tmp_path)
    deaths.check_log(log, "ipv4:127")


def test_a_client_does_not_start_without_the_server(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LEROBOT.server())
        address = server.address
        _, port = stack.enter_context(LEROBOT.gateway(address))
        server.close()
        for kind in stack.enter_context(LEROBOT.clients(tmp_path)):
            kind.start(port).expect("started False")


def test_a_client_is_told_to_start_again(tmp_path: Path) -> None:
    """LeRobot's client sends no instructions again by itself."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(LEROBOT.server())
        kinds = stack.enter_context(LEROBOT.clients(tmp_path))
        with LEROBOT.gateway(server.address) as (_, port):
            clients = deaths.start_all(kinds, port)
        with LEROBOT.gateway(server.address, port) as (gateway, _):
            for client in clients:
                client.expect(r"FAILED_PRECONDITION(?s:.*?)start the client again")
            told = [gateway.expect("start the client again") for _ in clients]
            assert len({line.string.split("ipv4")[1] for line in told}) == len(clients)
            for client in clients:
                client.forget()
                client.expect(r"FAILED_PRECONDITION")
            deaths.start_all(kinds, port)
            assert not [line for line in gateway.said if "again" in line][len(clients) :]
