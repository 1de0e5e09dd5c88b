"""GR00T's modalities for one policy: the names it is told, its observations, its actions.

An observation is accepted nested, ``{"video": {"front": …}}``, and flat, ``{"video.front": …}``.
The names are the policy's: its cameras, ``state`` and ``action``; or those of the configuration.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import ContractMismatch
from policies.types import ActionChunk, MetaObs, PolicyContract
from runtime.gateway.observation_map import ObservationMap
from runtime.options.observation_keys import ObservationKeys, StateSource, bare_key
from runtime.wire_formats.bounded_msgpack import require_map, shown

VIDEO, STATE, LANGUAGE, ACTION = "video", "state", "language", "action"
ANNOTATION, TASK = "annotation", "task"
"""What the language keys of a flat observation begin with, and one that does not."""
INSTRUCTION = f"{ANNOTATION}.human.task_description"
"""The language key that clients are told. Any other one is read, too."""
_AXES = {VIDEO: 3, STATE: 1}
"""Axes of one value, after those of batch and time."""


class GrootModalities:
    """Converts between GR00T's messages and one policy's types.

    With a configuration whose ``state`` has several keys with known sizes that sum to the policy's
    actions, too, the actions are split by these keys. Otherwise they are under ``action``.

    Args:
        contract: The policy's.
        keys: The user's configuration; ``video.front``, ``video/front`` and ``front`` are the same.

    Attributes:
        contract: The policy's.

    Raises:
        InvalidConfig: As ``ObservationMap``.
    """

    def __init__(self, contract: PolicyContract, keys: ObservationKeys) -> None:
        cameras = {
            name: dataclasses.replace(source, key=_path(VIDEO, source.key))
            for name, source in keys.cameras.items()
        }
        state = tuple(
            dataclasses.replace(source, key=_path(STATE, source.key)) for source in keys.state
        )
        self._map = ObservationMap(
            contract,
            ObservationKeys(cameras, state),
            image_keys=lambda camera: (f"{VIDEO}/{camera}",),
            state_keys=(f"{STATE}/{STATE}",),
        )
        self.contract = contract
        self._video = [
            _name(cameras[name].key) if name in cameras else name for name in contract.camera_names
        ]
        self._state = [_name(source.key) for source in state] or [STATE]
        self._parts = _action_parts(contract, state, self._state)

    def config(self) -> dict[str, Any]:
        """Return what ``get_modality_config`` answers: names, and their ticks from now."""
        first = self.contract.first_action_offset
        ticks = list(range(first, first + self.contract.chunk_size))
        actions = list(self._parts) or [ACTION]
        found = {STATE: _modality([0], list(dict.fromkeys(self._state)))}
        if self._video:  # a modality must have a key
            found = {VIDEO: _modality([0], self._video), **found}
        return {**found, ACTION: _modality(ticks, actions), LANGUAGE: _modality([0], [INSTRUCTION])}

    def read(self, observation: Mapping[str, Any], timestep: int) -> MetaObs:
        """Return the policy's observation of one step.

        Args:
            observation: video (1, 1, H, W, 3) uint8, state (1, 1, D), and language [[text]], nested
                or flat. The axes of batch and time may be missing.
            timestep: Of the result.

        Raises:
            ContractMismatch: Something is missing, or has another shape or dtype, or several steps
                or robots; names the key.
            MalformedFrame: ``video``, ``state`` or ``language`` is not a map.
        """
        nested: dict[str, dict[str, Any]] = {VIDEO: {}, STATE: {}, LANGUAGE: {}}
        for key, value in observation.items():
            modality, dot, name = key.partition(".")
            if key in nested:
                nested[key].update(require_map(value, key))
            elif dot and modality in nested:
                nested[modality][name] = value
            elif modality == ANNOTATION or key == TASK:
                nested[LANGUAGE][key] = value
        for modality, names in ((VIDEO, self._video), (STATE, self._state)):
            found = nested[modality]
            found.update(
                {name: _single(found[name], modality, name) for name in set(names) & set(found)}
            )
        return self._map.read(nested, timestep=timestep, raw_lang=_instruction(nested[LANGUAGE]))

    def actions(
        self, chunk: ActionChunk, *, flat: bool, batched: bool = True
    ) -> dict[str, NDArray[np.float32]]:
        """Return the actions, (1, T, A) float32 in physical units, or their parts (1, T, D).

        Args:
            flat: Whether the keys begin with ``action.``, as a flat observation's do.
            batched: Whether there is an axis for the batch. Without it a part is (T, D), or (T,)
                if it is one number, as in version N1.5.
        """
        prefix = f"{ACTION}." if flat else ""
        found = {}
        for name, part in (self._parts or {ACTION: slice(None)}).items():
            values = np.ascontiguousarray(chunk.actions[:, part], np.float32)
            if batched:
                found[prefix + name] = values[None]
            else:
                found[prefix + name] = values[:, 0] if values.shape[1] == 1 else values
        return found


def is_flat(observation: Mapping[str, Any]) -> bool:
    """Return whether ``observation`` has keys such as ``video.front``."""
    return any(key.startswith((f"{VIDEO}.", f"{STATE}.")) for key in observation)


def has_batch_axis(observation: Mapping[str, Any]) -> bool:
    """Return whether every state of a flat observation is (B, T, D), not (T, D)."""
    return all(
        value.ndim > _AXES[STATE] + 1
        for key, value in observation.items()
        if key.startswith(f"{STATE}.") and isinstance(value, np.ndarray)
    )


def _path(modality: str, key: str) -> str:
    """Return the key as a path of nested maps, for one that is flat, a path or a bare name."""
    return f"{modality}/{bare_key(modality, key)}"


def _name(path: str) -> str:
    return path.partition("/")[2]


def _modality(ticks: list[int], keys: list[str]) -> dict[str, Any]:
    fields = {"delta_indices": ticks, "modality_keys": keys}
    return {"__ModalityConfig_class__": True, "as_json": fields}


def _action_parts(
    contract: PolicyContract, sources: tuple[StateSource, ...], names: list[str]
) -> dict[str, slice]:
    """Return the part of an action that has the name of each part of the state, if they fit."""
    sizes = [source.stop - source.start for source in sources if source.stop is not None]
    fits = len(sizes) == len(sources) == len(set(names)) > 1 and sum(sizes) == contract.action_dim
    if not fits:
        return {}
    starts = np.cumsum([0, *sizes]).tolist()
    return {name: slice(*starts[i : i + 2]) for i, name in enumerate(names)}


def _single(value: Any, modality: str, name: str) -> NDArray[Any]:
    """Return the one step of one robot of an array (B, T, …), or (T, …), or without both axes."""
    field, axes = f"{modality}.{name}", _AXES[modality]
    expected = f"an array (1, 1, {'H, W, 3' if modality == VIDEO else 'D'})"
    if not isinstance(value, np.ndarray):
        raise ContractMismatch(field, type(value).__name__, expected)
    outer = value.shape[: max(0, value.ndim - axes)]
    if value.ndim < axes or len(outer) > 2 or math.prod(outer) != 1:
        raise ContractMismatch(
            field, f"shape {value.shape}", f"{expected}: one step of one robot in a request"
        )
    single: NDArray[Any] = value.reshape(value.shape[len(outer) :])
    if modality == VIDEO:
        return single
    with np.errstate(over="ignore"):  # the policy refuses infinity
        return single.astype(np.float32)


def _instruction(language: Mapping[str, Any]) -> str:
    """Return the instruction, "" if there is none: text, or text in lists of one element.

    The key that clients are told is before others, and ``task`` after them.
    """
    if not language:
        return ""
    name = min(language, key=lambda name: (name != INSTRUCTION, name == TASK))
    text = language[name]
    for _ in range(2):
        if isinstance(text, list) and len(text) == 1:
            text = text[0]
    if not isinstance(text, str):
        raise ContractMismatch(f"{LANGUAGE}.{name}", shown(language[name]), "[[text]], one of each")
    return text
