"""A crowd at one server, a third of it killed: nobody gets another's answer, nothing is left."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from runtime.tools.ctl import dial
from tests.faults.rig import Program, Server
from tests.faults.watch import Holdings

SOAK = bool(os.environ.get("METRONOME_SOAK"))
CLIENTS, REQUESTS = (64, 1000) if SOAK else (9, 100)
KILL_WITHIN_S = 1.5 if SOAK else 0.05
"""Of each other, at most."""
SEED = 20261123

pytestmark = [pytest.mark.long, pytest.mark.timeout(900 if SOAK else 120)]


def status(server: Server) -> dict:
    with dial(server.address, "", "") as dialer:
        return dialer.send_admin_command("status")


def settled(server: Server) -> dict:
    """Once every session that is over has been noticed."""
    deadline_s = time.monotonic() + 30
    while (now := status(server))["sessions"] and time.monotonic() < deadline_s:
        time.sleep(0.1)
    return now


def run(server: Server, clients: int, requests: int, doomed: int, chance: random.Random) -> dict:
    """What the survivors found, added up; ``doomed`` of the crowd die at random moments."""
    programs = []
    try:
        for number in range(clients):
            transport = ("shm", "zmq")[number % 2]
            arguments = (server.address, str(number), str(requests), transport)
            programs.append(Program("-m", "tests.faults.crowd_client", *arguments))
        for program in programs:
            program.expect("^ready", 300)
        victims = chance.sample(programs, doomed)
        for victim in victims:
            time.sleep(chance.uniform(0.0, KILL_WITHIN_S))
            victim.signal(signal.SIGKILL)
        found = {"right": 0, "wrong": 0, "errors": 0}
        for program in programs:
            if program not in victims:
                said = json.loads(program.expect(r"^\{.*\}$", 600)[0])
                for name, count in said.items():
                    found[name] += count
        return found
    finally:
        for program in programs:
            program.close()


def test_a_third_of_a_crowd_dies(record_property) -> None:
    chance = random.Random(SEED)
    with Server("make", module="tests.faults.crowd_policy") as server:
        run(server, 2, 20, 0, chance)  # whatever is made once has been made
        settled(server)
        before = Holdings.of(server.pid)
        doomed = CLIENTS // 3
        found = run(server, CLIENTS, REQUESTS, doomed, chance)
        after_status = settled(server)
        after = Holdings.of(server.pid)
        print(f"crowd: {CLIENTS} clients x {REQUESTS}, {doomed} killed: {found}")  # noqa: T201
        print(f"before {before}\nafter  {after}\n{after_status['counts']}")  # noqa: T201
        record_property("found", found)
        assert found == {"right": (CLIENTS - doomed) * REQUESTS, "wrong": 0, "errors": 0}
        assert after_status["sessions"] == []
        assert after.segments == before.segments
        assert after.descriptors == before.descriptors
        assert after.threads == before.threads
        again = run(server, 2, 20, 0, chance)
        assert again == {"right": 40, "wrong": 0, "errors": 0}
