"""A server and a client as separate programs, and the test's interface to them.

Each prints one JSON object per event. The client reads commands, one word per line.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0


class Peer:
    """A server or client process and its events."""

    def __init__(self, arguments: Sequence[str], prefix: Sequence[str]) -> None:
        command = [*prefix, sys.executable, __file__, *arguments]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._buffer = b""

    def expect(self, event: str) -> dict[str, Any]:
        """The next event, which must have this name."""
        said = self.next()
        assert said["event"] == event, said
        return said

    def next(self) -> dict[str, Any]:
        """The next event."""
        stdout = self.process.stdout
        while b"\n" not in self._buffer:
            readable, _, _ = select.select([stdout], [], [], PATIENCE_S)
            assert readable, f"no event within {PATIENCE_S} s"
            more = os.read(stdout.fileno(), 65536)
            assert more, f"it ended with {self.process.wait()}"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def send_line(self, word: str) -> None:
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def ask(self) -> dict[str, Any]:
        """Have a client make one request; the resulting event."""
        self.send_line("ask")
        return self.next()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it with SIGKILL: no handler, no cleanup."""
        self.process.kill()
        self.process.wait()

    def close(self) -> int:
        """End it if it has not ended; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        status = self.process.wait(PATIENCE_S)
        self.process.stdin.close()
        self.process.stdout.close()
        return status


@contextmanager
def server(*options: str, prefix: Sequence[str] = (), host: str = "127.0.0.1") -> Iterator[Peer]:
    """Start a server; its attribute ``port`` is set."""
    peer = Peer(["server", host, *options], prefix)
    try:
        peer.port = peer.expect("listening")["port"]
        yield peer
    finally:
        peer.close()


@contextmanager
def client(
    port: int,
    transport: str = "auto",
    user: str = "",
    *,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
) -> Iterator[Peer]:
    """Start a client, as user id ``user`` if it is not empty."""
    peer = Peer(["client", host, str(port), transport, user], prefix)
    try:
        yield peer
    finally:
        peer.close()


def send_event(event: str, **what: Any) -> None:
    sys.stdout.write(json.dumps({"event": event, **what}) + "\n")
    sys.stdout.flush()


def run_server(host: str, *transports: str) -> None:
    from contracts.frames import CHUNK

    from transport.errors import PeerGone
    from transport.handshake_messages import Welcome
    from transport.server.listener import Listener

    stopping: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        stopping.append(number)
        listener.wake()

    listener = Listener(
        host,
        0,
        describe=dict,
        accept=lambda hello: Welcome(CHUNK),
        transports=transports or ("shm", "zmq"),
    )
    signal.signal(signal.SIGTERM, stop)
    send_event("listening", port=listener.port)
    known = set()
    while not stopping:
        for session in listener.wait(None):
            if session.id not in known:
                known.add(session.id)
                transport = session.channel.transport
                send_event("session", transport=transport, reason=session.transport_reason)
            try:
                while (message := session.channel.poll()) is not None:
                    with message:
                        session.channel.send(answer(message.arrays), message.request_id)
            except PeerGone:
                send_event("ended", reason=session.ended)
    listener.close("the server is shutting down (SIGTERM)")


def answer(arrays: Any) -> dict[str, Any]:
    """The sum of all bytes, so that a torn frame is detected."""
    total = sum(int(array.view(np.uint8).sum()) for array in arrays.values() if array.ndim)
    stages = np.full(8, total, np.int64)
    return {"actions": np.zeros((10, 14), np.float32), "stages": stages}


def run_client(host: str, port: str, transport: str, user: str) -> None:
    from contracts.frames import OBSERVATION, observation

    from transport.dialer import Dialer
    from transport.errors import TransportError

    with Dialer(host, int(port), timeout_s=20.0) as dialer:
        try:
            if user:
                # Another user may not be able to read what is imported later.
                import_module("transport.shm.client_handshake")
                observation(0)
                dialer.describe()
                os.setuid(int(user))
            channel, _ = dialer.open(OBSERVATION, client="peer", transport=transport)
        except TransportError as error:
            send_event("failed", type=type(error).__name__, text=str(error))
            return
    send_event("open", transport=channel.transport, reason=channel.transport_reason)
    asked = 0
    for line in sys.stdin:
        if line.strip() == "quit":
            break
        asked += 1
        try:
            sent = observation(asked)
            channel.send(sent, asked)
            if line.strip() == "send":
                send_event("sent")
                continue
            with channel.recv(20.0) as message:
                whole = np.array_equal(message.arrays["stages"], answer(sent)["stages"])
            send_event("answer", whole=whole)
        except TransportError as error:
            send_event("failed", type=type(error).__name__, text=str(error))
    channel.close("the client quit")
    send_event("closed")


if __name__ == "__main__":
    role, *arguments = sys.argv[1:]
    {"server": run_server, "client": run_client}[role](*arguments)
