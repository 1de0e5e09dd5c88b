"""Writes numbers into a latest value and a queue as fast as it can, from where its predecessor
stopped."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared_values import Shared, put

shared = Shared(int(sys.argv[1]))
latest, queue = shared.latest_writer(), shared.queue_writer()
number = queue.published
while True:
    if put(queue, number + 1):
        number += 1
        put(latest, number)
