"""``kill -9`` of foreign clients, of their gateway and of the server, in mid-request."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policies.types import ActionChunk, MetaObs
from runtime.client import PolicyClient
from runtime.server.gateway_processes import HEALTHY_S
from tests.faults.rig import ENVIRONMENT, Program, Server
from tests.gateway.test_gateway_lerobot_real import BlindPolicy
from tests.runtime.toy_policy import SlowPolicy
from transport.address import parse_address
from transport.dialer import Dialer

logger = logging.getLogger(__name__)

LONG = os.environ.get("METRONOME_LONG", "") not in ("", "0")
TIMES = 20 if LONG else 4
INFER_S = 0.1
IN_REQUEST_S = 0.05
"""After a client began to ask: it is in its request."""
BACK_WITHIN_S = 2.0
LATENCY_S = 2.0
"""Longest request of a client beside those that die."""
PATIENCE_S = 20.0
SLACK = 2
"""Descriptors that ZMQ's own threads may keep for later."""


class BriefPolicy(SlowPolicy):
    """An inference takes long enough to be killed in."""

    LEAST_S = INFER_S

    def fork(self) -> BriefPolicy:
        return BriefPolicy()


class BriefBlindPolicy(BlindPolicy):
    """The same without a camera, for LeRobot's mock robot."""

    def infer(self, obs: MetaObs) -> ActionChunk:
        time.sleep(INFER_S)
        return super().infer(obs)

    def fork(self) -> BriefBlindPolicy:
        return BriefBlindPolicy()


def wait_until(condition: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    deadline_s = time.monotonic() + within_s
    while True:
        if found := condition():
            return found
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


class Client:
    """One foreign client's process."""

    def __init__(self, kind: str, pid: int, path: Path) -> None:
        self.kind, self.pid, self._path = kind, pid, path
        self._read = 0

    def expect(self, pattern: str) -> re.Match[str]:
        """The next place in what it says that ``pattern`` is found at."""

        def found() -> re.Match[str] | None:
            if not self._path.exists():
                return None
            match = re.compile(pattern).search(self._path.read_text(errors="replace"), self._read)
            if match:
                self._read = match.end()
            return match

        try:
            return wait_until(found)
        except AssertionError:
            said = self._path.read_text(errors="replace")[self._read :][-2000:]
            raise AssertionError(f"{self.kind}: {pattern!r} was not said, but: {said}") from None

    def forget(self) -> None:
        """Expect nothing of what it has said so far."""
        self._read = len(self._path.read_text(errors="replace"))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


class Clients:
    """Starts clients of one kind, which were imported once."""

    def __init__(self, kind: str, python: str, folder: Path) -> None:
        self.kind, self._folder = kind, folder
        self._numbers = itertools.count()
        self._started: list[Client] = []
        environment = ENVIRONMENT
        if python != sys.executable:  # it has a package ``tests`` of its own
            environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [python, str(Path(__file__).with_name("forked_clients.py")), kind],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, port: int) -> Client:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        path = self._folder / f"{self.kind}-{next(self._numbers)}.log"
        process.stdin.write(f"{port} {path}\n")
        process.stdin.flush()
        while not (line := process.stdout.readline()).strip().isdecimal():
            assert line, f"{self.kind} did not start"
        client = Client(self.kind, int(line), path)
        self._started.append(client)
        return client

    def close(self) -> None:
        for client in self._started:
            client.kill()
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class Held:
    """What a process holds.

    Attributes:
        descriptors: By kind.
        threads: How many.
        segments: Names of mapped shared memory.
    """

    descriptors: collections.Counter[str]
    threads: int
    segments: frozenset[str]

    @classmethod
    def by(cls, pid: int) -> Held:
        process, kinds = Path(f"/proc/{pid}"), []
        for path in (process / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                kinds.append(path.readlink().name.partition(":")[0])
        maps = (process / "maps").read_text()
        return cls(
            collections.Counter(kinds),
            len(list((process / "task").iterdir())),
            frozenset(re.findall(r"/dev/shm/(metronome-\S+)", maps)),
        )


def settled(pid: int) -> Held:
    """What this gateway holds when it has connected to ask which policy the server has.

    Its sessions are over shared memory, so no other thread of ZMQ stays. Threads are there before
    the connection, so it is watched until what it holds does not change any more.
    """
    tasks = Path(f"/proc/{pid}/task")
    seen: list[Held] = []

    def unchanged() -> bool:
        with contextlib.suppress(FileNotFoundError):
            if any("ZMQ" in comm.read_text() for comm in tasks.glob("*/comm")):
                time.sleep(0.5)
                seen.append(Held.by(pid))
        return len(seen) > 1 and seen[-1] == seen[-2]

    wait_until(unchanged)
    return seen[-1]


def holds_no_more(pid: int, before: Held) -> None:
    """The process returns to what it held."""
    with contextlib.suppress(AssertionError):
        wait_until(lambda: _more(pid, before) == ([], 0, 0))
    more = _more(pid, before)
    assert more == ([], 0, 0), f"{more} more than {before}: {Held.by(pid)}"


def _more(pid: int, before: Held) -> tuple[list[str], int, int]:
    """More descriptors, threads and segments than before."""
    now = Held.by(pid)
    more = sorted((now.descriptors - before.descriptors).elements())
    count = now.descriptors.total() - before.descriptors.total()
    return (
        more if count > SLACK else [],
        max(0, now.threads - before.threads),
        max(0, len(now.segments) - len(before.segments)),
    )


def still_there(segments: frozenset[str]) -> list[str]:
    return [name for name in segments if Path("/dev/shm", name).exists()]


def session_names(server: str) -> list[str]:
    """The clients of the server at this address."""
    with Dialer(*parse_address(server)) as dialer:
        return [each["client"] for each in dialer.send_admin_command("status")["sessions"]]


class Bystander:
    """Asks all the time, in a thread; checks at its end that all went well."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask, self._over = ask, threading.Event()
        self.spans_s: list[float] = []
        self._errors: list[Exception] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Bystander:
        self._ask()  # the first one compiles
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        assert not self._errors and self.spans_s
        assert max(self.spans_s) < LATENCY_S
        count, longest_s = len(self.spans_s), max(self.spans_s)
        logger.info("the bystander's %d requests took %.3f s at most", count, longest_s)

    def _run(self) -> None:
        while not self._over.is_set():
            began_s = time.monotonic()
            try:
                self._ask()
            except Exception as error:
                self._errors.append(error)
                return
            self.spans_s.append(time.monotonic() - began_s)


@dataclass(frozen=True)
class Protocol:
    """What the deaths of one protocol's clients, gateway and server need.

    Attributes:
        name: The gateway's.
        policy: Name of a class in this module, which is served.
        real: Kind of the real client; our stand-in's is ``real_stand_in``.
        python, source: Environment variables of the real client.
        connect: Makes a client of the gateway's port in this process: its function to ask with.
        gateway_lost, server_lost: By kind, what a client says.
    """

    name: str
    policy: str
    real: str
    python: str
    source: str
    connect: Callable[[int], contextlib.AbstractContextManager[Callable[[], object]]]
    gateway_lost: Mapping[str, str]
    server_lost: Mapping[str, str]

    def server(self, port: int = 0, *flags: str) -> Server:
        return Server(self.policy, port, module=__name__, flags=flags)

    @contextlib.contextmanager
    def gateway(self, server: str, port: int = 0) -> Iterator[tuple[Program, int]]:
        """A gateway's own process and its port."""
        flags = ("--server", server, "--port", str(port), "--timeout_s", "5")
        with Program("-m", "runtime.gateway", self.name, *flags) as program:
            match = program.expect(r"clients are served on 127\.0\.0\.1:(\d+)")
            yield program, int(match[1])

    @contextlib.contextmanager
    def clients(self, folder: Path) -> Iterator[list[Clients]]:
        """Our stand-in, and the real client where the environment has one."""
        with contextlib.ExitStack() as stack:
            kinds = [(f"{self.real}_stand_in", sys.executable)]
            if self.python in os.environ and self.source in os.environ:
                kinds.append((self.real, os.environ[self.python]))
            yield [stack.enter_context(Clients(kind, python, folder)) for kind, python in kinds]


def start_all(kinds: Sequence[Clients], port: int) -> list[Client]:
    """A client of each kind that has got actions."""
    clients = [kind.start(port) for kind in kinds]
    for client in clients:
        client.expect("acted")
    return clients


def in_request(clients: Sequence[Client]) -> None:
    """Returns when all of them are."""
    for client in clients:
        client.forget()
        client.expect("asking")
    time.sleep(IN_REQUEST_S)


def kill_clients(protocol: Protocol, folder: Path) -> None:
    """Nobody else notices, and nothing is left of them."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(protocol.server())
        gateway, port = stack.enter_context(protocol.gateway(server.address))
        kinds = stack.enter_context(protocol.clients(folder))
        bystander = Bystander(stack.enter_context(protocol.connect(port)))
        stack.enter_context(bystander)
        held: list[Held] = []
        for number in range(TIMES + 1):
            clients = start_all(kinds, port)
            in_request(clients)
            assert len(session_names(server.address)) == 1 + len(clients)
            for client in clients:
                client.kill()
            wait_until(lambda: len(session_names(server.address)) == 1)
            if not number:  # whatever the first ones needed is there now
                held = [settled(gateway.pid), Held.by(server.pid)]
        for each, before in zip((gateway, server), held, strict=True):
            holds_no_more(each.pid, before)
        bystander.check()


def kill_gateway(protocol: Protocol, folder: Path, obs: MetaObs) -> None:
    """The server starts it again at once, keeps nothing of it, and its own client goes on."""
    backs_s, starts_s = [], []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(protocol.server(0, "--gateway", f"{protocol.name}:0"))
        match = server.expect(rf"gateway +{protocol.name} clients on \S+:(\d+)")
        port = int(match[1])
        for _ in range(3):
            began_s = time.monotonic()
            with protocol.gateway(server.address):
                starts_s.append(time.monotonic() - began_s)
        kinds = stack.enter_context(protocol.clients(folder))
        ours = stack.enter_context(PolicyClient(server.address, timeout_s=20.0))
        bystander = stack.enter_context(Bystander(lambda: ours.infer(obs)))
        clients = start_all(kinds, port)
        before, ready_s = Held.by(server.pid), time.monotonic()
        for _ in range(TIMES):
            time.sleep(max(0.0, ready_s + HEALTHY_S + 0.1 - time.monotonic()))
            in_request(clients)
            gateway = gateway_of(server.pid)
            segments = Held.by(gateway).segments
            os.kill(gateway, signal.SIGKILL)
            died_s = time.monotonic()
            wait_until(lambda: not answers(port))
            wait_until(lambda: answers(port))
            ready_s = time.monotonic()
            backs_s.append(ready_s - died_s)
            for client in clients:
                client.expect(protocol.gateway_lost[client.kind])
                client.kill()
            clients = start_all(kinds, port)
            wait_until(lambda: len(session_names(server.address)) == 1 + len(kinds))
            assert segments
            wait_until(lambda segments=segments: not still_there(segments))
        holds_no_more(server.pid, before)
        bystander.check()
    logger.info("a gateway's start took %.2f to %.2f s", min(starts_s), max(starts_s))
    logger.info("the gateway was back after %.2f to %.2f s", min(backs_s), max(backs_s))
    # A busy machine starts a process slowly; nothing else may take time.
    assert min(backs_s) < max(BACK_WITHIN_S, 2 * max(starts_s))


def gateway_of(pid: int) -> int:
    """The server's child that is its gateway. Each thread has its own children."""
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            if b"runtime.gateway" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError("the server has no gateway")


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
        return True
    return False


def kill_server(protocol: Protocol, folder: Path) -> list[str]:
    """Its clients get an error of their own kind, and go on when it is back.

    Returns the gateway's log.
    """
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(protocol.server())
        address = server.address
        gateway, port = stack.enter_context(protocol.gateway(address))
        kinds = stack.enter_context(protocol.clients(folder))
        clients = start_all(kinds, port)
        before = settled(gateway.pid)
        for _ in range(TIMES):
            in_request(clients)
            segments = Held.by(server.pid).segments
            server.close()
            for client in clients:
                client.expect(protocol.server_lost[client.kind])
            assert answers(port)
            server = stack.enter_context(protocol.server(parse_address(address)[1]))
            for client in clients:
                client.expect("acted")
            wait_until(lambda segments=segments: not still_there(segments))
        wait_until(lambda: len(session_names(address)) == len(clients))
        holds_no_more(gateway.pid, before)
        for client in clients:
            client.kill()
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        return gateway.said


def check_log(said: Sequence[str], name: str) -> None:
    """Each loss of the server is few lines per client, however often it asks, and one when it ends.

    A loss has a line for each kind of error: a lost request, and a busy machine's late new session.
    """
    lines = [line for line in said if " WARNING " in line and name in line]
    clients = {line.split(" WARNING ")[1].split(": ", 2)[1] for line in lines}
    assert clients
    ends = [line for line in lines if "requests succeed again" in line]
    assert len(ends) == TIMES * len(clients), lines
    assert len(ends) <= len(lines) - len(ends) <= 3 * len(ends), lines
