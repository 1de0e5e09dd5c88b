"""Where policy servers start, and which one a worker asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

from runtime.fleet.cluster import Node

Key = TypeVar("Key")
ROUNDING = 1e-6
"""Of sums of fractions of a GPU; Ray counts in steps of 1e-4."""


def node_for_server(nodes: Sequence[Node], taken: Counter[str], gpus: float) -> Node | None:
    """Return the node with the fewest servers; None if the servers leave no node enough GPUs.

    Among equals it is the one with most GPUs and then most CPUs.

    Args:
        nodes: That are alive.
        taken: Number of servers by node id.
        gpus: That each server reserves.
    """
    able = [n for n in nodes if n.gpus - taken[n.node_id] * gpus > gpus - ROUNDING]
    return min(able, key=lambda n: (taken[n.node_id], -n.gpus, -n.cpus), default=None)


def nearest_server(
    node_id: str, servers: Mapping[Key, str], load: Counter[Key], own: Key | None = None
) -> Key | None:
    """Return the server that a worker should use: on its node if there is one, then least loaded.

    Args:
        node_id: The worker's.
        servers: The node id of each server that is ready.
        load: Workers of each server.
        own: The server that the worker has, which counts in ``load``. It keeps it unless another
            is on its node while its own is not, or has at least two workers fewer.

    Returns:
        None if no server is ready.
    """

    def cost(server: Key) -> tuple[bool, int]:
        return servers[server] != node_id, load[server] - (server == own)

    best = min(servers, key=cost, default=None)
    if best is None or own is None or own not in servers:
        return best
    return best if cost(best)[0] < cost(own)[0] or cost(best)[1] < cost(own)[1] else own
