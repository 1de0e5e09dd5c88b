"""iceoryx2: two publish-subscribe services, loans written and samples read in place, busy polling.

As its own benchmark does it. Services of bytes rather than of a structure, as for images of any
size. The files it makes lie in a folder and under a prefix of their own.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import iceoryx2 as iox
import numpy as np

from bench.contestant import Exchange
from bench.payload import Sink, Source
from transport.shm.segment import FOLDER

_Bytes = iox.Slice[ctypes.c_uint8]


def _prefix(folder: str) -> str:
    return f"{Path(folder).name}_"


def _node(folder: str) -> Any:
    iox.set_log_level(iox.LogLevel.Error)
    config = iox.config.default()
    config.global_cfg.root_path = iox.Path.new(folder)
    config.global_cfg.prefix = iox.FileName.new(_prefix(folder))
    return iox.NodeBuilder.new().config(config).create(iox.ServiceType.Ipc)


def _service(node: Any, name: str) -> Any:
    builder = node.service_builder(iox.ServiceName.new(name)).publish_subscribe(_Bytes)
    return builder.payload_alignment(iox.Alignment.new(64)).open_or_create()


def _publisher(service: Any, nbytes: int) -> Any:
    return service.publisher_builder().initial_max_slice_len(nbytes).create()


def _parts(arrays: dict[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """(address, offset in the message, length) of each array."""
    parts, offset = [], 0
    for array in arrays.values():
        parts.append((array.ctypes.data, offset, array.nbytes))
        offset += array.nbytes
    return parts


class Iceoryx:
    name, busy = "iceoryx2", True

    def serve(self, sink: Sink, link: Connection) -> None:
        node = _node(link.recv())
        subscriber = _service(node, "observation").subscriber_builder().create()
        publisher = _publisher(_service(node, "reply"), sink.payload.reply.nbytes)
        link.send(None)
        parts, move = _parts(sink.mirror), ctypes.memmove
        while True:
            while (sample := subscriber.receive()) is None:
                pass
            start = sample.payload_ptr
            for address, offset, length in parts:
                move(address, start + offset, length)
            sample.delete()
            actions = sink.answer()
            loan = publisher.loan_slice_uninit(actions.nbytes)
            move(loan.payload_ptr, actions.ctypes.data, actions.nbytes)
            loan.assume_init().send()

    @contextmanager
    def connect(self, source: Source, link: Connection) -> Iterator[Exchange]:
        folder = tempfile.mkdtemp(prefix="iceoryx2_bench_")
        try:
            link.send(folder)
            link.recv()
            node = _node(folder)
            publisher = _publisher(_service(node, "observation"), source.payload.nbytes)
            subscriber = _service(node, "reply").subscriber_builder().create()
            publisher.update_connections()
            parts, move, nbytes = _parts(source.arrays), ctypes.memmove, source.payload.nbytes
            actions, length = source.actions.ctypes.data, source.actions.nbytes

            def exchange() -> None:
                loan = publisher.loan_slice_uninit(nbytes)
                start = loan.payload_ptr
                for address, offset, count in parts:
                    move(start + offset, address, count)
                loan.assume_init().send()
                while (sample := subscriber.receive()) is None:
                    pass
                move(actions, sample.payload_ptr, length)
                sample.delete()

            yield exchange
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            for left in FOLDER.glob(f"{_prefix(folder)}*"):
                left.unlink(missing_ok=True)


CONTESTANTS = (Iceoryx(),)
