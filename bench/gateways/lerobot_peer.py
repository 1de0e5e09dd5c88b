"""LeRobot's side of the benchmark, in LeRobot's environment: imports nothing of this project.

PYTHON lerobot_peer.py serve PORT
PYTHON lerobot_peer.py ask BLOCKS BLOCK ADDRESS...
"""

from __future__ import annotations

import json
import pickle
import sys
import time
from concurrent import futures

import grpc
import numpy as np
import torch
from lerobot.async_inference.configs import PolicyServerConfig
from lerobot.async_inference.helpers import RemotePolicyConfig, TimedObservation
from lerobot.async_inference.policy_server import PolicyServer
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.transport import services_pb2, services_pb2_grpc
from lerobot.transport.utils import grpc_channel_options, send_bytes_in_chunks

CAMERA, SIZE, STATE, CHUNK = "image0", (480, 640), 14, 100
MOTORS = [f"motor_{i}.pos" for i in range(STATE)]
WARMUP = 10


class Config:
    image_features = {  # noqa: RUF012
        f"observation.images.{CAMERA}": PolicyFeature(FeatureType.VISUAL, (3, *SIZE))
    }


class ZeroPolicy:
    """Answers zeros."""

    config = Config()

    def predict_action_chunk(self, _: object) -> torch.Tensor:
        return torch.zeros(1, CHUNK, STATE)


class ZeroServer(PolicyServer):
    """LeRobot's server with a policy that is not loaded."""

    def SendPolicyInstructions(self, request, context):  # noqa: N802
        sent = pickle.loads(request.data)
        self.device, self.policy_type, self.policy = "cpu", "act", ZeroPolicy()
        self.lerobot_features = sent.lerobot_features
        self.actions_per_chunk = sent.actions_per_chunk
        self.preprocessor = self.postprocessor = lambda value: value
        return services_pb2.Empty()


def serve(port: int) -> None:
    config = PolicyServerConfig(host="127.0.0.1", port=port, inference_latency=0)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))  # as its command
    services_pb2_grpc.add_AsyncInferenceServicer_to_server(ZeroServer(config), server)
    server.add_insecure_port(f"{config.host}:{config.port}")
    server.start()
    server.wait_for_termination()


class Client:
    """The calls of LeRobot's client: it always waits for actions when it sends an observation."""

    def __init__(self, address: str) -> None:
        channel = grpc.insecure_channel(address, grpc_channel_options())
        grpc.channel_ready_future(channel).result(60)
        self.stub = services_pb2_grpc.AsyncInferenceStub(channel)
        self.stub.Ready(services_pb2.Empty())
        features = {
            "observation.state": {"dtype": "float32", "shape": (STATE,), "names": MOTORS},
            f"observation.images.{CAMERA}": {
                "dtype": "image",
                "shape": (*SIZE, 3),
                "names": ["height", "width", "channels"],
            },
        }
        config = RemotePolicyConfig("null", "user/model", features, CHUNK)
        self.stub.SendPolicyInstructions(services_pb2.PolicySetup(data=pickle.dumps(config)))
        self.picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
        self.timestep = 0

    def ask(self) -> float:
        """Microseconds from an observation to its actions."""
        self.timestep += CHUNK
        seen = {**dict.fromkeys(MOTORS, float(self.timestep)), CAMERA: self.picture, "task": "x"}
        pending = self.stub.GetActions.future(services_pb2.Empty())
        time.sleep(0.002)
        began = time.perf_counter()
        sent = TimedObservation(time.time(), self.timestep, seen, must_go=True)
        parts = send_bytes_in_chunks(pickle.dumps(sent), services_pb2.Observation)
        self.stub.SendObservations(parts)
        actions = pickle.loads(pending.result().data)
        taken_s = time.perf_counter() - began
        assert len(actions) == CHUNK and actions[0].get_timestep() == self.timestep
        assert actions[0].get_action().shape == (STATE,)
        return taken_s * 1e6


def ask(blocks: int, block: int, addresses: list[str]) -> dict[str, list[float]]:
    clients = {address: Client(address) for address in addresses}
    taken_us: dict[str, list[float]] = {address: [] for address in addresses}
    for client in clients.values():
        for _ in range(WARMUP):
            client.ask()
    for _ in range(blocks):
        for address, client in clients.items():
            taken_us[address] += [client.ask() for _ in range(block)]
    return taken_us


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(json.dumps(ask(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
