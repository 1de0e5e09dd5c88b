"""LeRobot's messages, read from untrusted pickles and written without its classes or torch."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from policies.checkpoint.safe_pickle_types import AllowedFunction, SafeRecord
from policies.errors import ContractMismatch
from runtime.gateway.lerobot.protobuf_fields import data_field, read_fields
from runtime.gateway.restricted_pickle import Names, RecordClass, read_pickle

HELPERS = "lerobot.async_inference.helpers"
FEATURE_TYPES = "lerobot.configs.types"
STATE, IMAGES = "observation.state", "observation.images."
MAX_FEATURES = 256
"""Most features of a robot, and most entries of one observation."""
MAX_TIMESTEP = 2**62
MAX_PARTS = 4096
"""Most parts of an observation; LeRobot's have 2 MiB each."""
BEGIN, MIDDLE, END = 1, 2, 3
"""States of an observation's parts; a single part is an END."""


def _new_dict() -> dict[str, Any]:
    """Not ``dict``, which would hash the keys of its argument."""
    return {}


def _same(value: object) -> object:
    """A member of an enumeration is its value."""
    return value


_NAMES: Names = {
    (HELPERS, "TimedObservation"): RecordClass("TimedObservation"),
    (HELPERS, "RemotePolicyConfig"): RecordClass("RemotePolicyConfig"),
    (FEATURE_TYPES, "PolicyFeature"): RecordClass("PolicyFeature"),
    (FEATURE_TYPES, "FeatureType"): AllowedFunction(_same),
    ("collections", "OrderedDict"): AllowedFunction(_new_dict),
}
"""All that a message may look up beside numpy's names."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TimedObservation:
    """One observation of a robot.

    Attributes:
        timestamp: The client's wall clock, seconds. Only ever returned to it.
        timestep: The action that the robot executed last.
        values: Motor to number, camera to array, ``"task"`` to text.
    """

    timestamp: float
    timestep: int
    values: Mapping[str, float | str | NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Instructions:
    """What a robot has, and what its client expects to be served.

    Attributes:
        policy_type: e.g. ``"act"``.
        checkpoint: The path or name that the client gives. It decides nothing here.
        state_names: The keys of the state's numbers in an observation, in the state's order.
        cameras: A camera's key in an observation to its images' shape.
        renamed: A camera's key in an observation to the name that the policy has for it.
        actions_per_chunk: Most actions of a reply.
    """

    policy_type: str
    checkpoint: str
    state_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, ...]]
    renamed: Mapping[str, str]
    actions_per_chunk: int


async def join_parts(parts: AsyncIterator[bytes], max_bytes: int) -> bytes:
    """Return the data of an observation that is sent in parts.

    Args:
        parts: Messages with a state (1) and data (2).

    Raises:
        ValueError: A part is malformed or in another place than its state says, there is no END,
            there are more than ``MAX_PARTS``, or the data is larger than ``max_bytes``.
    """
    joined = bytearray()
    expected = (BEGIN, END)
    count = 0
    async for part in parts:
        count += 1
        if count > MAX_PARTS:
            raise ValueError(f"observation: got {count} parts, expected at most {MAX_PARTS}")
        fields = read_fields(part)
        state, data = fields.get(1, 0), data_field(fields, 2)
        if state not in expected:
            shown = "bytes" if isinstance(state, bytes) else state
            raise ValueError(f"transfer_state: got {shown}, expected one of {expected}")
        if len(joined) + len(data) > max_bytes:
            raise ValueError(
                f"observation: got more than {max_bytes} bytes, expected the policy's cameras"
            )
        joined += data
        if state == END:
            return bytes(joined)
        expected = (MIDDLE, END)
    raise ValueError("observation: got the end of the stream, expected a part with END")


def read_observation(content: bytes) -> TimedObservation:
    """Return the observation of a pickled ``TimedObservation``. Arrays are views of ``content``.

    Raises:
        ContractMismatch: Anything else, or one with a value that no observation has.
    """
    fields = _read(content, "TimedObservation", "observation")
    timestep = _field(fields, "timestep", int, "an integer")
    if not 0 <= timestep < MAX_TIMESTEP:
        raise ContractMismatch("timestep", f"{timestep}", "0 or more")
    raw = _bounded(_field(fields, "observation", dict, "a dict"), "observation")
    return TimedObservation(
        _number(fields, "timestamp"), timestep, {key: _value(key, raw[key]) for key in raw}
    )


def read_instructions(content: bytes) -> Instructions:
    """Return the content of a pickled ``RemotePolicyConfig``.

    Raises:
        ContractMismatch: Anything else, or a field of another type.
    """
    fields = _read(content, "RemotePolicyConfig", "instructions")
    features = _bounded(_field(fields, "lerobot_features", dict, "a dict"), "lerobot_features")
    renames = fields.get("rename_map", {})
    if type(renames) is not dict or not all(type(new) is str for new in renames.values()):
        raise ContractMismatch("rename_map", "another type", "a dict of strings")
    count = _field(fields, "actions_per_chunk", int, "an integer")
    if count < 1:
        raise ContractMismatch("actions_per_chunk", f"{count}", "at least 1")
    cameras = [key for key in features if key.startswith(IMAGES)]
    return Instructions(
        _field(fields, "policy_type", str, "a string"),
        _field(fields, "pretrained_name_or_path", str, "a string"),
        _state_names(features[STATE]) if STATE in features else (),
        {key.removeprefix(IMAGES): _shape(key, features[key]) for key in cameras},
        {key.removeprefix(IMAGES): renames.get(key, key).removeprefix(IMAGES) for key in cameras},
        count,
    )


def write_actions(
    actions: NDArray[np.float32], timestep: int, timestamp: float, dt_s: float
) -> bytes:
    """Return the pickle of a list of ``TimedAction``, whose actions are tensors at its reader.

    Args:
        actions: (T, A) float32.
        timestep: Of the first action.
        timestamp: Of the first action, seconds on the client's wall clock.
        dt_s: Seconds from one action to the next.

    An action is written as ``torch.tensor([...])``: numbers of 64 bits, which are float32 exactly,
    in torch's default type. ``torch.from_numpy`` would need the name of a module that numpy 2
    renamed, and an array of its own for every action.
    """
    count, size = actions.shape
    numbers = np.empty((count, size), np.dtype([("code", "S1"), ("value", ">f8")]))
    numbers["code"], numbers["value"] = pickle.BINFLOAT, actions
    rows = [numbers[i].tobytes() for i in range(count)]
    body = b"".join(
        b"".join(
            (
                _NEW_ACTION,
                *(_TIMESTAMP, pickle.BINFLOAT, struct.pack(">d", timestamp + i * dt_s)),
                *(
                    _TIMESTEP,
                    pickle.LONG1,
                    b"\x09",
                    (timestep + i).to_bytes(9, "little", signed=True),
                ),
                *(_ACTION, rows[i], _END_ACTION),
            )
        )
        for i in range(count)
    )
    return b"".join((_HEAD, body, pickle.APPENDS, pickle.STOP))


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text)) + text.encode()


def _memo_name(index: int, module: str, name: str) -> bytes:
    """Look a name up, store it in the memo, and leave the stack as it was."""
    name_of = pickle.GLOBAL + f"{module}\n{name}\n".encode()
    return name_of + pickle.BINPUT + bytes((index,)) + pickle.POP


_CLASS, _TENSOR = (pickle.BINGET + bytes((index,)) for index in (0, 1))
_HEAD = (
    pickle.PROTO
    + b"\x02"
    + _memo_name(0, HELPERS, "TimedAction")
    + _memo_name(1, "torch", "tensor")
    + pickle.EMPTY_LIST
    + pickle.MARK
)
_NEW_ACTION = _CLASS + pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.EMPTY_DICT + pickle.MARK
_TIMESTAMP, _TIMESTEP = _text("timestamp"), _text("timestep")
_ACTION = _text("action") + _TENSOR + pickle.EMPTY_LIST + pickle.MARK
_END_ACTION = pickle.APPENDS + pickle.TUPLE1 + pickle.REDUCE + pickle.SETITEMS + pickle.BUILD


def _read(content: bytes, kind: str, field: str) -> Mapping[str, Any]:
    """The attributes of the pickled object, which must be a ``kind``."""
    try:
        record = read_pickle(content, _NAMES)
    except pickle.UnpicklingError as error:
        raise ContractMismatch(field, f"a pickle that is refused: {error}", kind) from error
    if not isinstance(record, SafeRecord) or record.name != kind:
        shown = record.name if isinstance(record, SafeRecord) else type(record).__name__
        raise ContractMismatch(field, shown, kind)
    return record.fields


def _field(fields: Mapping[str, Any], name: str, kind: type[T], expected: str) -> T:
    value = fields.get(name)
    if type(value) is not kind:
        raise ContractMismatch(name, type(value).__name__, expected)
    return value


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if type(value) not in (int, float) or not math.isfinite(value):  # type: ignore[arg-type]
        raise ContractMismatch(name, type(value).__name__, "a finite number")
    return float(value)  # type: ignore[arg-type]


def _bounded(entries: dict[str, Any], name: str) -> dict[str, Any]:
    if len(entries) > MAX_FEATURES:
        raise ContractMismatch(name, f"{len(entries)} entries", f"at most {MAX_FEATURES}")
    return entries


def _value(key: str, value: object) -> float | str | NDArray[Any]:
    if isinstance(value, np.ndarray):
        return value
    if type(value) in (bool, int, float):
        return float(value)  # type: ignore[arg-type]
    if type(value) is str:
        return value
    raise ContractMismatch(f"{key:.80}", type(value).__name__, "a number, an array or text")


def _part(key: str, feature: object, part: str) -> list[Any]:
    """``feature``'s shape or names; features are dicts, or instances of ``PolicyFeature``."""
    entries = feature.fields if isinstance(feature, SafeRecord) else feature
    value = entries.get(part) if isinstance(entries, dict) else None
    if not isinstance(value, list | tuple) or len(value) > MAX_FEATURES:
        raise ContractMismatch(
            f"lerobot_features.{key:.80}.{part}",
            type(value).__name__,
            f"a list of at most {MAX_FEATURES}",
        )
    return list(value)


def _state_names(feature: object) -> tuple[str, ...]:
    names = _part(STATE, feature, "names")
    if not _all_of(str, names) or len(set(names)) != len(names):
        raise ContractMismatch(
            f"lerobot_features.{STATE}.names", "other values", "different strings"
        )
    return tuple(names)


def _shape(key: str, feature: object) -> tuple[int, ...]:
    shape = _part(key, feature, "shape")
    if not _all_of(int, shape):
        raise ContractMismatch(f"lerobot_features.{key:.80}.shape", "other values", "integers")
    return tuple(shape)


def _all_of(kind: type, values: Iterable[object]) -> bool:
    return all(type(value) is kind for value in values)
