"""A server that is started again, with the same policy or another one, while a gateway runs."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from policies.types import CameraContract, PolicyContract
from runtime.client import PolicyClient
from runtime.errors import ServerLost
from runtime.gateway import gateway_session, renewing_gateway
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.openpi.gateway import OpenpiGateway
from runtime.gateway.renewing_gateway import RenewingGateway
from runtime.options.observation_keys import ImageSource, ObservationKeys
from runtime.server import PolicyServer
from runtime.wire_formats.msgpack_arrays import unpack
from tests.gateway.openpi_serving import StatelessPolicy, ask, command_for, expected, sent
from tests.gateway.served import served
from tests.runtime.serving import serving
from tests.runtime.toy_policy import CONTRACT, ToyPolicy, observation

RETRAINED = dataclasses.replace(CONTRACT, normalizer_hash="other", dataset_id="more")
SLOWER = dataclasses.replace(CONTRACT, dt_s=0.25)
FRONT = dataclasses.replace(CONTRACT, cameras=(CameraContract("front", (24, 32), (24, 32)),))
KEYS = ObservationKeys(cameras={"top": ImageSource("images/top")})
PATIENCE_S = 20.0


class ContractPolicy(StatelessPolicy):
    def __init__(self, contract: PolicyContract = CONTRACT) -> None:
        super().__init__()
        self.contract = contract


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewing_gateway, "WATCH_EVERY_S", 0.02)


@contextlib.contextmanager
def renewing(address: str, contract: PolicyContract = CONTRACT) -> Iterator[RenewingGateway]:
    made = RenewingGateway(
        command_for(address, timeout_s=1.0),
        contract,
        False,
        lambda command, contract: OpenpiGateway(command, KEYS, None, contract),
    )
    with served(made):
        yield made


def client_of(made: RenewingGateway) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{made.port}", compression=None, close_timeout=1.0)


def description(made: RenewingGateway) -> dict[str, Any]:
    """What a new client is told; empty if it is refused or the port is not listened on."""
    try:
        with client_of(made) as client:
            return unpack(client.recv(5.0, decode=False))
    except (OSError, ConnectionClosed):
        return {}


def refusal(made: RenewingGateway) -> str:
    """Why a new client's connection is closed; empty if it is not."""
    try:
        with client_of(made) as client:
            client.recv(5.0)
    except ConnectionClosed as error:
        return str(error)
    except OSError:
        pass  # the gateway is being made again
    return ""


def test_sessions_go_on_with_a_policy_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.ExitStack() as stack:
        with serving(ContractPolicy()) as server:
            port = server.port
            made = stack.enter_context(renewing(server.address))
            client = stack.enter_context(client_of(made))
            client.recv(5.0)
            assert not isinstance(ask(client, sent()), str)
        with serving(ContractPolicy(RETRAINED), port=port):
            replies = [ask(client, sent()) for _ in range(2)]
            assert isinstance(replies[0], str)  # the session's server was lost
            assert not isinstance(replies[1], str)
            np.testing.assert_array_equal(replies[1]["actions"], expected(timestep=1))
            time.sleep(0.1)
            assert not isinstance(ask(client, sent()), str)
    assert "policy: got" not in caplog.text


def test_clients_of_another_policy_connect_again_and_get_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.ExitStack() as stack:
        with serving(ContractPolicy()) as server:
            port = server.port
            made = stack.enter_context(renewing(server.address))
            client = stack.enter_context(client_of(made))
            client.recv(5.0)
        with serving(ContractPolicy(SLOWER), port=port):
            with pytest.raises(ConnectionClosed):
                client.recv(PATIENCE_S)
            until(lambda: description(made).get("dt_s") == 0.25)
            with client_of(made) as other:
                other.recv(5.0)
                assert not isinstance(ask(other, sent()), str)
    said = "policy: got another one than before, with dt_s 0.25, expected dt_s 0.02"
    assert caplog.text.count(f"{said}: all clients are disconnected") == 1


def test_a_policy_that_the_map_does_not_fit_is_refused_until_it_is_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fields = "with cameras (front 24x32), expected cameras (top 24x32"
    with contextlib.ExitStack() as stack:
        with serving(ContractPolicy()) as server:
            port = server.port
            made = stack.enter_context(renewing(server.address))
            client = stack.enter_context(client_of(made))
            client.recv(5.0)
            assert not isinstance(ask(client, sent()), str)
        with serving(ContractPolicy(FRONT), port=port):
            until(lambda: "it cannot be served" in caplog.text)
            replies = {ask(client, sent()) for _ in range(3)}  # type: ignore[type-var]
            assert any(fields in reply for reply in replies)
            with client_of(made) as other, pytest.raises(ConnectionClosed, match="got another one"):
                other.recv(5.0)
            time.sleep(0.1)
        with serving(ContractPolicy(), port=port):
            until(lambda: not isinstance(ask(client, sent()), str))
    (said,) = (one for one in caplog.records if "it cannot be served" in one.getMessage())
    assert said.levelno == logging.ERROR
    assert "(cameras: got 'top', expected cameras of the policy: ['front'])" in said.getMessage()
    assert fields in said.getMessage()


def test_clients_without_a_reset_are_refused_once_the_policy_keeps_a_state(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with contextlib.ExitStack() as stack:
        with serving(ContractPolicy()) as server:
            port = server.port
            made = stack.enter_context(renewing(server.address))
        with serving(ToyPolicy(), port=port):
            until(lambda: "needs a reset" in refusal(made))
    assert "policy: got episode_state True, expected False: all clients" in caplog.text


def test_a_stop_while_the_gateway_is_made_again_ends_it() -> None:
    made: list[RenewingGateway] = []
    calls = []

    def make(command: Any, contract: PolicyContract) -> OpenpiGateway:
        calls.append(contract)
        if len(calls) == 3:  # 1: at the start, 2: whether it can be made
            made[0].stop()
        return OpenpiGateway(command, KEYS, None, contract)

    with contextlib.ExitStack() as stack:
        with serving(ContractPolicy()) as server:
            port = server.port
            command = command_for(server.address, timeout_s=1.0)
            made.append(RenewingGateway(command, CONTRACT, False, make))
        with serving(ContractPolicy(SLOWER), port=port):
            stack.callback(made[0].close)
            made[0].serve()
    assert len(calls) == 3


# Sessions


def observed(server: PolicyServer) -> list[str]:
    return [one["client"] for one in server.status()["sessions"]]


def test_a_session_is_opened_before_its_first_observation() -> None:
    with serving(ContractPolicy()) as server:
        session = GatewaySession(command_for(server.address), "early")
        assert observed(server) == []
        session.open()
        session.open()
        assert observed(server) == ["early"]
        small = dataclasses.replace(observation(1.0), raw_lang="")
        np.testing.assert_array_equal(session.infer(small).actions, expected(1.0))
        session.close()


def test_a_session_is_opened_again_for_pictures_of_the_models_size() -> None:
    camera = CameraContract("top", (24, 32), (12, 16), resize="area")
    contract = dataclasses.replace(CONTRACT, cameras=(camera,))
    obs = dataclasses.replace(observation(), images={"top": np.zeros((12, 16, 3), np.uint8)})
    with serving(ContractPolicy(contract)) as server:
        session = GatewaySession(command_for(server.address), "small")
        session.open()
        assert session.infer(obs).actions.shape
        assert observed(server) == ["small"]
        session.close()


@pytest.mark.long
def test_an_idle_session_that_the_server_ended_is_opened_again() -> None:
    """It was opened early, so the client has done nothing wrong."""
    with serving(ContractPolicy(), session_timeout_s=0.05) as server:
        session = GatewaySession(command_for(server.address), "idle")
        session.open()
        until(lambda: not server.status()["sessions"])
        np.testing.assert_array_equal(session.infer(observation(1.0)).actions, expected(1.0))
        until(lambda: not server.status()["sessions"])
        with pytest.raises(ServerLost):
            session.infer(observation(1.0))
        session.close()


def test_a_server_that_does_not_return_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_session, "RECONNECT_S", 0.2)
    with serving(ContractPolicy()) as server:
        session = GatewaySession(command_for(server.address, timeout_s=0.5), "left")
        session.open()
        session.infer(observation())
    with pytest.raises(ServerLost):
        session.infer(observation())
    with pytest.raises(ServerLost, match=r"no session with .* within 0\.2 s: "):
        session.infer(observation())
    session.close()


def test_every_field_that_differs_is_named() -> None:
    other = dataclasses.replace(SLOWER, chunk_size=5, n_action_steps=5, normalizer_hash="x")
    with serving(ContractPolicy(other)) as server, pytest.raises(Exception) as caught:
        GatewaySession(command_for(server.address), "it", CONTRACT)
    assert str(caught.value) == (
        "policy: got another one than before, with chunk_size 5, n_action_steps 5, dt_s 0.25, "
        "expected chunk_size 10, n_action_steps 10, dt_s 0.02"
    )
    with serving(ContractPolicy(RETRAINED)) as server:
        GatewaySession(command_for(server.address), "it", CONTRACT).close()
        PolicyClient(server.address).close()
