"""As much of ``torch.cuda`` as making a ``TorchCuda`` calls."""

from __future__ import annotations

import contextlib

import torch


class StubStream:
    is_a_stream = True

    def __init__(self, *_args, **_flags) -> None:
        pass


def stub_cuda(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", StubStream)
    monkeypatch.setattr(torch.cuda, "Event", StubStream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
