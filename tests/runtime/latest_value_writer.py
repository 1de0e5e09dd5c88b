"""Writes numbers into a mailbox as fast as it can, from where its predecessor stopped."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from runtime.eval_real.shared_state import Dims, SharedState

box = SharedState(int(sys.argv[1]), Dims(state=500, action=3, chunk=5))
latest, queue = box.latest_writer("commands"), box.queue_writer("joints")
number = queue._slots.head.load()
while True:
    views = queue.claim()
    if views is None:
        continue
    number += 1
    views["position"][:] = number
    views["stamp_ns"][...] = number
    queue.publish()
    views = latest.claim()
    views["tick"][...] = number
    views["velocity"][:] = number
    latest.publish()
