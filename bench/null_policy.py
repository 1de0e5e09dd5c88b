"""Policies that cost nothing, so that what is measured is the way to them and back."""

from __future__ import annotations

from bench.payload import CHUNK, HEIGHT, PAYLOADS, STATE, WIDTH, Sink
from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo


class NullPolicy:
    """Touches every byte of the observation and answers the same actions.

    Args:
        sink: Where the observation is copied to; a payload of pictures.
    """

    def __init__(self, sink: Sink) -> None:
        size = (HEIGHT, WIDTH)
        cameras = [name for name in sink.mirror if name != "state"]
        self.contract = PolicyContract(
            policy_type="null",
            cameras=tuple(CameraContract(name, size, size) for name in cameras),
            state_dim=STATE,
            action_dim=STATE,
            chunk_size=CHUNK,
            n_action_steps=CHUNK,
        )
        self.info = PolicyInfo("null", engine="numpy", trained=False)
        self._sink = sink

    def infer(self, obs: MetaObs) -> ActionChunk:
        actions = self._sink.take({**obs.images, "state": obs.state})
        return ActionChunk(actions, obs.timestep, obs.t_capture_ns)

    def reset(self) -> None:
        pass

    def fork(self) -> NullPolicy:
        return self

    def close(self) -> None:
        pass


def one_camera() -> NullPolicy:
    return NullPolicy(Sink(PAYLOADS["1"]))


def four_cameras() -> NullPolicy:
    return NullPolicy(Sink(PAYLOADS["4"]))
