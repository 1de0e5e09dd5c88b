"""ACT as a ``Policy``."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from policies.act.engine import MAX_BATCH, EngineOptions, Frames
from policies.act.engine_selection import make_engine
from policies.act.registered_memory import RegisteredMemory
from policies.act.weights import ActWeights
from policies.errors import ContractMismatch, InferenceError, PolicyError
from policies.image_resize import check_image, is_source, prepare, warm_up
from policies.observation_check import check_observation
from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo
from policies.weights_hash import HASH_CHARACTERS, BackgroundHash


class ActPolicy:
    """An ACT checkpoint as a policy. Stateless; used by one thread at a time.

    Every chunk depends only on its own observation. The same observation gives the same bits in any
    process of one machine with the same device, engine, precision and threads. On a GPU that holds
    for the life of one ``ActPolicy``: cuDNN times its algorithms, and may choose others next time.

    Args:
        weights: The checkpoint.
        checkpoint: Where ``weights`` came from, for ``info``.
        device, engine, precision, threads, graph_options: See
            ``policies.act.engine.EngineOptions``.
        chunk_size: Cut every chunk to this many actions; the trained number where None.

    Raises:
        ContractMismatch: This machine or the checkpoint does not have what was requested.
    """

    def __init__(
        self,
        weights: ActWeights,
        *,
        checkpoint: str = "",
        device: str = "auto",
        engine: str = "auto",
        precision: str = "auto",
        chunk_size: int | None = None,
        threads: int | None = None,
        graph_options: Sequence[str] | None = None,
    ) -> None:
        trained = weights.config.chunk_size
        if chunk_size is not None and not 1 <= chunk_size <= trained:
            raise ContractMismatch("chunk_size", str(chunk_size), f"1 to {trained}, as trained")
        self._contract = weights.contract(chunk_size)
        warm_up(self._contract.cameras)
        self._state_normalizer = weights.state_normalizer
        options = EngineOptions(device, engine, precision, threads, graph_options)
        self._engine = make_engine(weights, options)
        self._info = PolicyInfo(
            checkpoint=checkpoint,
            device=self._engine.device,
            precision=self._engine.precision,
            engine=self._engine.name,
            threads=self._engine.threads,
            trained=weights.trained,
        )
        # After the engine: one that is cached has read the digest for its key.
        self._hash = BackgroundHash(lambda: weights.digest.hex()[:HASH_CHARACTERS])

    @property
    def contract(self) -> PolicyContract:
        """What the policy needs and returns."""
        return self._contract

    @property
    def info(self) -> PolicyInfo:
        """Checkpoint, device, engine and precision."""
        return self._info

    def weights_hash(self) -> str:
        """Return the hash of weights and normalizers; wait until it is computed."""
        return self._hash.wait()

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the chunk for ``obs``, whose arrays may be read-only and are not kept.

        Raises:
            ObservationError: NaN or infinity in the state.
            ContractMismatch: A camera, shape or dtype other than the contract's.
            InferenceError: The network failed or returned NaN or infinity.
        """
        start = time.monotonic_ns()
        frames = self._prepare(obs, 0)
        prepared = time.monotonic_ns()
        actions = self._engine.run([frames])[0]
        inferred = time.monotonic_ns()
        return self._chunk(obs, actions, prepared - start, inferred - prepared)

    def infer_batch(self, observations: Sequence[MetaObs]) -> list[ActionChunk | PolicyError]:
        """Return each observation's chunk, or the error that ``infer`` would have raised for it.

        An invalid observation does not affect the others. Observations are computed together in
        batches of ``batch_sizes``. The stages ``preprocess`` and ``infer`` are those of the whole
        batch.
        """
        results: list[ActionChunk | PolicyError] = []
        for first in range(0, len(observations), MAX_BATCH):
            results += self._infer_one_batch(observations[first : first + MAX_BATCH])
        return results

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that ``infer_batch`` computes at once; (1,) where it computes one after
        another.
        """
        return self._engine.sizes

    @property
    def batch_is_exact(self) -> bool:
        """Whether a chunk has the same bits in every batch."""
        return self._engine.exact

    @property
    def registered_memory(self) -> RegisteredMemory | None:
        """Where to register memory that holds images, so that the engine reads them directly; None
        where the engine reads any memory directly.
        """
        return self._engine.registered_memory

    def reset(self) -> None:
        """Does nothing: there is no episode state."""

    def fork(self) -> ActPolicy:
        """Return itself: there is no episode state."""
        return self

    def close(self) -> None:
        """Release the engine. Idempotent."""
        self._hash.wait()
        self._engine.close()

    def _infer_one_batch(self, observations: Sequence[MetaObs]) -> list[ActionChunk | PolicyError]:
        """As ``infer_batch``, for at most ``MAX_BATCH`` observations."""
        start = time.monotonic_ns()
        results: list[ActionChunk | PolicyError | None] = [None] * len(observations)
        indices: list[int] = []
        batch: list[Frames] = []
        for index, obs in enumerate(observations):
            try:
                batch.append(self._prepare(obs, len(batch)))
                indices.append(index)
            except PolicyError as error:
                results[index] = error
        prepared = time.monotonic_ns()
        if batch:
            try:
                outputs = self._engine.run(batch)
            except InferenceError as error:
                # Without a traceback, whose frames refer to the images.
                failure = type(error)(str(error))
                return [failure if result is None else result for result in results]
            inferred = time.monotonic_ns()
            for index, actions in zip(indices, outputs, strict=True):
                try:
                    results[index] = self._chunk(
                        observations[index], actions, prepared - start, inferred - prepared
                    )
                except PolicyError as error:
                    results[index] = error
        return [result for result in results if result is not None]

    def _prepare(self, obs: MetaObs, slot: int) -> Frames:
        """Return ``obs`` as the engine's input.

        An image of the model's size is passed on without a copy. Any other is cropped and resized
        into the engine's own memory.
        """
        check_observation(obs, self._contract)
        staging = self._engine.staging(slot)
        images = []
        for camera, own in zip(self._contract.cameras, staging.images, strict=True):
            image = obs.images[camera.name]
            check_image(image, camera)
            as_is = image.shape == own.shape and (
                camera.crop is None or not is_source(image, camera)
            )
            images.append(image if as_is else prepare(image, camera, out=own))
        np.copyto(staging.state, self._state_normalizer.normalize(obs.state))
        return Frames(images, staging.state)

    def _chunk(
        self, obs: MetaObs, actions: NDArray[np.float32], preprocess_ns: int, infer_ns: int
    ) -> ActionChunk:
        """Return the chunk of ``actions`` (T, A), which belong to the engine and are copied."""
        start = time.monotonic_ns()
        own = actions[: self._contract.chunk_size].copy()
        if not np.isfinite(own).all():
            raise InferenceError(f"{self._engine.name}: NaN or infinity among the actions")
        return ActionChunk(
            own,
            obs_timestep=obs.timestep,
            t_capture_ns=obs.t_capture_ns,
            first_action_offset=self._contract.first_action_offset,
            ctrl_space=self._contract.ctrl_space,
            ctrl_type=self._contract.ctrl_type,
            gripper_continuous=self._contract.gripper_continuous,
            stages_ns={
                "preprocess": preprocess_ns,
                "infer": infer_ns,
                "postprocess": time.monotonic_ns() - start,
            },
        )
