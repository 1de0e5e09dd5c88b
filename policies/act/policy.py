"""ACT as a ``Policy``."""

from __future__ import annotations

import time

import numpy as np

from policies.act.engine import make_engine, set_threads
from policies.act.weights import ActWeights
from policies.errors import ContractMismatch, InferenceError, ObservationError
from policies.images import prepare
from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo


class ActPolicy:
    """Stateless: every chunk depends on its own observation only. One thread at a time.

    The same observation gives the same bits in any process of one machine with the same device,
    precision and threads.

    Args:
        checkpoint: Where ``weights`` came from, for ``info``.
        device, precision: See ``policies.act.engine``.
        chunk_size: Cut every chunk to this many actions; all that were trained where None.
        threads: CPU threads of one inference, half the cores where None. Process-wide.

    Raises:
        ContractMismatch: What was asked for, this machine or the checkpoint does not have.
    """

    def __init__(
        self,
        weights: ActWeights,
        *,
        checkpoint: str = "",
        device: str = "auto",
        precision: str = "auto",
        chunk_size: int | None = None,
        threads: int | None = None,
    ) -> None:
        trained = weights.config.chunk_size
        if chunk_size is not None and not 1 <= chunk_size <= trained:
            raise ContractMismatch("chunk_size", str(chunk_size), f"1 to {trained}, as trained")
        self._contract = weights.contract(chunk_size)
        self._state_normalizer = weights.state_normalizer
        self._action_normalizer = weights.action_normalizer
        count = set_threads(threads)
        self._engine, chosen = make_engine(weights, device, precision)
        self._info = PolicyInfo(
            checkpoint=checkpoint,
            engine=self._engine.name,
            threads=count,
            trained=weights.trained,
            **chosen,
        )

    @property
    def contract(self) -> PolicyContract:
        return self._contract

    @property
    def info(self) -> PolicyInfo:
        return self._info

    def infer(self, obs: MetaObs) -> ActionChunk:
        """The chunk for ``obs``; its arrays may be read-only, and are not kept.

        Raises:
            ObservationError: NaN or infinity in the state.
            ContractMismatch: Another camera, shape or dtype than the contract's.
            InferenceError: The network failed or gave NaN or infinity.
        """
        start = time.monotonic_ns()
        self._check(obs)
        for camera, buffer in zip(self._contract.cameras, self._engine.images, strict=True):
            prepare(obs.images[camera.name], camera, out=buffer)
        np.copyto(self._engine.state, self._state_normalizer.normalize(obs.state))
        prepared = time.monotonic_ns()
        raw = self._engine.run()
        inferred = time.monotonic_ns()
        actions = self._action_normalizer.denormalize(raw[: self._contract.chunk_size])
        if not np.isfinite(actions).all():
            raise InferenceError(f"{self._engine.name}: NaN or infinity among the actions")
        done = time.monotonic_ns()
        return ActionChunk(
            actions,
            obs_timestep=obs.timestep,
            t_capture_ns=obs.t_capture_ns,
            first_action_offset=self._contract.first_action_offset,
            ctrl_space=self._contract.ctrl_space,
            ctrl_type=self._contract.ctrl_type,
            gripper_continuous=self._contract.gripper_continuous,
            stages_ns={
                "preprocess": prepared - start,
                "infer": inferred - prepared,
                "postprocess": done - inferred,
            },
        )

    def reset(self) -> None:
        """Nothing to forget."""

    def fork(self) -> ActPolicy:
        """Itself: there is no episode state."""
        return self

    def close(self) -> None:
        """Nothing is held that outlives the object."""

    def _check(self, obs: MetaObs) -> None:
        names = self._contract.camera_names
        for name in names:
            if name not in obs.images:
                raise ContractMismatch(
                    f"images.{name}", f"no such camera among {sorted(obs.images)}", f"{names}"
                )
        if len(obs.images) != len(names):
            extra = sorted(obs.images.keys() - set(names))[0]
            raise ContractMismatch(f"images.{extra}", "a picture", f"only {names}")
        state, expected = obs.state, f"float32 ({self._contract.state_dim},)"
        if not isinstance(state, np.ndarray):
            raise ContractMismatch("state", type(state).__name__, expected)
        if state.shape != (self._contract.state_dim,) or state.dtype != np.float32:
            raise ContractMismatch("state", f"{state.dtype} {state.shape}", expected)
        bad = np.flatnonzero(~np.isfinite(state))
        if bad.size:
            raise ObservationError(
                f"state: got {state[bad]} in dimensions {bad.tolist()}, expected finite numbers"
            )
