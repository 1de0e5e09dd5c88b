"""Makes a policy's observation of a foreign one: which keys are which cameras, and the state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import ContractMismatch
from policies.image_resize import check_image
from policies.types import CameraContract, MetaObs, PolicyContract
from policies.yaml_config import InvalidConfig
from runtime.gateway.planes import interleave
from runtime.options.observation_keys import ImageSource, ObservationKeys, StateSource

COLOURS = 3
MAX_SHOWN_KEYS = 20
"""Most keys of an observation in an error."""


class ObservationMap:
    """Converts foreign observations for one policy.

    Args:
        contract: The policy's.
        keys: The user's configuration.
        image_keys: The protocol's own keys of a camera's image, of which the first present one is
            taken; for the cameras that ``keys`` does not have.
        state_keys: The protocol's own keys of the state, for the case that ``keys`` has none; the
            first present one is the whole state.
        part_size: How many numbers each key of the state has, where the protocol fixes that.

    Raises:
        InvalidConfig: ``keys`` names a camera that the policy does not have, covers another number
            of state dimensions, or leaves the sizes of several parts open.
    """

    def __init__(
        self,
        contract: PolicyContract,
        keys: ObservationKeys,
        *,
        image_keys: Callable[[str], Sequence[str]],
        state_keys: Sequence[str],
        part_size: int | None = None,
    ) -> None:
        unknown = sorted(set(keys.cameras) - set(contract.camera_names))
        if unknown:
            raise InvalidConfig(
                f"cameras: got {unknown[0]!r}, expected cameras of the policy: "
                f"{list(contract.camera_names)}"
            )
        _check_sizes(keys.state, contract.state_dim, part_size)
        self._contract = contract
        self._images: list[tuple[CameraContract, tuple[ImageSource, ...]]] = []
        for camera in contract.cameras:
            given = keys.cameras.get(camera.name)
            own = tuple(ImageSource(key) for key in image_keys(camera.name))
            self._images.append((camera, own if given is None else (given,)))
        self._state, self._part_size = keys.state, part_size
        self._state_keys = tuple(state_keys)

    def read(
        self, observation: Mapping[str, Any], *, timestep: int = 0, raw_lang: str = ""
    ) -> MetaObs:
        """Return the policy's observation. Arrays are views of ``observation`` where possible.

        Args:
            observation: Keys to arrays, numbers and nested maps.
            timestep: Of the result.
            raw_lang: Of the result.

        Raises:
            ContractMismatch: Something is missing or has another shape or dtype; names the key.
        """
        images = {
            camera.name: self._image(observation, camera, sources)
            for camera, sources in self._images
        }
        return MetaObs(
            images,
            self._state_of(observation),
            raw_lang=raw_lang,
            timestep=timestep,
            t_capture_ns=time.monotonic_ns(),
        )

    def _image(
        self,
        observation: Mapping[str, Any],
        camera: CameraContract,
        sources: tuple[ImageSource, ...],
    ) -> NDArray[np.uint8]:
        source, image = _first(observation, sources, f"images.{camera.name}")
        if isinstance(image, np.ndarray):
            while image.ndim > 3 and image.shape[0] == 1:
                image = image[0]
            if image.ndim == 3 and _is_chw(image, source.layout):
                image = image.transpose(1, 2, 0)
        check_image(image, camera)
        planes = image.transpose(2, 0, 1)
        return interleave(planes) if planes.flags.c_contiguous else np.ascontiguousarray(image)

    def _state_of(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        if self._state:
            parts = [_part(observation, source, self._part_size) for source in self._state]
        else:
            own = tuple(StateSource(key) for key in self._state_keys)
            source, _ = _first(observation, own, "state")
            parts = [_part(observation, source, self._part_size)]
        state = np.concatenate(parts)
        if len(state) != self._contract.state_dim:
            sources = self._state or (source,)
            sizes = (f"{one.key} {len(part)}" for one, part in zip(sources, parts, strict=True))
            raise ContractMismatch(
                "state",
                f"{len(state)} numbers ({', '.join(sizes)!s:.200})",
                f"{self._contract.state_dim}",
            )
        return state


def _check_sizes(state: Sequence[StateSource], state_dim: int, part_size: int | None) -> None:
    """Raise ``InvalidConfig`` unless the parts can only be put together in one way.

    With one part of open size its size is what the others leave. With several, an observation with
    parts of other sizes and the same sum would be taken for a state.
    """
    stops = [(one, part_size if one.stop is None else one.stop) for one in state]
    open_parts = [one.key for one, stop in stops if stop is None]
    known = sum(stop - one.start for one, stop in stops if stop is not None)
    if len(open_parts) > 1:
        raise InvalidConfig(
            f"state: got {len(open_parts)} parts without stop, {open_parts!s:.200}, expected at "
            "most one: their sizes could not be told apart"
        )
    if state and (known >= state_dim if open_parts else known != state_dim):
        room = f"fewer, beside {open_parts[0]!r} without stop" if open_parts else "all of them"
        raise InvalidConfig(
            f"state: got {known} dimensions of known size of the policy's {state_dim}, expected "
            f"{room}"
        )


def _first(observation: Mapping[str, Any], sources: Sequence[Any], field: str) -> tuple[Any, Any]:
    """Return the first source whose key is there, and its value."""
    for source in sources:
        value = find_value(observation, source.key)
        if value is not None:
            return source, value
    expected = " or ".join(repr(source.key) for source in sources)
    raise ContractMismatch(field, f"keys {_shown(observation)}", expected)


def find_value(observation: Mapping[str, Any], key: str) -> Any:
    """Return the value of ``key``, which is one key or a path of keys; None if there is none."""
    if key in observation:
        return observation[key]
    head, slash, rest = key.partition("/")
    inner = observation.get(head)
    return find_value(inner, rest) if slash and isinstance(inner, Mapping) else None


def _part(
    observation: Mapping[str, Any], source: StateSource, size: int | None
) -> NDArray[np.float32]:
    """Return a part of the state; ``size`` is the size that an array must have without a stop."""
    _, value = _first(observation, (source,), "state")
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise ContractMismatch(f"state ({source.key})", f"{value!r:.60}", "numbers")
    if sum(length > 1 for length in array.shape) > 1:
        raise ContractMismatch(f"state ({source.key})", f"shape {array.shape}", "one row")
    with np.errstate(over="ignore"):  # infinity, which the policy refuses
        whole = array.astype(np.float32, copy=False).reshape(-1)
    if source.stop is None and size is not None and len(whole) != size:
        raise ContractMismatch(f"state ({source.key})", f"{len(whole)} numbers", f"{size}")
    stop = len(whole) if source.stop is None else source.stop
    if stop > len(whole) or source.start >= stop:
        raise ContractMismatch(
            f"state ({source.key})",
            f"{len(whole)} numbers",
            f"at least {max(stop, source.start + 1)}, for its part from {source.start}",
        )
    return whole[source.start : stop]


def _is_chw(image: NDArray[Any], layout: str) -> bool:
    if layout != "auto":
        return layout == "chw"
    return bool(image.shape[0] == COLOURS != image.shape[2])


def _shown(observation: Mapping[str, Any]) -> list[str]:
    return [f"{key!s:.60}" for key in _paths(observation, "")][:MAX_SHOWN_KEYS]


def _paths(observation: Mapping[str, Any], prefix: str) -> Iterable[str]:
    for key, value in observation.items():
        if isinstance(value, Mapping) and not prefix.count("/"):
            yield from _paths(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}"
