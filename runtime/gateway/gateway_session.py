"""A foreign client's session with the policy server."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

from policies.types import ActionChunk, MetaObs, PolicyContract
from runtime.client import PolicyClient
from runtime.errors import ServerLost
from runtime.gateway.config import GatewayCommand
from runtime.protocol import messages

logger = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
"""How long a handshake with the server may take."""
RECONNECT_S = 2.0
"""How long a request waits for a server that was lost."""


class GatewaySession:
    """One session of the policy server. The first observation opens it.

    Not thread-safe: a foreign connection has one session, and one thread uses it at a time.

    Args:
        command: Server, keys, and what the session declares.
        name: The foreign client's name in the server's log and status.

    Raises:
        TransportError, ContractMismatch, KeyFileError: As ``PolicyClient``.
    """

    def __init__(self, command: GatewayCommand, name: str) -> None:
        connection: Mapping[str, Any] = command.connection.keywords()
        self._client = PolicyClient(
            command.server,
            name=name,
            kind=command.sessions.kind,
            rate_hz=command.sessions.rate_hz,
            deadline_ms=command.sessions.deadline_ms,
            timeout_s=min(HANDSHAKE_S, command.sessions.timeout_s),
            **connection,
        )
        self._timeout_s = command.sessions.timeout_s
        self._opened, self._lost = False, False

    @property
    def contract(self) -> PolicyContract:
        """The served policy's."""
        return self._client.contract

    @property
    def episode_state(self) -> bool:
        """Whether the policy keeps a state between observations; as ``PolicyClient``."""
        return self._client.episode_state

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the chunk for ``obs``. After a lost server the next call connects again.

        Raises:
            PolicyError: The policy refused ``obs`` or failed.
            RuntimeFault: The server is lost, busy, or did not reply in time.
            TransportError: The session did not open.
        """
        if self._lost:
            self._client.reconnect(RECONNECT_S)
            self._lost = False
        if not self._opened:
            # A session's layout is fixed: with an instruction, since a later observation may have
            # one.
            with_text = dataclasses.replace(obs, raw_lang=obs.raw_lang or " ")
            self._client.open(messages.observation_schema(with_text))
            self._opened = True
        try:
            return self._client.infer(obs, self._timeout_s)
        except ServerLost:
            self._lost = True
            raise

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
