"""A server of openpi: MessagePack over a websocket; one binary frame asks, one answers.

The server speaks first, with a map of free form. A text frame is an error. Ours sends no pings: a
server that computes does not answer them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect

from policies.errors import InferenceError, UpstreamLost
from policies.types import MetaObs, PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.options.model_name import UpstreamModel
from runtime.options.observation_keys import StateSource
from runtime.upstream.array_parts import ArrayParts
from runtime.upstream.contract import UpstreamContract
from runtime.upstream.foreign_observation_writer import ForeignObservationWriter
from runtime.upstream.upstream_policy import MAX_REPLY_BYTES, as_rows, shown_error
from runtime.wire_formats.msgpack_arrays import MalformedFrame, pack, unpack
from transport.address import format_address

logger = logging.getLogger(__name__)

CLOSE_S = 0.2
"""How long a goodbye may take; it is also said to a server that hangs."""
PROMPT, ACTIONS = "prompt", "actions"
"""The protocol's own keys."""
MAX_LOGGED_CHARS = 500


class OpenpiServer:
    """An ``UpstreamServer`` for openpi's protocol.

    Args:
        model: The server's address.
        given: The keys.
        contract: The policy's.
        timeout_s: How long an answer may take.
        api_key: For the header ``Authorization: Api-Key``; empty for none.

    Attributes:
        name: ``openpi://HOST:PORT``.
        timeout_s: How long an answer may take.

    Raises:
        InvalidConfig: The parts of the state or of the action do not fit the contract, or one key
            is another one, or is inside of it.
    """

    def __init__(
        self,
        model: UpstreamModel,
        given: UpstreamContract,
        contract: PolicyContract,
        timeout_s: float,
        api_key: str = "",
    ) -> None:
        self.name, self.timeout_s = model.name, timeout_s
        self._url = f"ws://{format_address(model.host, model.port)}"
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._writer = ForeignObservationWriter(given, contract)
        self._prompt, self._nested = given.prompt or PROMPT, given.nested
        _check_keys([*self._writer.image_keys, *self._writer.state_keys, self._prompt])
        sources = given.actions or (StateSource(ACTIONS),)
        self._actions = ArrayParts("actions", sources, contract.action_dim)
        self._connection: ClientConnection | None = None
        self._stack = contextlib.ExitStack()
        self._quiet = logging.getLogger(f"{__name__}.websockets")
        self._quiet.setLevel(logging.CRITICAL)  # what it logs as errors is raised, too

    def start(self) -> None:
        """Connect, and log what the server says of itself. Raises as ``UpstreamServer``."""
        self._connected()

    def infer(self, obs: MetaObs) -> NDArray[np.float32]:
        """Return the actions (T, A) of one observation. Raises as ``UpstreamServer``."""
        self._writer.check(obs)
        reply = self._ask(pack(self._observation(obs)))
        arrays = {}
        for key in self._actions.lengths:
            if key in reply:
                arrays[key] = as_rows(reply[key], f"{self.name}: {key}")
        if len(arrays) < len(self._actions.lengths):
            missing = next(key for key in self._actions.lengths if key not in arrays)
            raise InferenceError(
                f"{self.name}: got keys {[f'{key:.60}' for key in list(reply)[:20]]}, expected "
                f"{missing!r}"
            )
        return self._actions.read(arrays)

    def reset(self) -> None:
        """Do nothing: the protocol has no reset."""

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._connection = None
        with contextlib.suppress(OSError):
            self._stack.close()

    def _observation(self, obs: MetaObs) -> dict[str, Any]:
        flat: dict[str, Any] = {**self._writer.images(obs), **self._writer.state(obs)}
        if obs.raw_lang:
            flat[self._prompt] = obs.raw_lang
        return nest(flat) if self._nested else flat

    def _ask(self, frame: bytes) -> Mapping[str, Any]:
        connection = self._connected()
        try:
            connection.send(frame)
            answer = connection.recv(self.timeout_s)
        except TimeoutError as error:
            self.close()  # its late answer would be taken for the next request's
            raise UpstreamLost(f"{self.name}: no answer within {self.timeout_s:g} s") from error
        except (ConnectionClosed, OSError) as error:
            self.close()
            raise UpstreamLost(f"{self.name}: the connection ended: {error}") from error
        if isinstance(answer, str):
            logger.debug("%s: %s", self.name, answer)
            self.close()  # openpi's server closes it after an error
            raise InferenceError(f"{self.name}: the server failed: {shown_error(answer)}")
        return self._unpacked(answer)

    def _unpacked(self, frame: bytes) -> Mapping[str, Any]:
        try:
            return unpack(frame)
        except MalformedFrame as error:
            self.close()
            raise InferenceError(
                f"{self.name}: got a frame that is not openpi's ({error}), expected a map of "
                "MessagePack"
            ) from error

    def _connected(self) -> ClientConnection:
        """Return the connection, a new one if it has ended. Raises as ``start``."""
        if self._connection is not None and self._connection.state is State.OPEN:
            return self._connection
        self.close()
        connection = self._connection = self._connect()
        try:
            hello = connection.recv(self.timeout_s)
        except TimeoutError as error:
            self.close()
            raise UpstreamLost(
                f"{self.name}: got a websocket that says nothing within {self.timeout_s:g} s, "
                "expected openpi's metadata"
            ) from error
        except (ConnectionClosed, OSError) as error:
            self.close()
            raise UpstreamLost(f"{self.name}: the connection ended: {error}") from error
        if isinstance(hello, str):
            self.close()
            raise InferenceError(
                f"{self.name}: got the text {shown_error(hello)!r}, expected openpi's metadata"
            )
        metadata = self._unpacked(hello)
        logger.info("%s says of itself: %s", self.name, f"{metadata!r:.{MAX_LOGGED_CHARS}}")
        return connection

    def _connect(self) -> ClientConnection:
        try:
            return self._stack.enter_context(
                connect(
                    self._url,
                    compression=None,
                    additional_headers=self._headers,
                    open_timeout=self.timeout_s,
                    close_timeout=CLOSE_S,
                    ping_interval=None,
                    max_size=MAX_REPLY_BYTES,
                    max_queue=1,
                    proxy=None,
                    logger=self._quiet,
                )
            )
        except InvalidStatus as error:
            status = error.response.status_code
            expected = (
                "a key that it accepts (--api_key)" if status in (401, 403) else "a websocket"
            )
            raise InferenceError(
                f"{self.name}: got HTTP status {status}, expected {expected}"
            ) from error
        except (InvalidMessage, InvalidHandshake, ConnectionClosed, AssertionError) as error:
            # The library's own assertion fails where a server speaks before it is asked.
            raise InferenceError(
                f"{self.name}: got no websocket ({error!r:.200}), expected a server of openpi"
            ) from error
        except TimeoutError as error:
            raise UpstreamLost(
                f"{self.name}: got no websocket within {self.timeout_s:g} s, expected a server of "
                "openpi"
            ) from error
        except OSError as error:
            raise UpstreamLost(
                f"{self.name}: nobody listens there ({error.strerror or error}), expected a server "
                "of openpi"
            ) from error


def _check_keys(keys: list[str]) -> None:
    """Raise ``InvalidConfig`` if one key is another one, or is the map that has another one."""
    for index, key in enumerate(keys):
        for other in keys[:index] + keys[index + 1 :]:
            if f"{other}/".startswith(f"{key}/"):
                raise InvalidConfig(f"keys: got {key!r} and {other!r}, expected different ones")


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``flat`` with the keys ``a/b`` as the key ``b`` of the map ``a``."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *outer, last = key.split("/")
        inner = nested
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return nested
