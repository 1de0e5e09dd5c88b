"""A worker of the arena without torch, which does what STUB_WORKERS (JSON: name to deed) says."""

from __future__ import annotations

import json
import os
import sys
import time
from multiprocessing.connection import Connection

import numpy as np

from bench.inference.worker import Block, Failed, Order, Started, Task


def main(fd: int) -> None:
    link = Connection(fd)
    task: Task = link.recv()
    deed = json.loads(os.environ["STUB_WORKERS"]).get(task.contestant.name, "answers")
    if deed == "dies at its start":
        sys.stderr.write("a warning\nno such kernel image\n")
        sys.stderr.flush()
        os._exit(7)
    if deed == "fails at its start":
        link.send(Failed("RuntimeError: CUDA out of memory"))
        return
    link.send(Started(0.1, 0.1, 0.001, 1, 2, np.zeros((1, 1, 1), np.float32)))
    blocks = 0
    while True:
        order: Order = link.recv()
        blocks += 1
        if deed == "dies in a block" and blocks == 2:
            os._exit(9)
        if deed == "hangs in a block" and blocks == 2:
            time.sleep(60)
        link.send(Block(np.full(order.calls, 0.001), 1.0, 0.0))


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except EOFError:
        sys.exit(0)
