"""A foreign client's session with the policy server."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from policies.errors import ContractMismatch
from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract
from runtime.client import PolicyClient
from runtime.errors import ServerLost
from runtime.gateway.config import GatewayCommand
from runtime.protocol import messages
from transport.errors import TransportError
from transport.schema import Schema

logger = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""How long a handshake with the server may take."""
RECONNECT_S = 2.0
"""How long a request waits for a server that was lost."""
RECONNECT_EVERY_S, MIN_ATTEMPT_S = 0.1, 0.1
MAY_DIFFER = ("normalizer_hash", "dataset_id", "dataset_ids", "rendering", "execution")
"""Fields of a contract that decide nothing of what a foreign client sends and gets."""


class GatewaySession:
    """One session of the policy server. ``open``, or the first observation, opens it.

    Not thread-safe: a foreign connection has one session, and one thread uses it at a time.

    Args:
        command: Server, keys, and what the session declares.
        name: The foreign client's name in the server's log and status.
        contract: What the policy must be; None for any. After a lost server it must be what it was.

    Raises:
        ContractMismatch: The server has another policy; names all fields that differ.
        TransportError, KeyFileError: As ``PolicyClient``.
    """

    def __init__(
        self, command: GatewayCommand, name: str, contract: PolicyContract | None = None
    ) -> None:
        self._command, self._name = command, name
        self._timeout_s = command.sessions.timeout_s
        self._client = self._connect(HANDSHAKE_S)
        self._contract = contract or self._client.contract
        self._episode_state = self._client.episode_state
        self._schema: Schema | None = None
        self._used, self._lost = False, False
        self._require_same_policy()

    @property
    def contract(self) -> PolicyContract:
        """The served policy's."""
        return self._client.contract

    @property
    def episode_state(self) -> bool:
        """Whether the policy keeps a state between observations; as ``PolicyClient``."""
        return self._client.episode_state

    def open(self) -> None:
        """Open the session before the first observation, so that a refusal shows at once.

        Pictures are expected in the cameras' own size. If the first observation has others, the
        session is opened again.

        Raises:
            ContractMismatch, TransportError: As ``PolicyClient.open``.
        """
        if self._schema is None:
            self._open(_schema(empty_observation(self.contract)))

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the chunk for ``obs``. After a lost server the next call connects again.

        Raises:
            PolicyError: The policy refused ``obs`` or failed, or is another one since the server
                was lost.
            RuntimeFault: The server is lost, busy, or did not reply in time.
            TransportError: The session did not open.
        """
        if self._lost:
            self._reconnect()
        if not self._used:
            self._open_for(_schema(obs))
        try:
            return self._infer(obs)
        except ServerLost:
            if self._used:
                raise
        # The server ended an idle session that was opened early; it has seen nothing of it.
        self._reconnect()
        return self._infer(obs)

    def reset(self) -> None:
        """Start a new episode."""
        if self._lost:
            return  # a new session starts one anyway
        try:
            self._client.reset()
        except ServerLost as error:
            self._lost = True
            logger.info("the server was lost at a reset: %s", error)

    def close(self) -> None:
        """End the session. Idempotent."""
        self._client.close()

    def _infer(self, obs: MetaObs) -> ActionChunk:
        try:
            chunk = self._client.infer(obs, self._timeout_s)
        except ServerLost:
            self._lost = True
            raise
        self._used = True
        return chunk

    def _connect(self, within_s: float) -> PolicyClient:
        connection: Mapping[str, Any] = self._command.connection.keywords()
        return PolicyClient(
            self._command.server,
            name=self._name,
            kind=self._command.sessions.kind,
            rate_hz=self._command.sessions.rate_hz,
            deadline_ms=self._command.sessions.deadline_ms,
            timeout_s=min(within_s, self._timeout_s),
            **connection,
        )

    def _open(self, schema: Schema) -> None:
        self._client.open(schema)
        self._schema = schema

    def _open_for(self, schema: Schema) -> None:
        """Open the session for ``schema``, also where it is open for another one."""
        if self._schema == schema:
            return
        if self._schema is not None:
            self._schema = None
            self._renew_client(HANDSHAKE_S)
        self._open(schema)

    def _renew_client(self, within_s: float) -> None:
        """Connect again, without a session.

        Raises:
            ContractMismatch: The server has another policy now.
        """
        self._client.close()
        self._client = self._connect(within_s)
        self._require_same_policy()

    def _require_same_policy(self) -> None:
        try:
            require_same_policy(self._client.contract, self._contract)
            if self._client.episode_state != self._episode_state:
                words = ("without state between observations", "with state between observations")
                raise ContractMismatch(
                    "policy", words[self._client.episode_state], words[self._episode_state]
                )
        except ContractMismatch:
            self._client.close()
            raise

    def _reconnect(self) -> None:
        """Open the session again after a lost server.

        A refusal is tried again: the server may not have noticed yet that the old session died.

        Raises:
            ServerLost: No server accepted within ``RECONNECT_S``; has the last error.
            ContractMismatch: The server has another policy now.
        """
        deadline_s = time.monotonic() + RECONNECT_S
        while True:
            try:
                self._renew_client(max(MIN_ATTEMPT_S, deadline_s - time.monotonic()))
                if self._schema is not None:
                    self._open(self._schema)
                self._lost = False
                return
            except TransportError as error:
                if time.monotonic() + RECONNECT_EVERY_S >= deadline_s:
                    raise ServerLost(
                        f"no session with {self._command.server} within {RECONNECT_S:g} s: {error}"
                    ) from error
            time.sleep(RECONNECT_EVERY_S)


def require_same_policy(got: PolicyContract, expected: PolicyContract) -> None:
    """Raise ``ContractMismatch`` if clients of one policy cannot go on with the other.

    It names every field that differs, but for those in ``MAY_DIFFER``.
    """
    differing = [
        field.name
        for field in dataclasses.fields(got)
        if field.compare
        and field.name not in MAY_DIFFER
        and getattr(got, field.name) != getattr(expected, field.name)
    ]
    if differing:
        raise ContractMismatch(
            "policy",
            f"another one than before, with {_described(got, differing)}",
            _described(expected, differing),
        )


def empty_observation(contract: PolicyContract) -> MetaObs:
    """Return black pictures of the cameras' own sizes and a state of zeros."""
    return MetaObs(
        {camera.name: np.zeros((*camera.source_hw, 3), np.uint8) for camera in contract.cameras},
        np.zeros(contract.state_dim, np.float32),
    )


def _schema(obs: MetaObs) -> Schema:
    """The layout of a session: with an instruction, since a later observation may have one."""
    return messages.observation_schema(dataclasses.replace(obs, raw_lang=obs.raw_lang or " "))


def _described(contract: PolicyContract, fields: list[str]) -> str:
    return ", ".join(f"{name} {_shown(getattr(contract, name))}" for name in fields)


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, CameraContract):
        height, width = value.source_hw
        model = "" if value.model_hw == value.source_hw else f" as {value.model_hw}"
        crop = "" if value.crop is None else f" cropped to {value.crop}"
        return f"{value.name} {height}x{width}{crop}{model}"
    return f"{value}"
