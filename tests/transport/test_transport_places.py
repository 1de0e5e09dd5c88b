"""Without shared memory ZMQ is used, and both sides have the reason.

Mount and network namespaces stand in for containers and other hosts; they take root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from transport_forks import ForkServer, isolated
from transport_peers import Peer, client, server

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", autouse=True)
def _root() -> None:
    command = [*isolated("1m"), "true"]
    try:
        result = subprocess.run(command, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare: it comes with util-linux")
    if result.returncode:
        pytest.skip(f"no mount namespaces here: {result.stderr.decode().strip()}")


def over_zmq(serving: Peer, dialing: Peer) -> str:
    """Both agree that it is ZMQ and why; requests are answered. The reason."""
    opened = dialing.expect("open")
    assert opened["transport"] == "zmq", opened
    assert dialing.ask() == {"event": "answer", "whole": True}
    known = serving.expect("session")
    assert (known["transport"], known["reason"]) == ("zmq", opened["reason"])
    return str(opened["reason"])


def unavailable(dialing: Peer) -> str:
    said = dialing.expect("failed")
    assert said["type"] == "TransportUnavailable"
    return str(said["text"])


def test_a_client_with_its_own_dev_shm() -> None:
    with server() as serving, client(serving.port, prefix=isolated("64m")) as dialing:
        assert over_zmq(serving, dialing) == (
            "client: the server's segments are not in this /dev/shm "
            "(another host, container or mount namespace; or the offer was not taken up in time)"
        )
        with client(serving.port, "shm", prefix=isolated("64m")) as forced:
            assert "not in this /dev/shm" in unavailable(forced)
        assert dialing.ask() == {"event": "answer", "whole": True}


def test_a_server_with_a_dev_shm_that_is_too_small() -> None:
    with server(prefix=isolated("32k")) as serving, client(serving.port) as dialing:
        assert over_zmq(serving, dialing) == (
            "server: /dev/shm is full: 0.1 MiB wanted, 0.0 MiB there"
        )
        with client(serving.port, "shm") as forced:
            assert "/dev/shm is full" in unavailable(forced)


def test_one_mebibyte_of_dev_shm_serves_some_from_memory_and_the_others_over_zmq() -> None:
    """Nobody dies of a page that is not there, and what is given back is used again."""
    fork_server = ForkServer("transport_sides", prefix=isolated("1m"))
    try:
        with fork_server.fork("transport_sides:serve") as serving:
            port = serving.expect("listening")["port"]
            what = {"port": port, "timeout_s": 20.0}
            with fork_server.fork("transport_sides:open_many", count=20, **what) as many:
                said = many.expect("opened")
                assert said["failure"] == ""
                transports = [transport for transport, _ in said["how"]]
                assert transports == sorted(transports)  # shm until it was full, then zmq
                assert {*transports} == {"shm", "zmq"}
                assert all(
                    reason.startswith("server: /dev/shm is full: 0.1 MiB wanted")
                    for transport, reason in said["how"]
                    if transport == "zmq"
                )
                many.send_line("close")
                many.expect("closed")
            for _ in range(100):
                with fork_server.fork("transport_sides:open_many", count=1, **what) as one:
                    (how,) = one.expect("opened")["how"]
                if how[0] == "shm":
                    break
            assert how[0] == "shm"
    finally:
        fork_server.close()


@pytest.mark.parametrize(
    ("options", "uid", "reason"),
    [
        ("1m,ro", 0, "server: no shared memory: Read-only file system"),
        ("1m,mode=0755", 65534, "server: no shared memory: Permission denied"),
        ("1m,mode=0700", 65534, "server: no shared memory: Permission denied"),
    ],
    ids=["read-only", "not-writable", "not-searchable"],
)
def test_a_server_that_may_not_use_dev_shm(options: str, uid: int, reason: str) -> None:
    fork_server = ForkServer("transport_sides", prefix=isolated(options))
    try:
        with fork_server.fork("transport_sides:serve", uid=uid) as serving:
            port = serving.expect("listening")["port"]
            with fork_server.fork("transport_sides:open_many", port=port, count=1) as dialing:
                said = dialing.expect("opened")
                assert said == {"event": "opened", "how": [["zmq", reason]], "failure": ""}
    finally:
        fork_server.close()


def test_client_without_free_descriptors_does_not_affect_others(fork_server: ForkServer) -> None:
    """It falls back, or is told; never a crash, and the server and others go on."""
    with fork_server.fork("transport_sides:serve") as serving:
        what = {"port": serving.expect("listening")["port"]}
        for nofile in range(64, 70):
            with fork_server.fork(
                "transport_sides:open_many", count=100, nofile=nofile, **what
            ) as many:
                said = many.expect("opened")
                transports = [transport for transport, _ in said["how"]]
                assert transports == sorted(transports)
                assert "shm" in transports
                assert "Too many open files" in said["failure"]
                with fork_server.fork("transport_sides:open_many", count=3, **what) as other:
                    assert [how for how, _ in other.expect("opened")["how"]] == ["shm"] * 3
                many.send_line("close")
                many.expect("closed")


def test_another_user() -> None:
    nobody = "65534"
    with server() as serving, client(serving.port, "auto", nobody) as dialing:
        assert over_zmq(serving, dialing) == (
            "client: the server's segments belong to another user"
        )


def test_a_server_that_offers_zmq_only() -> None:
    with server("zmq") as serving, client(serving.port) as dialing:
        assert over_zmq(serving, dialing) == "server: it offers zmq only"
        with client(serving.port, "shm") as forced:
            assert "'zmq'" in unavailable(forced)


@pytest.fixture
def other_network() -> Iterator[tuple[list[str], str]]:
    """A prefix that runs in another network namespace, and this one's address there."""
    name = f"mtrn{os.getpid() % 10**6}"
    here, there = f"{name}a", f"{name}b"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        ip("netns", "add", name)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        ip("address", "add", "198.18.77.1/30", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", name, "address", "add", "198.18.77.2/30", "dev", there)
        ip("-n", name, "link", "set", there, "up")
        yield ["ip", "netns", "exec", name], "198.18.77.1"
    finally:
        ip("netns", "delete", name)


def test_a_client_in_another_network_namespace(other_network) -> None:
    prefix, address = other_network
    with (
        server(host="0.0.0.0") as serving,  # noqa: S104  the address that is meant
        client(serving.port, host=address, prefix=prefix) as dialing,
    ):
        assert over_zmq(serving, dialing) == (
            "client: the server's socket cannot be reached (another network namespace)"
        )
        with client(serving.port, "shm", host=address, prefix=prefix) as forced:
            assert "another network namespace" in unavailable(forced)
