"""What ``metronome top`` shows of many clients."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from runtime.gateway.lerobot.peer import plain_address
from runtime.tools.top import FILE_COLUMNS, render


def session(client: str) -> dict[str, Any]:
    return {
        **{"id": 1, "client": client, "kind": "robot", "peer": "local", "transport": "shm"},
        **{"rate_hz": 12.3, "latency_ms": {"p50": 1.2, "p99": 33.3}, "answered": 123_456},
        **{"superseded": 12, "late": 0, "failed": 3, "batches": {1: 100, 2: 30}, "idle_s": 777},
    }


def shown(*clients: str) -> str:
    policy = {"id": 1, "checkpoint": "x", "device": "cpu", "engine": "e", "precision": "fp32"}
    status = {"address": "a", "up_s": 3, "policy": policy, "counts": {}, "costs_ms": {}}
    out = io.StringIO()
    Console(width=FILE_COLUMNS, file=out).print(
        render({**status, "sessions": [session(client) for client in clients]})
    )
    return out.getvalue()


def test_addresses_are_wrapped_not_cut() -> None:
    text = shown("lerobot 127.0.0.1:54321", "ilstudio 192.168.100.101:54322 [11]")
    assert "127.0.0.1:54321" in text
    assert ":54322 [11]" in text
    assert "777" in text  # the last column is still there


def test_a_very_long_name_loses_its_middle() -> None:
    text = shown(f"beginning{'x' * 500}127.0.0.1:54321")
    assert "beginning" in text
    assert "54321" in text
    assert len(text.splitlines()) < 15


@pytest.mark.parametrize(
    ("name", "address"),
    [("ipv4:127.0.0.1:54321", "127.0.0.1:54321"), ("ipv6:%5B::1%5D:80", "[::1]:80")],
)
def test_a_lerobot_client_has_a_plain_address(name: str, address: str) -> None:
    assert plain_address(name) == address
