"""The types of a policy: observation, action, contract, and the ``Policy`` interface.

Needs numpy only, so that a robot's computer can import it without torch. A *tick* is a policy tick
of ``contract.dt_s``; ``timestep`` and chunk indices count ticks.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol, get_args, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from policies.errors import ContractMismatch
from policies.execution import RATE, Assumption, Execution, assumed_rate
from policies.number_ranges import MSAA, OFFSET, PERIOD_S, PIXELS

CtrlSpace = Literal["joint", "ee"]
"""Space of the actions: joints or the end effector."""
CtrlType = Literal["abs", "delta", "relative"]
"""Kind of the actions: ILStudio's names, with "relative" for its "rel"."""
Resize = Literal["none", "bilinear", "area"]
"""How a crop is resized to the model's size."""
Pixels = Annotated[int, PIXELS]
Offset = Annotated[int, OFFSET]

DEFAULT_DT_S = 0.02
"""Seconds per tick that are assumed of a policy that does not state its rate."""
UNSPECIFIED_DT_S = float("nan")
"""Default of a contract's ``dt_s``. It is compared by identity, so any other NaN is refused."""

MAX_OBS_STEPS = 16
"""Most consecutive ticks that one observation may have."""
MAX_CAMERA_CHARS = 100
"""Longest name of a camera, which may have any printable characters. It is part of the names of a
message's fields.
"""
STAGES = (
    "pack",
    "publish",
    "server_wait",
    "preprocess",
    "infer",
    "postprocess",
    "reply",
    "unpack",
)
"""Stages of one request, in order; durations in ns. In-process inference has only ``preprocess``,
``infer`` and ``postprocess``.
"""


@dataclass(slots=True)
class MetaObs:
    """One observation.

    For a policy whose contract has ``n_obs_steps`` n > 1 it is of the last n consecutive ticks:
    every array has a leading axis n, the oldest tick first, and the numbers are those of the newest
    tick.

    Attributes:
        images: Camera name to (H, W, 3) uint8 RGB.
        state: (S,) float32, physical units, in the order the policy was trained with.
        state_ee: (E,) float32 end-effector state, where there is one.
        state_joint: (J,) float32 joint state, where it differs from ``state``.
        depth: Camera name to (H, W) float32 metres or uint16 millimetres.
        raw_lang: The instruction, empty for policies that take none.
        timestep: Policy tick of this observation, counted by the client.
        t_capture_ns: The client's monotonic clock at capture. It must not be compared with another
            host's clock.
    """

    images: Mapping[str, NDArray[np.uint8]]
    state: NDArray[np.float32]
    state_ee: NDArray[np.float32] | None = None
    state_joint: NDArray[np.float32] | None = None
    depth: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    raw_lang: str = ""
    timestep: int = 0
    t_capture_ns: int = 0


@dataclass(frozen=True, slots=True)
class MetaAction:
    """One action: ``action`` is (A,) float32 in physical units."""

    action: NDArray[np.float32]
    ctrl_space: CtrlSpace = "joint"
    ctrl_type: CtrlType = "abs"
    gripper_continuous: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class ActionChunk(Sequence[MetaAction]):
    """The future actions inferred from one observation, a sequence of ``MetaAction``.

    Attributes:
        actions: (T, A) float32, physical units. Action i is for tick
            ``obs_timestep + first_action_offset + i``.
        obs_timestep: ``timestep`` of the observation.
        t_capture_ns: ``t_capture_ns`` of the observation.
        first_action_offset: As in ``PolicyContract``.
        stages_ns: Stage (one of ``STAGES``) to duration in ns; only the stages that occurred.
    """

    actions: NDArray[np.float32]
    obs_timestep: int = 0
    t_capture_ns: int = 0
    first_action_offset: int = 0
    ctrl_space: CtrlSpace = "joint"
    ctrl_type: CtrlType = "abs"
    gripper_continuous: bool = True
    stages_ns: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.actions)

    @overload
    def __getitem__(self, index: int) -> MetaAction: ...
    @overload
    def __getitem__(self, index: slice) -> list[MetaAction]: ...
    def __getitem__(self, index: int | slice) -> MetaAction | list[MetaAction]:
        if isinstance(index, slice):
            return [self._at(i) for i in range(*index.indices(len(self)))]
        return self._at(index)

    def __iter__(self) -> Iterator[MetaAction]:
        return (self._at(i) for i in range(len(self)))

    def _at(self, index: int) -> MetaAction:
        return MetaAction(
            self.actions[index], self.ctrl_space, self.ctrl_type, self.gripper_continuous
        )


@dataclass(frozen=True, slots=True)
class CameraContract:
    """How one camera's image becomes the model's input: source, then crop, then resize.

    Attributes:
        name: The name in ``MetaObs.images``.
        source_hw: (height, width) of the camera's images.
        crop: (top, left, height, width) in source pixels, or None for the whole image.
        model_hw: (height, width) of the network's input. A client may send this size directly.
        resize: How the crop becomes ``model_hw``; "none" where they are equal.

    Raises:
        ContractMismatch: A name, size, crop or resize that is not possible.
    """

    name: str
    source_hw: tuple[Pixels, Pixels]
    model_hw: tuple[Pixels, Pixels]
    crop: tuple[Offset, Offset, Pixels, Pixels] | None = None
    resize: Resize = "none"

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_CAMERA_CHARS or not self.name.isprintable():
            raise ContractMismatch(
                "cameras",
                f"a name {self.name!r:.80}",
                f"1 to {MAX_CAMERA_CHARS} printable characters",
            )
        height, width = self.source_hw
        top, left, crop_h, crop_w = self.crop or (0, 0, height, width)
        if min(height, width, crop_h, crop_w, *self.model_hw) < 1 or top < 0 or left < 0:
            raise ContractMismatch(f"cameras.{self.name}", f"{self}", "positive sizes")
        if top + crop_h > height or left + crop_w > width:
            raise ContractMismatch(
                f"cameras.{self.name}.crop", f"{self.crop}", f"a window inside {self.source_hw}"
            )
        if self.resize not in get_args(Resize):
            raise ContractMismatch(
                f"cameras.{self.name}.resize", repr(self.resize), f"one of {get_args(Resize)}"
            )
        if self.resize == "none" and (crop_h, crop_w) != tuple(self.model_hw):
            raise ContractMismatch(
                f"cameras.{self.name}.model_hw",
                f"{self.model_hw}",
                f"{(crop_h, crop_w)} (the crop's size, since resize is 'none')",
            )

    @property
    def accepted_hw(self) -> tuple[tuple[int, int], ...]:
        """(height, width) that a client may send: the source's and the model's."""
        return tuple(dict.fromkeys((self.source_hw, self.model_hw)))


@dataclass(frozen=True, slots=True)
class Rendering:
    """How the training images were rendered; a simulation uses the same unless configured
    otherwise.
    """

    shadows: bool = True
    msaa: Annotated[int, MSAA] = 4


@dataclass(frozen=True, slots=True)
class PolicyContract:
    """What a policy needs and returns. The server sends it to every client.

    Attributes:
        policy_type: e.g. ``"act"``.
        cameras: In the order of the model's inputs.
        state_dim, action_dim: Lengths S and A.
        chunk_size: Actions per chunk, T.
        n_action_steps: Actions to execute before the next chunk, unless the user chooses otherwise.
        n_obs_steps: Consecutive ticks that one observation has, see ``MetaObs``.
        dt_s: Seconds per policy tick. Where it is left out, it becomes ``DEFAULT_DT_S`` and
            ``assumed`` records that.
        first_action_offset: Ticks from the observation to the chunk's first action (0 for ACT).
        ctrl_space, ctrl_type: Space and kind of the actions.
        gripper_continuous: Whether gripper actions are positions rather than open or closed.
        normalizer_hash: Hash of the statistics in use, to tell two servers apart.
        dataset_id: Data set of the normalizers in use; ``dataset_ids``: all in the checkpoint.
        rendering: How simulated images should be rendered, where the checkpoint says so.
        state_names, action_names: S and A names of the dimensions, in their order; empty where the
            checkpoint has none. A robot with other names is refused.
        execution: How the checkpoint says to execute its chunks; None where it does not say.
        assumed: What the checkpoint does not say. It does not count when contracts are compared.

    Raises:
        ContractMismatch: A field that is out of range or contradicts another one.
    """

    policy_type: str
    cameras: tuple[CameraContract, ...]
    state_dim: int
    action_dim: int
    chunk_size: int
    n_action_steps: int
    dt_s: float = UNSPECIFIED_DT_S
    first_action_offset: int = 0
    ctrl_space: CtrlSpace = "joint"
    ctrl_type: CtrlType = "abs"
    gripper_continuous: bool = True
    normalizer_hash: str = ""
    dataset_id: str = ""
    dataset_ids: tuple[str, ...] = ()
    rendering: Rendering | None = None
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    execution: Execution | None = None
    n_obs_steps: int = 1
    assumed: tuple[Assumption, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.dt_s is UNSPECIFIED_DT_S:
            object.__setattr__(self, "dt_s", DEFAULT_DT_S)
            object.__setattr__(self, "assumed", (assumed_rate(DEFAULT_DT_S), *self.assumed))
        names = [camera.name for camera in self.cameras]
        if len(set(names)) != len(names):
            raise ContractMismatch("cameras", f"{names}", "different names")
        for what, dim in (("state", self.state_dim), ("action", self.action_dim)):
            given = getattr(self, f"{what}_names")
            if given and (len(given) != dim or len(set(given)) != dim):
                raise ContractMismatch(
                    f"{what}_names", f"{list(given)}", f"{dim} different names, or none"
                )
        for name in ("state_dim", "action_dim", "chunk_size"):
            if getattr(self, name) < 1:
                raise ContractMismatch(name, str(getattr(self, name)), "at least 1")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ContractMismatch(
                "n_action_steps", str(self.n_action_steps), f"1 to chunk_size = {self.chunk_size}"
            )
        if not 1 <= self.n_obs_steps <= MAX_OBS_STEPS:
            raise ContractMismatch("n_obs_steps", str(self.n_obs_steps), f"1 to {MAX_OBS_STEPS}")
        execution = self.execution
        if execution is not None and (execution.n_action_steps or 1) > self.chunk_size:
            raise ContractMismatch(
                "execution.n_action_steps",
                str(execution.n_action_steps),
                f"1 to chunk_size = {self.chunk_size}",
            )
        if self.dt_s not in PERIOD_S:
            raise ContractMismatch("dt_s", str(self.dt_s), f"{PERIOD_S} seconds")
        for name, choices in (
            ("ctrl_space", get_args(CtrlSpace)),
            ("ctrl_type", get_args(CtrlType)),
        ):
            if getattr(self, name) not in choices:
                raise ContractMismatch(name, repr(getattr(self, name)), f"one of {choices}")

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The cameras' names, in the order of the model's inputs."""
        return tuple(camera.name for camera in self.cameras)

    @property
    def obs_axes(self) -> tuple[int, ...]:
        """Leading axes of every array of an observation: none, or (n_obs_steps,)."""
        return () if self.n_obs_steps == 1 else (self.n_obs_steps,)

    @property
    def assumes_rate(self) -> bool:
        """Whether ``dt_s`` is an assumption, because neither the checkpoint nor the user gave a
        rate.
        """
        return any(assumption.what == RATE for assumption in self.assumed)

    def at_rate(self, fps: float | None) -> PolicyContract:
        """Return this contract at ``fps`` ticks per second, no longer assumed; itself for None."""
        if fps is None:
            return self
        known = tuple(one for one in self.assumed if one.what != RATE)
        return dataclasses.replace(self, dt_s=1 / fps, assumed=known)

    def require(self, expected: PolicyContract, *, but: Sequence[str] = ()) -> None:
        """Raise ``ContractMismatch`` for the first field that differs from ``expected``.

        Args:
            but: Names of fields that may differ.
        """
        for name in (entry.name for entry in dataclasses.fields(self) if entry.compare):
            got, wanted = getattr(self, name), getattr(expected, name)
            if got != wanted and name not in but:
                raise ContractMismatch(name, f"{got}", f"{wanted}")

    def to_json(self) -> str:
        """Return the contract as JSON.

        Fields that were added later are left out where they are empty or 1, so that older clients
        can read it. An older client refuses a contract with another value, as it has to.
        """
        plain = dataclasses.asdict(self)
        if self.execution is not None and self.execution.max_latency_ms is None:
            del plain["execution"]["max_latency_ms"]
        return json.dumps(
            {k: v for k, v in plain.items() if k not in _ADDED_LATER or v not in _UNSET}
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> PolicyContract:
        """Return the contract that ``to_json`` wrote.

        Raises:
            ContractMismatch: Not JSON, a missing or unknown field, or a value out of range.
        """
        try:
            raw = json.loads(text)
            _check_types(raw)
            cameras = tuple(
                CameraContract(
                    name=_text(camera["name"]),
                    source_hw=_pair(camera["source_hw"]),
                    model_hw=_pair(camera["model_hw"]),
                    crop=None if camera["crop"] is None else _four(camera["crop"]),
                    resize=camera["resize"],
                )
                for camera in raw.pop("cameras")
            )
            rendering = raw.pop("rendering")
            execution = raw.pop("execution", None)
            return cls(
                cameras=cameras,
                execution=None if execution is None else _execution(**execution),
                assumed=tuple(_assumption(**one) for one in raw.pop("assumed", ())),
                rendering=None if rendering is None else _rendering(**rendering),
                dataset_ids=_texts(raw.pop("dataset_ids")),
                state_names=_texts(raw.pop("state_names", ())),
                action_names=_texts(raw.pop("action_names", ())),
                **raw,
            )
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            raise ContractMismatch("contract", f"{error!r:.200}", "what to_json wrote") from error


_ADDED_LATER = ("state_names", "action_names", "execution", "n_obs_steps", "assumed")
"""Fields that the first version of clients does not know."""
_UNSET = (None, (), 1)
"""Values of these fields that say what a contract without the field says."""
_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("state_dim", "action_dim", "chunk_size"), (int,)),
    **dict.fromkeys(("n_action_steps", "n_obs_steps"), (int,)),
    **dict.fromkeys(("policy_type", "normalizer_hash", "dataset_id"), (str,)),
    **dict.fromkeys(("ctrl_space", "ctrl_type"), (str,)),
    "first_action_offset": (int,),
    "dt_s": (int, float),
    "gripper_continuous": (bool,),
}
"""JSON types of a contract's plain fields."""


def _check_types(raw: Mapping[str, Any]) -> None:
    """Raise ``TypeError`` for a field of another type, which would fail later and elsewhere."""
    for name, types in _FIELD_TYPES.items():
        if name in raw and type(raw[name]) not in types:
            raise TypeError(f"{name}: {raw[name]!r:.80}")
    if not math.isfinite(raw.get("dt_s", 1.0)):
        raise ValueError(f"dt_s: {raw['dt_s']}")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not a string")
    return value


def _texts(values: Sequence[object]) -> tuple[str, ...]:
    return tuple(_text(value) for value in values)


def _rendering(shadows: object, msaa: object) -> Rendering:
    if type(shadows) is not bool or type(msaa) is not int:
        raise TypeError(f"rendering: {shadows!r:.80}, {msaa!r:.80}")
    return Rendering(shadows, msaa)


def _execution(
    action_manager: object,
    manager_coef: object,
    n_action_steps: object,
    source: object,
    max_latency_ms: object = None,
) -> Execution:
    if type(manager_coef) not in (int, float, type(None)):
        raise TypeError(f"execution.manager_coef: {manager_coef!r:.80}")
    if type(n_action_steps) not in (int, type(None)):
        raise TypeError(f"execution.n_action_steps: {n_action_steps!r:.80}")
    if type(max_latency_ms) not in (int, float, type(None)):
        raise TypeError(f"execution.max_latency_ms: {max_latency_ms!r:.80}")
    coefficient = None if manager_coef is None else float(manager_coef)  # type: ignore[arg-type]
    return Execution(
        _text(action_manager),
        coefficient,
        n_action_steps,  # type: ignore[arg-type]
        _text(source),
        max_latency_ms,  # type: ignore[arg-type]
    )


def _assumption(what: object, value: object, flag: object) -> Assumption:
    return Assumption(_text(what), _text(value), _text(flag))


def _pair(value: Sequence[int]) -> tuple[int, int]:
    height, width = value
    return int(height), int(width)


def _four(value: Sequence[int]) -> tuple[int, int, int, int]:
    top, left, height, width = value
    return int(top), int(left), int(height), int(width)


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """Where and how a policy runs, for logs and result files. No behaviour depends on it, but for
    ``weights_hash``: a client that reconnects demands the same.

    Attributes:
        checkpoint: Path or ``python:`` name that it was loaded from.
        device: e.g. ``"cpu"`` or ``"cuda:0"``.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        engine: e.g. ``"torch 2.13.0"``.
        threads: CPU threads of one inference, 0 where that does not apply.
        trained: False for weights that were only initialized.
        weights_hash: Hash of weights and normalizers; empty where there is none. A policy that
            computes it later is a ``policies.weights_hash.HashedPolicy``.
    """

    checkpoint: str
    device: str = "cpu"
    precision: str = "fp32"
    engine: str = ""
    threads: int = 0
    trained: bool = True
    weights_hash: str = ""


@runtime_checkable
class Policy(Protocol):
    """A policy: it takes observations and returns chunks of future actions."""

    @property
    def contract(self) -> PolicyContract:
        """What the policy needs and returns."""
        ...

    @property
    def info(self) -> PolicyInfo:
        """Where and how the policy runs."""
        ...

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Return the chunk for ``obs``. The policy only reads the arrays of ``obs`` and keeps none.

        Raises:
            ObservationError: Values that must not be acted on (NaN state).
            ContractMismatch: Shapes, dtypes or cameras other than the contract's.
            InferenceError: The model failed.
        """
        ...

    def reset(self) -> None:
        """Discard the state of the current episode."""
        ...

    def fork(self) -> Policy:
        """Return a policy with its own episode state and the same weights.

        A stateless policy returns itself.
        """
        ...

    def close(self) -> None:
        """Release all resources. Idempotent."""
        ...


@runtime_checkable
class SamplingPolicy(Policy, Protocol):
    """A policy that draws random numbers, from a generator of its own in every fork."""

    def seed(self, seed: int) -> None:
        """Restart the generator. Equal seeds and observations then give equal chunks.

        Args:
            seed: 0 to 2⁶³-1.
        """
        ...


class RolloutPolicy(Policy, Protocol):
    """A policy as a rollout plays it, wherever it runs. Nobody's own policy needs to be one."""

    @property
    def transport(self) -> str:
        """How observations reach it: ``"in process"``, ``"shm"`` or ``"zmq"``."""
        ...

    @property
    def transport_reason(self) -> str:
        """Why so."""
        ...

    @property
    def pictures(self) -> str:
        """How pictures reach it, in words."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether the same observations since a reset with the same seed give the same bits
        wherever the policy runs."""
        ...

    def reset(self, seed: int | None = None) -> None:
        """Discard the state of the current episode; ``seed`` is for a ``SamplingPolicy``."""
        ...

    def loan_images(self) -> Mapping[str, NDArray[np.uint8]]:
        """Arrays by camera to render the next observation into, which saves a copy; empty where
        there are none."""
        ...


class AsyncPolicy(RolloutPolicy, Protocol):
    """A policy whose answer arrives later; ``infer`` is ``submit`` and wait."""

    def submit(self, obs: MetaObs) -> int:
        """Send an observation and return its request id. Never waits for the model."""
        ...

    def poll(self) -> ActionChunk | None:
        """Return the next finished chunk, or None. Never blocks; raises the error of a request."""
        ...

    def cancel(self) -> None:
        """Cancel all pending requests; their results are dropped."""
        ...
