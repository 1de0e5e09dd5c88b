"""The Ray cluster that an evaluation runs on: connects to one that runs, or starts a local one.

Ray's usage reports and dashboard are off in a cluster that is started here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import socket
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from runtime.fleet import package_stamp
from runtime.fleet.errors import FleetError
from runtime.options.fleet import RUNNING_OR_LOCAL
from transport.address import parse_address
from transport.errors import TransportError

logger = logging.getLogger(__name__)

PROBE_WITHIN_S = 3.0
CHECK_WITHIN_S = 60.0
"""For every node to start a process and hash its sources."""
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""A client's preface and empty settings (RFC 9113, 3.4 and 6.5)."""
_SETTINGS = 4


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster.

    Attributes:
        node_id: Ray's id.
        address: Its IP address.
        cpus, gpus: What it offers to actors.
    """

    node_id: str
    address: str
    cpus: float
    gpus: float


class _LoggedLines(io.TextIOBase):
    """A text stream that logs what is written."""

    def write(self, text: str) -> int:
        for line in filter(str.strip, text.splitlines()):
            logger.info("%s", line)
        return len(text)


def import_ray() -> ModuleType:
    """Import Ray with its usage reports off. Raises ``FleetError``: it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise FleetError(
            "--ray: Ray is not installed in this environment, expected pip install '.[ray]'"
        ) from error
    return ray  # type: ignore[no-any-return]


@contextlib.contextmanager
def connected(address: str, cpus: float) -> Iterator[ModuleType]:
    """Connect to a cluster for the time of the block; yield the module ``ray``.

    What Ray prints goes to the log.

    Args:
        address: ``HOST:PORT`` of the cluster's head, or ``RUNNING_OR_LOCAL``.
        cpus: What the actors will reserve. A local cluster offers at least that much.

    Raises:
        FleetError: Ray is not installed, no cluster answers at ``address``, it has too few CPUs, or
            one of its nodes has other sources of this package.
    """
    ray = import_ray()
    found = _running_address() if address == RUNNING_OR_LOCAL else _checked_address(address)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    on_term = signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(_LoggedLines()):
        try:
            if found:
                ray.init(found, **quiet)
            else:
                os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 yields to all others
                offered = max(float(os.cpu_count() or 1), cpus)
                ray.init("local", num_cpus=offered, include_dashboard=False, **quiet)
        except Exception as error:  # Ray raises whatever its libraries raise
            what = f"the cluster at {found}" if found else "a local cluster"
            raise FleetError(f"--ray: {what} does not accept this process: {error}") from error
        finally:
            signal.signal(signal.SIGTERM, on_term)  # Ray's handler would exit without a result
        try:
            _check_size(live_nodes(ray), cpus)
            _check_sources(ray)
            yield ray
        finally:
            ray.shutdown()


def live_nodes(ray: ModuleType) -> list[Node]:
    """Return the cluster's nodes that are alive."""
    return [
        Node(
            str(node["NodeID"]),
            str(node["NodeManagerAddress"]),
            float(node["Resources"].get("CPU", 0.0)),
            float(node["Resources"].get("GPU", 0.0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def _running_address() -> str:
    """The address of the cluster that runs on this machine; empty without one.

    Ray's own search waits for minutes if the last cluster was killed.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address and address != RUNNING_OR_LOCAL:
        return _checked_address(address)
    folder = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()))
    try:
        address = (folder / "ray" / "ray_current_cluster").read_text(encoding="utf-8").strip()
        return _checked_address(address)
    except (OSError, FleetError):
        return ""


def _checked_address(address: str) -> str:
    """Return ``address`` if a gRPC server answers there. Raises ``FleetError``."""
    expected = "expected HOST:PORT of a cluster's head, as `ray start --head` prints it"
    try:
        host_port = parse_address(address)
    except TransportError as error:
        raise FleetError(f"--ray {address}: {error}; {expected}") from error
    try:
        with socket.create_connection(host_port, PROBE_WITHIN_S) as probe:
            probe.sendall(_HTTP2_HELLO)
            head = probe.recv(9, socket.MSG_WAITALL)
    except OSError as error:
        raise FleetError(f"--ray {address}: no cluster answers ({error}), {expected}") from error
    if len(head) < 9 or struct.unpack(">xxxBBL", head)[0] != _SETTINGS:
        raise FleetError(f"--ray {address}: what answers is no Ray cluster, {expected}")
    return address


def _check_size(nodes: list[Node], cpus: float) -> None:
    total = sum(node.cpus for node in nodes)
    if cpus > total:
        raise FleetError(
            f"--num_envs, --env_cpus: got {cpus:g} CPUs in all, expected at most "
            f"{total:g}, which the cluster's {len(nodes)} nodes have"
        )


def _check_sources(ray: ModuleType) -> None:
    """Raise ``FleetError`` for the first node whose sources of this package are others."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(package_stamp)
    task = ray.remote(num_cpus=0, max_retries=0)(package_stamp.package_stamp)
    tasks = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote(): node
        for node in live_nodes(ray)
    }
    done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=CHECK_WITHIN_S)
    if late:
        raise FleetError(
            f"node {tasks[late[0]].address} did not start a process within {CHECK_WITHIN_S:g} s"
        )
    for answer in done:
        try:
            theirs = ray.get(answer)
        except ray.exceptions.RayError as error:
            raise FleetError(f"node {tasks[answer].address}: {error}") from error
        check_stamp(tasks[answer].address, theirs)


def check_stamp(address: str, theirs: str) -> None:
    """Raise ``FleetError`` if the node at ``address`` has other sources than this process.

    Args:
        address: For the message.
        theirs: What ``package_stamp`` returned there.
    """
    ours = package_stamp.package_stamp()
    if not package_stamp.same_sources(ours, theirs):
        raise FleetError(
            f"node {address}: got this package as {theirs}, expected {ours}, as on this machine"
        )
