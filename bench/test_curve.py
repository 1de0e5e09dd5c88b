"""What encryption costs: the same request over ZMQ with CURVE and without.

    pytest bench/test_curve.py --long

A server with a policy that is free, a client in this process, loopback; in turns, in blocks.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from bench.null_policy import NullPolicy
from bench.records import Records
from runtime.client import PolicyClient
from runtime.server.server_process import ServerProcess
from runtime.server.warmup import synthetic_observation
from runtime.tools.keys import allow, new_keys

BLOCK, WARMUP = 50, 20
CAMERAS = {"1 image": "one_camera", "4 images": "four_cameras"}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("payload", CAMERAS)
def test_curve(
    payload: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    records: Records,
    pytestconfig: pytest.Config,
) -> None:
    blocks = 40 if pytestconfig.getoption("--long") else 4
    keys, listed = tmp_path / "keys", tmp_path / "allowed"
    server_public, server_secret = new_keys(keys, "server")
    client_public, client_secret = new_keys(keys, "client")
    allow(client_public, listed)
    model = ("-m", f"python:{NullPolicy.__module__}:{CAMERAS[payload]}", "--transport", "zmq")
    with ExitStack() as stack:
        plain = stack.enter_context(ServerProcess(model))
        secret = stack.enter_context(
            ServerProcess((*model, "--curve_key", str(server_secret), "--curve_allow", str(listed)))
        )
        given = {"server_key": str(server_public), "client_key": str(client_secret)}
        clients = {
            "zmq": stack.enter_context(PolicyClient(plain.address)),
            "zmq, CURVE": stack.enter_context(PolicyClient(secret.address, **given)),
        }
        obs = synthetic_observation(clients["zmq"].contract)
        spans: dict[str, list[float]] = {name: [] for name in clients}
        for client in clients.values():
            for _ in range(WARMUP):
                client.infer(obs)
        for _ in range(blocks):
            for name, client in clients.items():
                for _ in range(BLOCK):
                    began_s = time.perf_counter()
                    client.infer(obs)
                    spans[name].append((time.perf_counter() - began_s) * 1e6)
    records.add(f"encryption, {payload}", {name: np.array(each) for name, each in spans.items()})
    ratio = float(np.median(spans["zmq, CURVE"]) / np.median(spans["zmq"]))
    records.values[f"{payload}, CURVE ÷ plain"] = ratio
    more_us = float(np.median(spans["zmq, CURVE"]) - np.median(spans["zmq"]))
    with capsys.disabled():
        print(f"\n{payload}: CURVE ÷ plain {ratio:.2f}, {more_us / 1e3:.2f} ms more")
    records.save("curve", f"encryption, {payload}")
