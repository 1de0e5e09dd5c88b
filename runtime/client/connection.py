"""A policy server by its address: what it serves, and sessions with it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from policies.errors import ContractMismatch
from policies.types import PolicyContract, PolicyInfo
from runtime.errors import ServerLost
from runtime.options.connection import ConnectionOptions
from runtime.protocol import image_codec, messages
from transport.address import parse_address
from transport.channel import Channel
from transport.dialer import Dialer
from transport.errors import TransportError, TransportUnavailable
from transport.handshake_messages import Welcome
from transport.schema import Schema
from transport.zeromq.curve import ClientKeys

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.05, 1.0


@dataclass(frozen=True, slots=True)
class OpenSession:
    """An open session.

    Attributes:
        channel: The caller's to close.
        pictures: What writes its messages.
        deterministic: Whether answers are bit-equal wherever the policy runs.
        reason: Why this transport.
    """

    channel: Channel
    pictures: image_codec.Outgoing
    deterministic: bool
    reason: str


class ServerConnection:
    """One server.

    Args:
        timeout_s: For each of its answers.
        keys: For a server that wants them.

    Attributes:
        contract, info: What it serves, and where.

    Raises:
        TransportTimeout: Nothing answered there.
        ProtocolError: What answered speaks another version.
        ContractMismatch: Its description cannot be read.
    """

    def __init__(self, address: str, timeout_s: float, keys: ClientKeys | None = None) -> None:
        self.address, self._timeout_s, self._keys = address, timeout_s, keys
        self._dialer = Dialer(*parse_address(address), timeout_s=timeout_s, curve=keys)
        self.contract, self.info = self._describe()

    def open(
        self,
        schema: Schema,
        options: ConnectionOptions,
        *,
        client: str,
        attributes: Mapping[str, Any],
    ) -> OpenSession:
        """A session for observations of ``schema``.

        Raises:
            ContractMismatch, Refused, TransportUnavailable, TransportTimeout, ProtocolError,
            JpegMissing: As ``PolicyClient.open``.
        """
        first, *others = options.candidates()
        refused = ""
        try:
            pictures, channel, welcome = self._dial(schema, options, first, client, attributes)
        except TransportUnavailable as error:
            if not others:
                raise
            refused = str(error)
            pictures, channel, welcome = self._dial(schema, options, others[0], client, attributes)
        theirs, ours = welcome.attributes.get("contract"), messages.contract_hash(self.contract)
        if theirs != ours or welcome.schema != messages.reply_schema(self.contract):
            channel.close("this client was made for another policy")
            raise ContractMismatch(
                "contract", f"{theirs!r}, another server's at {self.address}", f"{ours!r}"
            )
        granted = welcome.attributes.get("deterministic") is True and not pictures.lossy
        reason = refused or str(getattr(channel, "transport_reason", ""))
        logger.info("session with %s over %s: %s", self.address, channel.transport, reason)
        return OpenSession(channel, pictures, granted, reason)

    def redial(self, timeout_s: float, attempt: Callable[[], None]) -> None:
        """Ask for the description anew and run ``attempt``, with back-off, until that succeeds.

        A server that refuses is asked again: it may not have noticed yet that an old session died.

        Raises:
            ServerLost: No server took us in time; says what the last one said.
            ContractMismatch: A server with another policy answered.
        """
        deadline_s = time.monotonic() + timeout_s
        backoff_s = FIRST_BACKOFF_S
        while True:
            self._dialer.close()
            remaining_s = deadline_s - time.monotonic()
            patience_s = max(0.1, min(self._timeout_s, remaining_s))
            try:
                self._dialer = Dialer(
                    *parse_address(self.address), timeout_s=patience_s, curve=self._keys
                )
                contract, self.info = self._describe()
                contract.require(self.contract)
                attempt()
                return
            except TransportError as error:
                if time.monotonic() + backoff_s >= deadline_s:
                    raise ServerLost(
                        f"no server at {self.address} within {timeout_s:g} s: {error}"
                    ) from error
            time.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    def close(self) -> None:
        """Open sessions stay. Idempotent."""
        self._dialer.close()

    def _dial(
        self,
        schema: Schema,
        options: ConnectionOptions,
        candidate: tuple[str, int | None],
        client: str,
        attributes: Mapping[str, Any],
    ) -> tuple[image_codec.Outgoing, Channel, Welcome]:
        transport, quality = candidate
        pictures = image_codec.Outgoing(
            schema, self.contract, resize=options.resize, quality=quality
        )
        channel, welcome = self._dialer.open(
            pictures.schema,
            client=client,
            transport=transport,
            attributes={**attributes, **pictures.attributes},
        )
        return pictures, channel, welcome

    def _describe(self) -> tuple[PolicyContract, PolicyInfo]:
        try:
            return messages.read_description(self._dialer.describe())
        except BaseException:
            self._dialer.close()
            raise
