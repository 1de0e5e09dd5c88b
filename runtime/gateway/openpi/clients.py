"""The two kinds of clients of openpi's gateway: openpi's own, and those of vLLM-Omni.

openpi's client sends an observation per binary frame, and gets a map with the actions. An error is
a text frame. There is no reset.

The clients of vLLM-Omni's robot endpoint send the same observations, with two keys more:
``endpoint``, ``infer`` or ``reset``, and ``session_id``, which also starts an episode when it
changes. They get the array of the actions itself, ``{"status": "reset successful"}``, or
``{"type": "error", "message": ...}``; a text frame is ignored, and no frame ends the connection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import ContractMismatch, PolicyError
from policies.types import PolicyContract
from runtime.errors import RuntimeFault
from runtime.gateway.gateway_session import GatewaySession
from runtime.gateway.observation_map import ObservationMap, find_value
from runtime.wire_formats.bounded_msgpack import MAX_SHOWN, MalformedFrame
from runtime.wire_formats.msgpack_arrays import pack, unpack
from transport.errors import Refused, TransportError
from transport.zeromq.curve import KeyFileError

logger = logging.getLogger(__name__)

REFUSALS = (PolicyError, RuntimeFault, TransportError, KeyFileError)
"""Errors that the client gets, and after which it may go on."""
ENDPOINTS = ("infer", "reset")


class OpenpiClient:
    """One client: its session, and how many observations of the episode it has sent.

    Args:
        peer: Its name.
        observations: Converts its observations.
        open_session: Opens a session with the policy server.
    """

    def __init__(
        self, peer: str, observations: ObservationMap, open_session: Callable[[], GatewaySession]
    ) -> None:
        self._peer, self._observations, self._open_session = peer, observations, open_session
        self._session: GatewaySession | None = None
        self._timestep, self._logged = 0, ""
        self._infer_s = 0.0
        self._total_s: float | None = None

    def open(self) -> None:
        """Open the session, so that a refusal shows at once. A server that is not there is asked
        again for the first observation.

        Raises:
            Refused, PolicyError: The server does not admit the session, or has another policy.
        """
        try:
            self._session = self._open_session()
            self._session.open()
        except (Refused, PolicyError):
            raise
        except TransportError as error:
            logger.warning("%s: %s", self._peer, error)

    def reply(self, frame: str | bytes) -> str | bytes | None:
        """Return the frame that answers ``frame``, None if there is none; text is an error.

        Raises:
            MalformedFrame: ``frame`` cannot be read, and the connection has to end.
        """
        began_s = time.monotonic()
        if isinstance(frame, str):
            raise MalformedFrame("", "text", "a binary frame")
        observation = unpack(frame)
        try:
            actions = self._infer(observation)
        except REFUSALS as error:
            self._log(str(error))
            return str(error)
        timing = {"infer_ms": self._infer_s * 1000}
        if self._total_s is not None:
            timing["prev_total_ms"] = self._total_s * 1000
        reply = pack({"actions": actions, "server_timing": timing})
        self._total_s = time.monotonic() - began_s
        return reply

    def close(self) -> None:
        """End the session. Idempotent."""
        if self._session is not None:
            self._session.close()

    def _infer(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return the actions, (T, A)."""
        prompt = find_value(observation, "prompt")
        if not isinstance(prompt, str | None):
            raise ContractMismatch("prompt", type(prompt).__name__, "text")
        obs = self._observations.read(observation, timestep=self._timestep, raw_lang=prompt or "")
        if self._session is None:
            self._session = self._open_session()
        began_s = time.monotonic()
        actions = self._session.infer(obs).actions
        self._infer_s = time.monotonic() - began_s
        self._timestep += 1
        return actions

    def _start_episode(self) -> None:
        self._timestep = 0
        if self._session is not None:
            self._session.reset()

    def _log(self, text: str) -> None:
        if text != self._logged:  # a client may send the same observation without end
            logger.warning("%s: %s", self._peer, text)
            self._logged = text


class VllmOmniClient(OpenpiClient):
    """One client of vLLM-Omni's robot endpoint."""

    def __init__(
        self, peer: str, observations: ObservationMap, open_session: Callable[[], GatewaySession]
    ) -> None:
        super().__init__(peer, observations, open_session)
        self._session_id: str | int | None = None

    def reply(self, frame: str | bytes) -> bytes | None:
        """Return the frame that answers ``frame``, None if there is none."""
        if isinstance(frame, str) or not frame:
            return None
        try:
            return pack(self._answer(unpack(frame)))
        except (MalformedFrame, *REFUSALS) as error:
            self._log(str(error))
            return pack({"type": "error", "message": str(error)})

    def _answer(self, request: Mapping[str, Any]) -> Mapping[str, Any] | NDArray[np.float32]:
        endpoint = request.get("endpoint", "infer")
        if type(endpoint) is not str or endpoint not in ENDPOINTS:
            shown = f"{endpoint!r:.{MAX_SHOWN}}"
            raise ContractMismatch("endpoint", shown, " or ".join(map(repr, ENDPOINTS)))
        if endpoint == "reset":
            self._session_id = None
            self._start_episode()
            return {"status": "reset successful"}
        session_id = request.get("session_id")
        if not isinstance(session_id, str | int | None):
            raise ContractMismatch("session_id", type(session_id).__name__, "text or a number")
        if session_id and session_id != self._session_id:
            self._session_id = session_id
            self._start_episode()
        return self._infer(request)


def describe(contract: PolicyContract) -> dict[str, Any]:
    """Return the first map that a client gets: what is served."""
    return {
        "server": "metronome",
        "policy_type": contract.policy_type,
        "cameras": {camera.name: list(camera.source_hw) for camera in contract.cameras},
        "state_dim": contract.state_dim,
        "action_dim": contract.action_dim,
        "chunk_size": contract.chunk_size,
        "n_action_steps": contract.n_action_steps,
        "first_action_offset": contract.first_action_offset,
        "dt_s": contract.dt_s,
        "ctrl_space": contract.ctrl_space,
        "ctrl_type": contract.ctrl_type,
        "gripper_continuous": contract.gripper_continuous,
        "state_names": list(contract.state_names),
        "action_names": list(contract.action_names),
    }


def describe_for_vllm_omni(contract: PolicyContract) -> dict[str, Any]:
    """Return ``describe`` with the names that vLLM-Omni's clients look for."""
    return {
        **describe(contract),
        "image_resolution": list(contract.cameras[0].source_hw),
        "action_horizon": contract.chunk_size,
        "needs_session_id": False,
    }
