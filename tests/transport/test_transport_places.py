"""Where shared memory cannot be had, ZMQ is used, and the reason is said on both sides.

Mount and network namespaces stand in for containers and other hosts; they take root.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from transport_peers import Peer, client, server

OWN_SHM = 'mount -t tmpfs -o size=$0 tmpfs /dev/shm && exec "$@"'


def isolated(size: str) -> list[str]:
    """Run what follows with a /dev/shm of its own."""
    return ["unshare", "-m", "sh", "-c", OWN_SHM, size]


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
            "(another host, container or mount namespace)"
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
