"""Calls to the process that owns a robot: every reply is of the call that waits for it."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from robots.errors import RobotError, RobotLost
from robots.owner_connection import OwnerConnection
from robots.owner_server import OwnerServer
from robots.sensor_memory import SensorMemory

LENGTHS: Mapping[str, Any] = {"qpos": 0, "joints": 2, "cameras": {}}


def answer(name: str, request: Mapping[str, Any]) -> Mapping[str, Any]:
    time.sleep(request.get("after_s", 0.0))
    return {"error": "no"} if name == "refused" else {"said": request["say"]}


@pytest.fixture
def connection() -> Iterator[OwnerConnection]:
    """To an owner in a thread, whose calls take ``after_s`` and return ``say``."""
    fd = SensorMemory.create(**LENGTHS)
    memory = SensorMemory(fd, writable=True, **LENGTHS)
    server = OwnerServer(memory, fd, action_dim=2, hello={}, command=lambda *_: None, call=answer)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            for ready in select.select(server.sockets, [], [], 0.01)[0]:
                server.serve(ready)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with OwnerConnection(server.address, role="both", timeout_s=5, peer="owner") as made:
            yield made
    finally:
        ended.set()
        thread.join()
        for socket in server.sockets:
            socket.close()
        memory.close()
        os.close(fd)


def test_a_reply_that_comes_too_late_is_not_the_next_calls(connection: OwnerConnection) -> None:
    for _ in range(3):
        with pytest.raises(RobotLost, match=r"owner does not answer 'tell' within 0\.02 s"):
            connection.call("tell", timeout_s=0.02, say="early", after_s=0.1)
    assert connection.call("tell", timeout_s=5, say="now")["said"] == "now"
    with pytest.raises(RobotError, match="owner refuses: no"):
        connection.call("refused", timeout_s=5)


def test_late_replies_do_not_prolong_a_call(connection: OwnerConnection) -> None:
    with pytest.raises(RobotLost):
        connection.call("tell", timeout_s=0.01, say="early", after_s=0.3)
    began_s = time.monotonic()
    with pytest.raises(RobotLost, match=r"within 0\.5 s"):
        connection.call("tell", timeout_s=0.5, say="late", after_s=2.0)
    assert 0.4 < time.monotonic() - began_s < 1.5
