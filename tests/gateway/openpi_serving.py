"""A policy server, openpi's gateway to it, and raw clients, for tests."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from websockets.sync.client import ClientConnection, connect

from policies.types import ActionChunk, MetaObs, PolicyContract
from runtime.gateway.config import GatewayCommand, SessionOptions
from runtime.gateway.openpi.gateway import OpenpiGateway
from runtime.gateway.openpi.websocket_server import CLIENT_THREAD
from runtime.options.api_keys import ApiKeys
from runtime.options.observation_keys import ObservationKeys
from runtime.server import PolicyServer
from runtime.wire_formats.msgpack_arrays import pack, unpack
from tests.gateway.served import served
from tests.runtime.toy_policy import CONTRACT, ToyPolicy, observation


class StatelessPolicy(ToyPolicy):
    """Action i is the state, plus i and the picture's mean / 1000; element 0 is the timestep, and
    element 1 the length of the instruction."""

    def infer(self, obs: MetaObs) -> ActionChunk:
        chunk = super().infer(obs)
        chunk.actions[:, 0], chunk.actions[:, 1] = obs.timestep, len(obs.raw_lang)
        return chunk

    def fork(self) -> StatelessPolicy:
        return self


class SlowStatelessPolicy(StatelessPolicy):
    """An inference takes long enough to be killed in."""

    def infer(self, obs: MetaObs) -> ActionChunk:
        time.sleep(0.1)
        return super().infer(obs)


def command_for(server: str, **options: Any) -> GatewayCommand:
    options.setdefault("sessions", SessionOptions(timeout_s=options.pop("timeout_s", 10.0)))
    return GatewayCommand("openpi", server=server, port=0, **options)


@contextlib.contextmanager
def gateway_to(
    server: PolicyServer,
    *,
    keys: ObservationKeys | None = None,
    api_keys: ApiKeys | None = None,
    contract: PolicyContract = CONTRACT,
    **options: Any,
) -> Iterator[OpenpiGateway]:
    """A gateway to ``server``, served in a thread until the end of the block."""
    command = command_for(f"{server.host}:{server.port}", **options)
    gateway = OpenpiGateway(command, keys or ObservationKeys(), api_keys, contract)
    with served(gateway):
        yield gateway


@contextlib.contextmanager
def connect_to(gateway: OpenpiGateway, api_key: str | None = None) -> Iterator[ClientConnection]:
    """A client after the server's first frame."""
    headers = None if api_key is None else {"Authorization": f"Api-Key {api_key}"}
    with connect(
        f"ws://127.0.0.1:{gateway.port}",
        compression=None,
        additional_headers=headers,
        close_timeout=1.0,
    ) as client:
        assert unpack(client.recv(5.0, decode=False))["server"] == "metronome"
        yield client


def wait_for_client_threads() -> None:
    """Return when the threads of clients that have left have ended."""
    deadline_s = time.monotonic() + 5.0
    while any(thread.name == CLIENT_THREAD for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def sent(value: float = 0.0, *, shade: int = 100, **others: Any) -> dict[str, Any]:
    """What openpi's client sends for ``observation(value, shade=shade)``."""
    obs = observation(value, shade=shade)
    return {"state": obs.state, "images": {"top": obs.images["top"]}, **others}


def ask(client: ClientConnection, message: Mapping[str, Any] | bytes) -> dict[str, Any] | str:
    """The reply: a map, or an error's text."""
    client.send(message if isinstance(message, bytes) else pack(message))
    reply = client.recv(10.0)
    return reply if isinstance(reply, str) else unpack(reply)


def expected(value: float = 0.0, *, shade: int = 100, timestep: int = 0, prompt: str = "") -> Any:
    """The actions of ``StatelessPolicy``, (T, A) float32."""
    obs = dataclasses.replace(observation(value, shade=shade), timestep=timestep, raw_lang=prompt)
    return StatelessPolicy().infer(obs).actions
