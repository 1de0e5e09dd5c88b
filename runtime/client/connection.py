"""Connection to a policy server: reads what it serves, and opens sessions with it."""

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
        channel: The transport's channel; the caller closes it.
        writer: Writes observations into the channel's messages.
        deterministic: Whether replies are bit-equal to those of the policy in any other process.
        reason: Why this transport was chosen, in words.
    """

    channel: Channel
    writer: image_codec.ObservationWriter
    deterministic: bool
    reason: str


class ServerConnection:
    """A connection to one server, without a session until ``open``.

    Args:
        timeout_s: The limit for each reply of the server.
        keys: CURVE keys, for a server that requires them.

    Attributes:
        contract, info: The served policy's contract, and what runs it.
        replaced_hashes: Of the weights that the server's operator has replaced by these.
        episode_state: Whether the policy keeps a state between observations; True if the server is
            too old to say.

    Raises:
        TransportTimeout: No server answers at the address.
        ProtocolError: The server uses another version of the protocol.
        ContractMismatch: The server's description cannot be read.
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
        """Open a session for observations of ``schema``.

        Raises:
            ContractMismatch, Refused, TransportUnavailable, TransportTimeout, ProtocolError,
            JpegMissing: As ``PolicyClient.open``.
        """
        first, *others = options.candidates()
        refused = ""
        try:
            writer, channel, welcome = self._dial(schema, options, first, client, attributes)
        except TransportUnavailable as error:
            if not others:
                raise
            refused = str(error)
            writer, channel, welcome = self._dial(schema, options, others[0], client, attributes)
        expected = messages.contract_hash(self.contract)
        got = welcome.attributes.get("contract")
        if got != expected or welcome.schema != messages.reply_schema(self.contract):
            channel.close("this client was made for another policy")
            raise ContractMismatch(
                "contract", f"{got!r}, another server's at {self.address}", f"{expected!r}"
            )
        granted = welcome.attributes.get("deterministic") is True and not writer.lossy
        reason = refused or str(getattr(channel, "transport_reason", ""))
        logger.info("session with %s over %s: %s", self.address, channel.transport, reason)
        return OpenSession(channel, writer, granted, reason)

    def reconnect(self, timeout_s: float, attempt: Callable[[], None]) -> None:
        """Read the description again and run ``attempt``, with back-off, until both succeed.

        A refusal is tried again: the server may not have noticed yet that an old session died.

        Raises:
            ServerLost: No server accepted within ``timeout_s``; has the last error.
            ContractMismatch: The server now has another policy: another contract, or other weights;
                see ``require_weights``.
        """
        expected_hash = self.info.weights_hash
        deadline_s = time.monotonic() + timeout_s
        backoff_s = FIRST_BACKOFF_S
        while True:
            self._dialer.close()
            remaining_s = deadline_s - time.monotonic()
            attempt_timeout_s = max(0.1, min(self._timeout_s, remaining_s))
            try:
                self._dialer = Dialer(
                    *parse_address(self.address), timeout_s=attempt_timeout_s, curve=self._keys
                )
                contract, info = self._describe()
                contract.require(self.contract)
                self._require_weights(info.weights_hash, expected_hash)
                attempt()
                self.info = info
                return
            except TransportError as error:
                if time.monotonic() + backoff_s >= deadline_s:
                    raise ServerLost(
                        f"no server at {self.address} within {timeout_s:g} s: {error}"
                    ) from error
            time.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    def require_weights(self, expected_hash: str) -> None:
        """Require the weights and normalizers with this hash; an empty one requires nothing.

        Others are accepted if this server's operator has replaced those by others since.

        Raises:
            ContractMismatch: Other weights, or a server that does not say their hash.
        """
        self._require_weights(self.info.weights_hash, expected_hash)

    def _require_weights(self, got: str, expected: str) -> None:
        if expected and got != expected and expected not in self.replaced_hashes:
            raise ContractMismatch("weights_hash", repr(got) if got else "none", repr(expected))

    def close(self) -> None:
        """Close the connection; open sessions stay open. Idempotent."""
        self._dialer.close()

    def _dial(
        self,
        schema: Schema,
        options: ConnectionOptions,
        candidate: tuple[str, int | None],
        client: str,
        attributes: Mapping[str, Any],
    ) -> tuple[image_codec.ObservationWriter, Channel, Welcome]:
        transport, quality = candidate
        writer = image_codec.ObservationWriter(
            schema, self.contract, resize=options.resize, quality=quality
        )
        channel, welcome = self._dialer.open(
            writer.schema,
            client=client,
            transport=transport,
            attributes={**attributes, **writer.attributes},
        )
        return writer, channel, welcome

    def _describe(self) -> tuple[PolicyContract, PolicyInfo]:
        try:
            description = self._dialer.describe()
            self.episode_state = description.get("episode_state") is not False
            replaced = description.get("replaced_hashes")
            self.replaced_hashes = tuple(replaced) if isinstance(replaced, list) else ()
            return messages.read_description(description)
        except BaseException:
            self._dialer.close()
            raise
