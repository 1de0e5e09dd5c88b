"""Clients of the four protocols with canned requests, in one process: bytes out, bytes in.

``python -m bench.gateways.raw_clients ORDER``: JSON with ``contract``, ``seconds`` and
``addresses``, pairs of protocol and address with a client each.

Nothing is encoded or decoded while they ask, so the process takes little of the machine. Each
client has a thread and asks again as soon as it has its answer. Prints the answers of each as JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import socket
import struct
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import grpc
import msgpack
import numpy as np
import zmq
from websockets.sync.client import connect

from policies.types import MetaObs, PolicyContract
from runtime.server.warmup import synthetic_observation
from transport.address import parse_address

END = 3
"""LeRobot's state of an observation that is sent whole."""
TIMEOUT_S = 60.0
OPEN = contextlib.ExitStack()
"""Connections that have to be closed."""
Ask = Callable[[], int]
"""One exchange; returns the bytes of the answer, 0 for an error."""


def as_foreign(module: str, name: str, **fields: Any) -> bytes:
    """The pickle of an object of a class that only its reader has."""
    kind = type(name, (), {"__module__": module})
    made: Any = kind()
    made.__dict__.update(fields)
    path = module.split(".")
    names = [".".join(path[: i + 1]) for i in range(len(path))]
    sys.modules.update({one: types.ModuleType(one) for one in names})
    setattr(sys.modules[module], name, kind)
    try:
        return pickle.dumps(made)
    finally:
        for one in names:
            del sys.modules[one]


def openpi(host: str, port: int, contract: PolicyContract, obs: MetaObs) -> Ask:
    def array(value: Any) -> dict[bytes, Any]:
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }

    pictures = {f"images/{name}": array(image) for name, image in obs.images.items()}
    frame = msgpack.packb({**pictures, "state": array(obs.state), "prompt": ""})
    connection = OPEN.enter_context(connect(f"ws://{host}:{port}", compression=None, max_size=None))
    connection.recv()

    def ask() -> int:
        connection.send(frame)
        answer = connection.recv(TIMEOUT_S)
        return len(answer) if isinstance(answer, bytes) else 0

    return ask


def groot(host: str, port: int, contract: PolicyContract, obs: MetaObs) -> Ask:
    def array(value: Any) -> dict[str, Any]:
        file = io.BytesIO()
        np.save(file, value[None, None])
        return {"__ndarray_class__": True, "as_npy": file.getvalue()}

    observation = {
        "video": {name: array(image) for name, image in obs.images.items()},
        "state": {"state": array(obs.state)},
        "language": {"task": [[""]]},
    }
    data = {"observation": observation, "options": None}
    request = msgpack.packb({"endpoint": "get_action", "data": data})
    asking = zmq.Context.instance().socket(zmq.REQ)
    asking.set(zmq.RCVTIMEO, round(TIMEOUT_S * 1e3))
    asking.connect(f"tcp://{host}:{port}")

    def ask() -> int:
        asking.send(request)
        answer = asking.recv()
        return 0 if b"error" in answer[:20] else len(answer)

    return ask


def ilstudio(host: str, port: int, contract: PolicyContract, obs: MetaObs) -> Ask:
    pictures = [image.transpose(2, 0, 1) for image in obs.images.values()]
    message = as_foreign(
        *("benchmark.base", "MetaObs"),
        state=obs.state[None],
        image=np.stack(pictures)[None],
        raw_lang=[""],
        timestep=None,
    )
    request = struct.pack(">I", len(message)) + message
    connection = socket.create_connection((host, port), TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    file = connection.makefile("rb")
    least = 4 * contract.action_dim * contract.chunk_size

    def ask() -> int:
        connection.sendall(request)
        (size,) = struct.unpack(">I", file.read(4))
        answer = file.read(size)
        return len(answer) if len(answer) >= least else 0

    return ask


def lerobot(host: str, port: int, contract: PolicyContract, obs: MetaObs) -> Ask:
    helpers = "lerobot.async_inference.helpers"
    motors = [f"motor_{i}.pos" for i in range(contract.state_dim)]
    names = list(contract.state_names) or motors
    features = {
        "observation.state": {"dtype": "float32", "shape": (len(names),), "names": names},
        **{
            f"observation.images.{name}": {
                "dtype": "image",
                "shape": image.shape,
                "names": ["height", "width", "channels"],
            }
            for name, image in obs.images.items()
        },
    }
    instructions = as_foreign(
        *(helpers, "RemotePolicyConfig"),
        policy_type=contract.policy_type,
        pretrained_name_or_path="-",
        lerobot_features=features,
        actions_per_chunk=contract.chunk_size,
        device="cpu",
        rename_map={},
    )
    state = dict(zip(names, map(float, obs.state), strict=True))
    observation = as_foreign(
        *(helpers, "TimedObservation"),
        timestamp=0.0,
        timestep=0,
        observation={**state, **obs.images, "task": ""},
        must_go=True,
    )
    sent = protobuf(2, observation, 1, END)
    channel = grpc.insecure_channel(
        f"{host}:{port}", (("grpc.use_local_subchannel_pool", 1),)
    )  # a connection of its own: a session is a connection
    service = "/transport.AsyncInference/"
    channel.unary_unary(service + "Ready")(b"", timeout=TIMEOUT_S)
    instruct = channel.unary_unary(service + "SendPolicyInstructions")
    instruct(protobuf(1, instructions), timeout=TIMEOUT_S)
    observe = channel.stream_unary(service + "SendObservations")
    get = channel.unary_unary(service + "GetActions")

    def ask() -> int:
        observe(iter([sent]), timeout=TIMEOUT_S)
        return len(get(b"", timeout=TIMEOUT_S))

    return ask


def protobuf(field: int, data: bytes, *number: int) -> bytes:
    """A message with ``data`` as a field, after a field that is a small number if there is one."""
    head = bytes((number[0] << 3, number[1])) if number else b""
    size, length = len(data), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return head + bytes((field << 3 | 2,)) + bytes(length) + data


CLIENTS = {"openpi": openpi, "groot": groot, "ilstudio": ilstudio, "lerobot": lerobot}


def ask_for(seconds: float, ask: Ask, counts: list[dict[str, Any]], protocol: str) -> None:
    until_s = time.monotonic() + seconds
    answered, failed, why = 0, 0, ""
    while time.monotonic() < until_s and failed < 10:
        try:
            good = ask() > 0
        except Exception as error:
            good, why = False, repr(error)[:300]
        answered, failed = answered + good, failed + (not good)
    counts.append({"protocol": protocol, "answered": answered, "failed": failed, "why": why})


def main() -> None:
    order = json.loads(sys.argv[1])
    contract = PolicyContract.from_json(order["contract"])
    asks = []
    for number, (protocol, address) in enumerate(order["addresses"]):
        obs = synthetic_observation(contract, number)
        asks.append((protocol, CLIENTS[protocol](*parse_address(address), contract, obs)))
        asks[-1][1]()  # opens its session
    print(json.dumps("ready"), flush=True)
    sys.stdin.readline()
    counts: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=ask_for, args=(order["seconds"], ask, counts, protocol))
        for protocol, ask in asks
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(counts), flush=True)
    OPEN.close()


if __name__ == "__main__":
    main()
