"""A policy that another system's server computes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from policies.errors import InferenceError
from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo

FIRST_ANSWER_S = 120.0
"""Least seconds that the first answer may take: a server may compile its model for it."""
MAX_REPLY_BYTES = 16 * 2**20
"""Longest answer of a server."""
MAX_ERROR_CHARS = 300
"""Longest text of a server's error in ours."""


class UpstreamServer(Protocol):
    """The connection to another system's server, which connects again when it must.

    Attributes:
        name: The address, for errors.
        timeout_s: How long an answer may take.
    """

    name: str
    timeout_s: float

    def start(self) -> None:
        """Connect, and compare what the server says of itself with the contract.

        Raises:
            ContractMismatch: It says something else.
            InferenceError: It refuses us, or speaks another protocol.
            UpstreamLost: Nobody listens there, or nobody answers.
        """
        ...

    def infer(self, obs: MetaObs) -> NDArray[np.float32]:
        """Return the actions (T, A) of one observation, not checked further.

        Raises:
            ContractMismatch, ObservationError: ``obs`` is not what the contract says.
            InferenceError: The server's answer is an error, or is not readable.
            UpstreamLost: There is no answer.
        """
        ...

    def reset(self) -> None:
        """Have the server begin a new episode, if its protocol has that. Does not wait for it."""
        ...

    def close(self) -> None:
        """End the connection. Idempotent."""
        ...


class UpstreamPolicy:
    """A ``Policy`` whose actions come from ``server``. Used by one thread at a time.

    These servers do not tell their clients apart, so all forks are this object.

    Args:
        server: Closed by ``close``.
        contract: What the server needs and returns.
    """

    def __init__(self, server: UpstreamServer, contract: PolicyContract) -> None:
        self._server, self._contract = server, contract
        system = server.name.partition("://")[0]
        self._info = PolicyInfo(server.name, device="upstream", precision="unknown", engine=system)

    @property
    def contract(self) -> PolicyContract:
        """What the server needs and returns, as the user's file says."""
        return self._contract

    @property
    def info(self) -> PolicyInfo:
        """The server's address; where and how it computes is not known here."""
        return self._info

    def start(self) -> None:
        """Connect and infer once, so that a server that does not fit is refused at the start.

        Raises:
            PolicyError: It does not fit, or does not answer.
        """
        self._server.start()
        obs = MetaObs(
            {camera.name: _grey(camera.source_hw) for camera in self._contract.cameras},
            np.zeros(self._contract.state_dim, np.float32),
        )
        with self._patience(max(FIRST_ANSWER_S, self._server.timeout_s)):
            self.infer(obs)
        self.reset()

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the chunk for ``obs``.

        Raises:
            ContractMismatch, ObservationError: ``obs`` is not what the contract says.
            InferenceError: The server's answer is an error, or not such actions: at least
                ``n_action_steps`` rows of ``action_dim`` finite numbers.
            UpstreamLost: The server does not answer.
        """
        began_ns = time.monotonic_ns()
        actions = self._server.infer(obs)
        contract = self._contract
        if actions.shape[0] < contract.n_action_steps or actions.shape[1] != contract.action_dim:
            raise InferenceError(
                f"{self._server.name}: got actions of shape {actions.shape}, expected at least "
                f"n_action_steps = {contract.n_action_steps} rows of {contract.action_dim}"
            )
        used = np.ascontiguousarray(actions[: contract.chunk_size], np.float32)
        if not np.isfinite(used).all():
            raise InferenceError(
                f"{self._server.name}: got NaN or infinity among the actions, expected finite "
                "numbers"
            )
        return ActionChunk(
            used,
            obs_timestep=obs.timestep,
            t_capture_ns=obs.t_capture_ns,
            first_action_offset=contract.first_action_offset,
            ctrl_space=contract.ctrl_space,
            ctrl_type=contract.ctrl_type,
            gripper_continuous=contract.gripper_continuous,
            stages_ns={"infer": time.monotonic_ns() - began_ns},
        )

    def reset(self) -> None:
        """Have the server begin a new episode with the next observation, if it knows episodes."""
        self._server.reset()

    def fork(self) -> UpstreamPolicy:
        """Return itself."""
        return self

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._server.close()

    @contextmanager
    def _patience(self, timeout_s: float) -> Iterator[None]:
        """Wait up to ``timeout_s`` for the answers in a ``with`` block."""
        usual_s, self._server.timeout_s = self._server.timeout_s, timeout_s
        try:
            yield
        finally:
            self._server.timeout_s = usual_s


def as_rows(value: object, field: str) -> NDArray[np.float32]:
    """Return a server's array as rows (T, D) float32; leading axes of length 1 are taken off.

    Raises:
        InferenceError: Not an array of numbers, or one of other axes; names ``field``.
    """
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        raise InferenceError(f"{field}: got {_described(value)}, expected an array of numbers")
    rows: NDArray[Any] = value
    while rows.ndim > 2 and len(rows) == 1:
        rows = rows[0]
    if rows.ndim != 2:
        raise InferenceError(f"{field}: got shape {value.shape}, expected (T, D)")
    with np.errstate(over="ignore"):  # infinity, which is refused
        return rows.astype(np.float32, copy=False)


def shown_error(text: str) -> str:
    """Return the last line of a server's error text, which may be a traceback, for an error."""
    lines = [" ".join(line.split()) for line in text[-8192:].splitlines() if line.strip()]
    line = lines[-1] if lines else ""
    return f"{''.join(c if c.isprintable() else '?' for c in line):.{MAX_ERROR_CHARS}}"


def _grey(hw: tuple[int, int]) -> NDArray[np.uint8]:
    return np.full((*hw, 3), 128, np.uint8)


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return type(value).__name__
