"""A Ray cluster of several nodes on this machine, in a process of its own.

    python -m tests.fleet.cluster_process NODES CPUS [HEAD_IP]

Writes one JSON line: the address, and the process ids of the nodes' raylets. Each line on standard
input adds a node and writes its process id; the cluster ends with standard input.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

STORE_BYTES = 80 * 2**20
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 4,
}
"""A dead node is noticed after 2 s; with Ray's own values after about 15 s."""


def main() -> None:
    from ray.cluster_utils import Cluster

    count, cpus = int(sys.argv[1]), float(sys.argv[2])
    head: dict[str, Any] = {"num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH}
    place = {"node_ip_address": sys.argv[3]} if len(sys.argv) > 3 else {}
    head |= place
    cluster = Cluster(
        initialize_head=True, head_node_args={**head, "object_store_memory": STORE_BYTES}
    )

    def add() -> int:
        node: Any = cluster.add_node(num_cpus=cpus, object_store_memory=STORE_BYTES, **place)
        return int(node.all_processes["raylet"][0].process.pid)

    raylets = [add() for _ in range(count)]
    sys.stdout.write(f"{json.dumps({'address': cluster.address, 'raylets': raylets})}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        sys.stdout.write(f"{json.dumps(add())}\n")
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main()
