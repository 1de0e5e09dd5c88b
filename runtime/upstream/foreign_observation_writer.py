"""Writes our observations as another system's server wants them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from policies.image_resize import check_image, is_source, prepare, warm_up
from policies.observation_check import check_observation
from policies.types import CameraContract, MetaObs, PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.upstream.array_parts import ArrayParts
from runtime.upstream.contract import UpstreamContract


class ForeignObservationWriter:
    """Pictures and state of an observation, by the foreign keys.

    Args:
        given: The keys.
        contract: Of the policy.
        bare_key: Turns a key of a picture (``"video"``) or of the state (``"state"``) into the one
            that is written.

    Attributes:
        image_keys, state_keys: The keys that are written.

    Raises:
        InvalidConfig: The state's parts do not have the state's dimensions, or two pictures have
            one key.
    """

    def __init__(
        self,
        given: UpstreamContract,
        contract: PolicyContract,
        bare_key: Callable[[str, str], str] = lambda _, key: key,
    ) -> None:
        self._contract = contract
        self._cameras: list[tuple[CameraContract, str, bool]] = []
        for camera in contract.cameras:
            source = given.cameras[camera.name]
            key = bare_key("video", source.key)
            self._cameras.append((camera, key, source.layout == "chw"))
        self.image_keys = [key for _, key, _ in self._cameras]
        if len(set(self.image_keys)) != len(self.image_keys):
            raise InvalidConfig(f"cameras: got keys {self.image_keys}, expected different ones")
        sources = [dataclasses.replace(one, key=bare_key("state", one.key)) for one in given.state]
        self._state = ArrayParts("state", sources, contract.state_dim)
        self._state.require_no_gaps()
        self.state_keys = list(self._state.lengths)
        warm_up(contract.cameras)

    def check(self, obs: MetaObs) -> None:
        """Raise ``ContractMismatch`` or ``ObservationError`` if ``obs`` must not be sent."""
        check_observation(obs, self._contract)

    def images(self, obs: MetaObs) -> dict[str, NDArray[np.uint8]]:
        """Return the pictures by key, cropped and resized as the contract says.

        Raises:
            ContractMismatch: A picture has another size or dtype than the contract's.
        """
        written = {}
        for camera, key, is_chw in self._cameras:
            image = obs.images[camera.name]
            check_image(image, camera)
            if image.shape[:2] != tuple(camera.model_hw) or (
                camera.crop is not None and is_source(image, camera)
            ):
                image = prepare(image, camera)
            written[key] = np.ascontiguousarray(image.transpose(2, 0, 1)) if is_chw else image
        return written

    def state(self, obs: MetaObs) -> dict[str, NDArray[np.float32]]:
        """Return the arrays (D,) float32 of the state by key."""
        return self._state.write(obs.state)
