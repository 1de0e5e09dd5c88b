"""Another host, where there is one machine: a network namespace behind a pair of virtual cables."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

_PID = os.getpid()  # tests that run in several processes must not share a cable
_NET = f"10.{200 + _PID % 50}.{_PID // 50 % 250}"
SPACE, OUTSIDE, INSIDE = f"metronome-test-{_PID}", f"{_NET}.1", f"{_NET}.2"
"""The namespace, this host's address on the cable, and the other's."""
OUTER, INNER = f"metro{_PID}a", f"metro{_PID}b"
"""The two ends of the cable."""


class NoOtherHost(Exception):
    """This machine cannot make one; says why."""


def ip(*words: str) -> None:
    """Raises ``subprocess.CalledProcessError``."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def slow_cable(kbit_per_s: int) -> Iterator[None]:
    """What crosses the cable crosses it no faster, each way, and waits its turn meanwhile."""
    shape = ["tbf", "rate", f"{kbit_per_s}kbit", "burst", "16kb", "latency", "2s"]
    subprocess.run(["tc", "qdisc", "add", "dev", OUTER, "root", *shape], check=True)
    inside = ["ip", "netns", "exec", SPACE]
    subprocess.run([*inside, "tc", "qdisc", "add", "dev", INNER, "root", *shape], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", OUTER, "root"], check=True)
        subprocess.run([*inside, "tc", "qdisc", "del", "dev", INNER, "root"], check=True)


@contextlib.contextmanager
def unplugged() -> Iterator[None]:
    """Nothing crosses the cable, and nobody is told."""
    ip("link", "set", OUTER, "down")
    try:
        yield
    finally:
        ip("link", "set", OUTER, "up")


@contextlib.contextmanager
def other_host() -> Iterator[tuple[str, ...]]:
    """What to put before a command that shall run there; it listens at ``INSIDE``.

    Raises:
        NoOtherHost: As it says.
    """
    if os.geteuid() != 0 or not shutil.which("ip"):
        raise NoOtherHost("needs root and the ip command (apt-get install iproute2)")
    try:
        ip("netns", "add", SPACE)
    except subprocess.CalledProcessError as error:
        raise NoOtherHost(f"no network namespace can be made here: {error}") from error
    try:
        ip("link", "add", OUTER, "type", "veth", "peer", "name", INNER, "netns", SPACE)
        ip("addr", "add", f"{OUTSIDE}/30", "dev", OUTER)
        ip("link", "set", OUTER, "up")
        ip("-n", SPACE, "addr", "add", f"{INSIDE}/30", "dev", INNER)
        ip("-n", SPACE, "link", "set", INNER, "up")
        ip("-n", SPACE, "link", "set", "lo", "up")
        yield ("ip", "netns", "exec", SPACE)
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", OUTER)
        ip("netns", "del", SPACE)
