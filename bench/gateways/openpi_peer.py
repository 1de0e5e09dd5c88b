"""openpi's side of ``bench.gateways.openpi``; runs in an environment that has ``openpi-client``.

``serve SOURCE PORT`` runs openpi's own server with a policy that answers zeros; ``ask BLOCKS BLOCK
URL URL ...`` prints the round trips of openpi's client as JSON: URL to microseconds.
"""

import importlib.util
import json
import pathlib
import sys
import time

import numpy as np

STATE, CHUNK = 14, 100


class Zeros:
    def infer(self, _: dict) -> dict:
        return {"actions": np.zeros((CHUNK, STATE), np.float32)}


def serve(source: str, port: str) -> None:
    path = pathlib.Path(source) / "src/openpi/serving/websocket_policy_server.py"
    spec = importlib.util.spec_from_file_location("websocket_policy_server", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.WebsocketPolicyServer(Zeros(), "127.0.0.1", int(port)).serve_forever()


def ask(blocks: str, block: str, *urls: str) -> None:
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    generator = np.random.default_rng(1)
    observation = {
        "observation/image": generator.integers(0, 256, (480, 640, 3), np.uint8),
        "observation/state": np.zeros(STATE, np.float32),
        "prompt": "pick up the cube",
    }
    clients = {url: WebsocketClientPolicy(url) for url in urls}
    taken_us = {url: [] for url in urls}
    for number in range(int(blocks) + 1):  # the first block is for warming up
        for url, client in clients.items():
            for _ in range(int(block)):
                began = time.perf_counter()
                actions = client.infer(observation)["actions"]
                if number:
                    taken_us[url].append((time.perf_counter() - began) * 1e6)
                assert actions.shape == (CHUNK, STATE) and not actions.any()
    print(json.dumps(taken_us))


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
