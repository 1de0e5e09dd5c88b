"""``kill -9`` of either side, at lines of the handshake and of the data plane.

Production code has no hook for it: a victim traces itself, and kills itself at a line. After each
death: no name is left in /dev/shm that the next server's start does not remove (after the
handshake: none at all), the survivor reports it before its deadline, and a new session works.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transport_forks import LONG, ForkedChild, ForkServer, isolated_if_possible, orphans

from transport.shm.segment import FOLDER, PREFIX

TIMES = 50 if LONG else 1
TIMEOUT_S = 1.0
SLACK_S = 1.0
"""Tolerance for a busy machine; the log has the measured times."""
ERRORS = ("PeerGone", "TransportTimeout", "TransportUnavailable")
_log = logging.getLogger(__name__)
pytestmark = pytest.mark.timeout(1800 if LONG else 120)


@dataclass(frozen=True)
class Point:
    """Line ``at`` (of those that run, from 1; 0: its return) of one call of ``function``."""

    module: str
    function: str
    at: int
    call: int = 1

    def __str__(self) -> str:
        return f"{self.module}.{self.function}-{self.at or 'return'}"


CLIENT_HANDSHAKE = [
    Point("shm.client_handshake", "client_handshake", 1),
    Point("shm.client_handshake", "_map", 4),
    Point("shm.client_handshake", "_map", 0, call=2),
    Point("shm.client_handshake", "_prove", 3),
    Point("shm.client_handshake", "_prove", 5),
    Point("shm.client_handshake", "_prove", 0),
    Point("shm.channel", "ShmChannel.__init__", 3),
]
CLIENT_DATA = [
    Point("base_channel", "BaseChannel.loan", 0),
    Point("shm.ring", "RingWriter.claim", 3),
    Point("shm.ring", "RingWriter.publish", 0),
    Point("shm.channel", "ShmChannel._publish", 3),
    Point("shm.ring", "RingReader.prepare_to_wait", 0),
    Point("shm.channel", "ShmChannel._wait", 3),
    Point("shm.ring", "RingReader.finish_wait", 0),
    Point("shm.ring", "RingReader.take", 0),
    Point("base_channel", "BaseChannel.release_when_unused", 1),
    Point("shm.ring", "RingReader.release", 0),
]
CLIENT_CLOSE = [
    Point("shm.channel", "ShmChannel._close", 4),
    Point("shm.segment", "ShmResources.close", 2),
]
SERVER_HANDSHAKE = [
    Point("shm.segment", "Segment._lock", 1),
    Point("shm.segment", "Segment._lock", 0),
    Point("shm.segment", "Segment.create", 0),
    Point("shm.segment", "create_all", 0),
    Point("shm.segment_offer", "SegmentOffer.describe", 1),
    Point("server.handshake", "Handshake._hello", 0),
    Point("server.shm_acceptor", "ShmAcceptor._accept_one", 4),
    Point("shm.segment_offer", "SegmentOffer.accept", 3),
    Point("shm.segment_offer", "SegmentOffer.accept", 0),
    Point("server.handshake", "Handshake._confirm", 0),
]
SERVER_DATA = [
    Point("server.listener", "Listener.wait", 4, call=20),
    Point("server.polled_sessions", "PolledSessions.stop_polling", 0, call=60),
    Point("server.polled_sessions", "PolledSessions.add", 1, call=5),
    Point("shm.ring", "RingReader.take", 0),
    Point("shm.ring", "RingWriter.claim", 3),
    Point("shm.ring", "RingWriter.publish", 0),
    Point("shm.channel", "ShmChannel._publish", 3),
    Point("shm.ring", "RingReader.release", 0),
]


@pytest.fixture(scope="module")
def fork_server() -> Iterator[ForkServer]:
    """With a /dev/shm of its own, where that can be had: a test that runs beside this one would
    see the names of its dead before the next server removes them."""
    fork_server = ForkServer("transport_sides", prefix=isolated_if_possible("64m"))
    yield fork_server
    fork_server.close()


@pytest.fixture(scope="module")
def delays() -> Iterator[dict[str, list[float]]]:
    """Seconds from a death to the survivor's word, and of that word after its deadline."""
    found: dict[str, list[float]] = {}
    yield found
    for what, values in found.items():
        low, middle, high = np.percentile(values, (0, 50, 99)) * 1e3
        _log.info(
            "%s: %d, least %.2f, median %.2f, p99 %.2f, most %.2f ms",
            *(what, len(values), low, middle, high, max(values) * 1e3),
        )


def names_of(pid: int) -> list[str]:
    """Names in /dev/shm that this process holds open."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(entry)  # noqa: PTH115  a Path would resolve it
        except FileNotFoundError:
            continue
        if target.startswith(f"{FOLDER}/{PREFIX}") and not target.endswith("(deleted)"):
            found.append(target)
    return found


def die(victim: ForkedChild) -> int:
    """Wait until it has; when, on the monotonic clock."""
    while (said := victim.next())["event"] != "dying":
        assert said["event"] in ("open", "answered"), f"it never came to that line: {said}"
    assert victim.next()["event"] == "end"
    return int(said["at_ns"])


def again(port: int, fork_server: ForkServer) -> None:
    """A new client, answered."""
    with fork_server.fork("transport_sides:ask", port=port, timeout_s=20.0, count=3) as client:
        client.wait_for("answered")


def calls(point: Point) -> Iterator[dict[str, Any]]:
    """``point`` at ever other calls of its function; in the handshake there is but one."""
    generator = random.Random(str(point))
    for number in range(TIMES):
        call = point.call
        if point in (*CLIENT_DATA, *SERVER_DATA) and number:
            call += generator.randrange(100)
        yield {**asdict(point), "call": call}


@pytest.mark.parametrize("point", CLIENT_HANDSHAKE + CLIENT_DATA + CLIENT_CLOSE, ids=str)
def test_a_client_is_killed(point: Point, fork_server: ForkServer, delays) -> None:
    with fork_server.fork("transport_sides:serve") as server:
        port = server.expect("listening")["port"]
        for line in calls(point):
            count = 5 if point in CLIENT_CLOSE else 10_000
            what = {"port": port, "timeout_s": TIMEOUT_S, "count": count, "point": line}
            with fork_server.fork("transport_sides:ask", **what) as victim:
                died_ns = die(victim)
            if point not in CLIENT_HANDSHAKE:
                said = server.expect("ended")
                delays.setdefault("server: death to end of session", []).append(
                    (said["at_ns"] - died_ns) / 1e9
                )
                assert not names_of(server.pid)
            again(port, fork_server)
            assert "closed" in server.expect("ended")["reason"]
        server.finish()
    assert not orphans(fork_server.shm)


@pytest.mark.parametrize("point", SERVER_HANDSHAKE + SERVER_DATA, ids=str)
def test_a_server_is_killed(point: Point, fork_server: ForkServer, delays) -> None:
    armed_after = 1 if point in SERVER_DATA else 0
    for line in calls(point):
        with fork_server.fork(
            "transport_sides:serve", point=line, armed_after=armed_after
        ) as victim:
            port = victim.expect("listening")["port"]
            what = {"port": port, "timeout_s": TIMEOUT_S, "count": 10_000}
            with fork_server.fork("transport_sides:ask", **what) as client:
                died_ns = die(victim)
                said = client.wait_for("failed")
                delays.setdefault(f"client, {said['phase']}: death to error", []).append(
                    (said["at_ns"] - died_ns) / 1e9
                )
                delays.setdefault(f"client, {said['phase']}: error after its deadline", []).append(
                    said["late_ns"] / 1e9
                )
                assert said["late_ns"] / 1e9 < SLACK_S
                assert said["type"] in ("PeerGone", "TransportTimeout", "TransportUnavailable"), (
                    said
                )
                if point in SERVER_DATA:
                    assert (said["phase"], orphans(fork_server.shm)) == ("data", set())
                with fork_server.fork("transport_sides:serve") as server:
                    port = server.expect("listening")["port"]
                    assert not orphans(fork_server.shm)
                    client.send_line(port)
                    client.wait_for("answered")


@pytest.mark.parametrize("side", ["client", "server"])
def test_process_is_killed_at_a_random_moment(side: str, fork_server: ForkServer) -> None:
    """Compiled code has no lines: the moment is drawn, and the blow comes from outside."""
    generator = random.Random(side)
    for _ in range(TIMES * 10):
        with fork_server.fork("transport_sides:serve") as server:
            port = server.expect("listening")["port"]
            what = {"port": port, "timeout_s": TIMEOUT_S, "count": 10_000_000}
            with fork_server.fork("transport_sides:ask", **what) as client:
                client.expect("open")
                moment_ns = time.monotonic_ns() + generator.randrange(5_000_000)
                while time.monotonic_ns() < moment_ns:
                    pass
                victim, survivor = (client, server) if side == "client" else (server, client)
                victim.signal(9)
                assert victim.next()["event"] == "end"
                said = survivor.expect("ended" if side == "client" else "failed")
                assert not orphans(fork_server.shm)
                if side == "client":
                    assert not names_of(server.pid)
                    again(port, fork_server)
                else:
                    assert said["type"] == "PeerGone"
                    assert said["late_ns"] / 1e9 < SLACK_S


def test_name_with_a_living_owner_is_no_orphan() -> None:
    """What the checks above rest on."""
    path = FOLDER / f"{PREFIX}{'0' * 32}"
    with path.open("wb") as file:
        try:
            assert path.name in orphans()
            assert str(path) in names_of(os.getpid())
            fcntl.flock(file, fcntl.LOCK_EX)
            assert path.name not in orphans()
        finally:
            path.unlink()
        assert str(path) not in names_of(os.getpid())
