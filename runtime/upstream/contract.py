"""The YAML files of ``configs/upstream``: what another system's server needs and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from policies.number_ranges import COUNT, RATE_HZ, Choice, Range, check_ranges
from policies.types import (
    UNSPECIFIED_DT_S,
    CameraContract,
    CtrlSpace,
    CtrlType,
    Offset,
    Pixels,
    PolicyContract,
    Resize,
)
from runtime.options.observation_keys import StateSource

LAYOUTS = ("hwc", "chw")
DIMENSIONS = Range(1, 10_000)
TICKS_AHEAD = Range(-10_000, 10_000)


@dataclass(frozen=True, slots=True)
class UpstreamCamera:
    """A picture of the foreign observation.

    Attributes:
        key: Its key there.
        size: (height, width) that the server wants.
        layout: Order of the axes there, one of ``LAYOUTS``.
        source_hw, crop, resize: As in ``CameraContract``, for a camera of another size; without
            them the camera must have ``size``.
    """

    key: str
    size: tuple[Pixels, Pixels]
    layout: Annotated[str, Choice(LAYOUTS)] = "hwc"
    source_hw: tuple[Pixels, Pixels] | None = None
    crop: tuple[Offset, Offset, Pixels, Pixels] | None = None
    resize: Resize = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamContract:
    """What another system's server needs and returns. Its author is responsible for its truth.

    Attributes:
        cameras: By our names, in our order.
        state: Where the parts of our state go, in our order. ``start`` and ``stop`` are a slice of
            the foreign array, as in ``configs/gateway``; each array must be filled without gaps.
        actions: The parts of our action, in our order, in the same way; None for the protocol's
            own key.
        prompt: Key of the instruction; empty for the protocol's own.
        nested: openpi only. Whether ``/`` in a key separates the keys of nested maps; otherwise it
            is a part of the key.
        rate_hz: Policy ticks per second, None if unknown.
        policy_type: A name for results; the system's by default.

    The others are those of ``PolicyContract``.

    Raises:
        ValueError: A value is out of range.
        ContractMismatch: As ``PolicyContract``.
    """

    cameras: Mapping[str, UpstreamCamera] = field(default_factory=dict)
    state: tuple[StateSource, ...]
    actions: tuple[StateSource, ...] = ()
    prompt: str = ""
    nested: bool = False
    state_dim: Annotated[int, DIMENSIONS]
    action_dim: Annotated[int, DIMENSIONS]
    chunk_size: Annotated[int, DIMENSIONS]
    n_action_steps: Annotated[int, COUNT]
    rate_hz: Annotated[float | None, RATE_HZ] = None
    first_action_offset: Annotated[int, TICKS_AHEAD] = 0
    ctrl_space: CtrlSpace = "joint"
    ctrl_type: CtrlType = "abs"
    gripper_continuous: bool = True
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    policy_type: str = ""

    def __post_init__(self) -> None:
        check_ranges(self)
        self.policy_contract("")

    def policy_contract(self, system: str) -> PolicyContract:
        """Return our contract of ``system``'s policy. Raises ``ContractMismatch``."""
        return PolicyContract(
            policy_type=self.policy_type or system,
            cameras=tuple(
                CameraContract(
                    name, camera.source_hw or camera.size, camera.size, camera.crop, camera.resize
                )
                for name, camera in self.cameras.items()
            ),
            state_dim=self.state_dim,
            action_dim=self.action_dim,
            chunk_size=self.chunk_size,
            n_action_steps=self.n_action_steps,
            dt_s=UNSPECIFIED_DT_S if self.rate_hz is None else 1 / self.rate_hz,
            first_action_offset=self.first_action_offset,
            ctrl_space=self.ctrl_space,
            ctrl_type=self.ctrl_type,
            gripper_continuous=self.gripper_continuous,
            state_names=self.state_names,
            action_names=self.action_names,
        )
