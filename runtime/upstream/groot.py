"""A server of NVIDIA Isaac GR00T (N1.6 and later): ZMQ, MessagePack, ``.npy`` arrays.

A REQ socket that got no answer can ask nothing more, so it is replaced. The socket's monitor tells
at once that nobody listens, that the other side is no ZMQ socket, and that the server died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import zmq
from numpy.typing import NDArray
from zmq.utils.monitor import recv_monitor_message

from policies.errors import ContractMismatch, InferenceError, UpstreamLost
from policies.types import MetaObs, PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.options.model_name import UpstreamModel
from runtime.options.observation_keys import StateSource, bare_key
from runtime.upstream.array_parts import ArrayParts
from runtime.upstream.contract import UpstreamContract
from runtime.upstream.foreign_observation_writer import ForeignObservationWriter
from runtime.upstream.upstream_policy import MAX_REPLY_BYTES, as_rows, shown_error
from runtime.wire_formats.bounded_msgpack import MalformedFrame, require_map
from runtime.wire_formats.npy_arrays import pack, unpack_value
from transport.address import format_address, resolve
from transport.errors import TransportError

logger = logging.getLogger(__name__)

ACTION = "action"
CONFIG_FIELDS = "as_json"
"""Where an encoded ``ModalityConfig`` has its fields."""
MOST_HANDSHAKE_S = 30.0
_REFUSED = zmq.Event.CLOSED | zmq.Event.CONNECT_RETRIED
_NO_HANDSHAKE = (
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_AUTH
)


class GrootServer:
    """An ``UpstreamServer`` for GR00T's protocol.

    Args:
        model: The server's address.
        given: The keys; ``video.front``, ``video/front`` and ``front`` are the same.
        contract: The policy's.
        timeout_s: How long an answer may take.
        api_token: Sent with each request; empty for none.

    Attributes:
        name: ``groot://HOST:PORT``.
        timeout_s: How long an answer may take.

    Raises:
        InvalidConfig: The parts of the state or of the action do not fit the contract, or a picture
            has another layout than ``hwc``.
    """

    def __init__(
        self,
        model: UpstreamModel,
        given: UpstreamContract,
        contract: PolicyContract,
        timeout_s: float,
        api_token: str = "",
    ) -> None:
        for name, camera in given.cameras.items():
            if camera.layout != "hwc":
                raise InvalidConfig(
                    f"cameras.{name}.layout: got {camera.layout!r}, expected 'hwc', as GR00T has it"
                )
        self._host, self._port = model.host, model.port
        self.name, self.timeout_s = model.name, timeout_s
        self._token, self._contract = api_token, contract
        self._writer = ForeignObservationWriter(given, contract, bare_key)
        self._prompt = given.prompt
        self._sources = [
            dataclasses.replace(one, key=bare_key(ACTION, one.key)) for one in given.actions
        ]
        self._actions: ArrayParts | None = None
        if self._sources:
            self._actions = ArrayParts("actions", self._sources, contract.action_dim)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._reset_due = False

    # Requests

    def start(self) -> None:
        """Compare the server's modalities with the contract. Raises as ``UpstreamServer``."""
        reply = self._ask("get_modality_config")
        modalities = self._require_map(reply, "get_modality_config")
        if not modalities:
            logger.warning("%s does not say which modalities it has", self.name)
        self._check_keys(modalities, "video", self._writer.image_keys)
        self._check_keys(modalities, "state", self._writer.state_keys)
        languages = self._keys_of(modalities, "language")
        if not self._prompt and len(languages) == 1:
            self._prompt = languages[0]
        elif languages and self._prompt not in languages:
            raise ContractMismatch(
                f"{self.name}: prompt", f"{self._prompt!r}", f"one of {languages}"
            )
        self._check_actions(modalities)

    def infer(self, obs: MetaObs) -> NDArray[np.float32]:
        """Return the actions (T, A) of one observation. Raises as ``UpstreamServer``."""
        self._writer.check(obs)
        observation = {
            "video": {key: image[None, None] for key, image in self._writer.images(obs).items()},
            "state": {key: state[None, None] for key, state in self._writer.state(obs).items()},
            "language": {self._prompt: [[obs.raw_lang]]} if self._prompt else {},
        }
        if self._reset_due:
            self._ask("reset", {"options": None})
            self._reset_due = False
        reply = self._ask("get_action", {"observation": observation, "options": None})
        action = reply[0] if isinstance(reply, list) and len(reply) == 2 else reply
        found = self._require_map(action, "action")
        if self._actions is None:
            raise InferenceError(f"{self.name}: asked before the start")
        rows = {
            key: as_rows(found[key], f"{self.name}: action.{key}")
            for key in self._actions.lengths
            if key in found
        }
        return self._actions.read(rows)

    def reset(self) -> None:
        """Send a reset before the next observation."""
        self._reset_due = True

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._disconnect()
        self._context.destroy(linger=0)

    # What the server says of itself

    def _check_keys(self, modalities: Mapping[str, Any], modality: str, ours: list[str]) -> None:
        """Compare the keys of pictures or of the state, and that one step is all that it wants."""
        if modality not in modalities:
            return
        theirs = self._keys_of(modalities, modality)
        if sorted(theirs) != sorted(ours):
            raise ContractMismatch(f"{self.name}: {modality}", f"keys {ours}", f"{theirs}")
        ticks = self._ticks_of(modalities, modality)
        if ticks not in ([], [0]):
            raise ContractMismatch(
                f"{self.name}: {modality}.delta_indices",
                f"{ticks}",
                "[0]: a policy gets one step in an observation here",
            )

    def _check_actions(self, modalities: Mapping[str, Any]) -> None:
        theirs, contract = self._keys_of(modalities, ACTION), self._contract
        if self._actions is None:
            if len(theirs) != 1:
                raise ContractMismatch(
                    f"{self.name}: actions", f"none, and the server has {theirs}", "their parts"
                )
            self._actions = ArrayParts("actions", [StateSource(theirs[0])], contract.action_dim)
        unknown = sorted(set(self._actions.lengths) - set(theirs))
        if theirs and unknown:
            raise ContractMismatch(f"{self.name}: actions", f"{unknown}", f"some of {theirs}")
        ticks = self._ticks_of(modalities, ACTION)
        if ticks and len(ticks) < contract.n_action_steps:
            raise ContractMismatch(
                f"{self.name}: n_action_steps",
                f"{contract.n_action_steps}",
                f"at most {len(ticks)}, which is how many actions the server returns",
            )
        if ticks and ticks[0] != contract.first_action_offset:
            raise ContractMismatch(
                f"{self.name}: first_action_offset",
                f"{contract.first_action_offset}",
                f"{ticks[0]}",
            )

    def _keys_of(self, modalities: Mapping[str, Any], modality: str) -> list[str]:
        keys = self._field_of(modalities, modality, "modality_keys")
        if not all(isinstance(key, str) for key in keys):
            raise InferenceError(f"{self.name}: {modality}: got keys {keys!r:.120}, expected texts")
        return [bare_key(modality, key) for key in keys]

    def _ticks_of(self, modalities: Mapping[str, Any], modality: str) -> list[int]:
        ticks = self._field_of(modalities, modality, "delta_indices")
        if not all(type(tick) is int for tick in ticks):
            raise InferenceError(
                f"{self.name}: {modality}: got delta_indices {ticks!r:.120}, expected integers"
            )
        return ticks

    def _field_of(self, modalities: Mapping[str, Any], modality: str, field: str) -> list[Any]:
        """Return a list of a modality's configuration; empty if there is none."""
        if modality not in modalities:
            return []
        config = self._require_map(modalities[modality], modality)
        fields = self._require_map(config.get(CONFIG_FIELDS, config), modality)
        value = fields.get(field, [])
        if not isinstance(value, list):
            raise InferenceError(
                f"{self.name}: {modality}.{field}: got {type(value).__name__}, expected a list"
            )
        return value

    def _require_map(self, value: Any, field: str) -> Mapping[str, Any]:
        try:
            return require_map(value, field)
        except MalformedFrame as error:
            raise InferenceError(f"{self.name}: {error}") from error

    # The socket

    def _ask(self, endpoint: str, data: Mapping[str, Any] | None = None) -> Any:
        """Return the answer of ``endpoint``. Raises ``InferenceError`` or ``UpstreamLost``."""
        request: dict[str, Any] = {"endpoint": endpoint}
        if data is not None:
            request["data"] = data
        if self._token:
            request["api_token"] = self._token
        answer = self._exchange(pack(request))
        try:
            reply = unpack_value(answer)
        except MalformedFrame as error:
            raise InferenceError(
                f"{self.name}: got an answer that is not GR00T's ({error}), expected MessagePack"
            ) from error
        if isinstance(reply, Mapping) and "error" in reply:
            text = shown_error(str(reply["error"]))
            hint = " (--api_key)" if "api token" in text.lower() or "api_token" in text else ""
            raise InferenceError(f"{self.name}: the server failed: {text}{hint}")
        return reply

    def _exchange(self, request: bytes) -> bytes:
        if self._connection_events():  # it ended since the last request, and may be another server
            self._disconnect()
        socket, monitor = self._connect()
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(monitor, zmq.POLLIN)
        deadline_s = time.monotonic() + self.timeout_s
        socket.send(request)
        while (left_s := deadline_s - time.monotonic()) > 0:
            ready = dict(poller.poll(max(1, round(left_s * 1000))))
            if socket in ready:
                return socket.recv()
            if ended := self._connection_events():
                self._disconnect()
                raise UpstreamLost(f"{self.name}: {ended}")
        self._disconnect()
        raise UpstreamLost(
            f"{self.name}: no answer within {self.timeout_s:g} s, expected one of a server of GR00T"
        )

    def _connection_events(self) -> str:
        """Return what ended the connection since the last call; empty if it is as it was."""
        if self._monitor is None:
            return ""
        ended = ""
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(self._monitor, zmq.DONTWAIT)["event"]
                ended = ended or _explain(event)
        return ended

    def _connect(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        if self._socket is not None and self._monitor is not None:
            return self._socket, self._monitor
        try:
            numeric, ipv6 = resolve(self._host, self._port)
        except TransportError as error:
            raise UpstreamLost(f"{self.name}: {error}") from error
        socket = self._socket = self._context.socket(zmq.REQ)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.IPV6, int(ipv6))
        socket.set(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
        socket.set(zmq.HANDSHAKE_IVL, round(min(self.timeout_s, MOST_HANDSHAKE_S) * 1000) or 1)
        self._monitor = socket.get_monitor_socket(zmq.Event.DISCONNECTED | _REFUSED | _NO_HANDSHAKE)
        socket.connect(f"tcp://{format_address(numeric, self._port)}")
        return socket, self._monitor

    def _disconnect(self) -> None:
        if self._socket is not None and self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
        self._socket = self._monitor = None


def _explain(event: int) -> str:
    """Return what a monitor's event says about the connection."""
    if event & _REFUSED:
        return "nobody listens there, expected a server of GR00T"
    if event & _NO_HANDSHAKE:
        return "got no ZMQ handshake, expected a server of GR00T"
    return (
        "the connection ended: the server died, is not one of GR00T, or its answer is longer than "
        f"{MAX_REPLY_BYTES} bytes"
    )
