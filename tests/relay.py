"""A TCP relay that delays, stalls and cuts, where the kernel cannot: ``python tests/relay.py``.

``--to HOST:PORT`` says where to; it prints the port it listens on. Every piece of a stream is
passed on after ``--delay`` ± ``--jitter`` milliseconds, in order. On standard input: ``stall S``
passes nothing on for S seconds, ``cut S`` closes every connection and accepts none for S seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from collections import deque


class Relay:
    """One listener and its connections.

    Args:
        host, port: Where to.
        delay_s, jitter_s: Each way.
        seed: Of the jitter.
    """

    def __init__(self, host: str, port: int, delay_s: float, jitter_s: float, seed: int) -> None:
        self._to = (host, port)
        self._delay_s, self._jitter_s = delay_s, jitter_s
        self._random = random.Random(seed)
        self._still_until_s = 0.0
        self._cut_until_s = 0.0
        self._writers: set[asyncio.StreamWriter] = set()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._cut_until_s:
            writer.close()
            return
        try:
            there = await asyncio.open_connection(*self._to)
        except OSError:
            writer.close()
            return
        self._writers |= {writer, there[1]}
        await asyncio.gather(self._pass(reader, there[1]), self._pass(there[0], writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pieces: deque[tuple[float, bytes]] = deque()
        arrived = asyncio.Event()
        sender = asyncio.create_task(self._send(pieces, arrived, writer))
        due_s = 0.0
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                delay_s = self._delay_s + self._random.uniform(-1, 1) * self._jitter_s
                due_s = max(due_s, time.monotonic() + delay_s)
                pieces.append((due_s, data))
                arrived.set()
        pieces.append((due_s, b""))
        arrived.set()
        await sender

    async def _send(
        self,
        pieces: deque[tuple[float, bytes]],
        arrived: asyncio.Event,
        writer: asyncio.StreamWriter,
    ) -> None:
        with contextlib.suppress(OSError):
            while True:
                await arrived.wait()
                due_s, data = pieces[0]
                wait_s = max(due_s, self._still_until_s) - time.monotonic()
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                    continue
                pieces.popleft()
                if not pieces:
                    arrived.clear()
                if not data:
                    break
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)

    def stall(self, seconds: float) -> None:
        self._still_until_s = time.monotonic() + seconds

    def cut(self, seconds: float) -> None:
        self._cut_until_s = time.monotonic() + seconds
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def serve(relay: Relay) -> None:
    server = await asyncio.start_server(relay.accept, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        word, _, seconds = line.partition(" ")
        {"stall": relay.stall, "cut": relay.cut}[word](float(seconds))
    relay.cut(0.0)
    server.close()


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__)
    cli.add_argument("--to", required=True)
    cli.add_argument("--delay", type=float, default=5.0, help="ms")
    cli.add_argument("--jitter", type=float, default=2.0, help="ms")
    cli.add_argument("--seed", type=int, default=0)
    args = cli.parse_args()
    host, _, port = args.to.rpartition(":")
    relay = Relay(host, int(port), args.delay / 1e3, args.jitter / 1e3, args.seed)
    asyncio.run(serve(relay))


if __name__ == "__main__":
    main()
