"""Conversion between ``policies.types`` and the arrays of ``transport`` messages.

Covers observations, action chunks, errors, and the description of a server's policy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.errors import (
    ContractMismatch,
    DeviceLost,
    InferenceError,
    ObservationError,
    PolicyError,
    RequestExpired,
    UpstreamLost,
)
from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo
from transport.channel import MAX_BODY_BYTES
from transport.schema import ArraySpec, Schema

IMAGE, DEPTH = "images/", "depth/"
MAX_LANG_BYTES = 1024
"""The size of ``raw_lang`` in a message, UTF-8."""
MAX_STATE_BYTES = 4096
"""The maximum size of each optional state."""
SEED_BYTES = 8
SERVER_STAGES = ("server_wait", "preprocess", "infer", "postprocess")

_SCALARS = ("timestep", "t_capture_ns")
_OPTIONAL_STATES = ("state_ee", "state_joint")


def observation_schema(obs: MetaObs) -> Schema:
    """The message layout for ``obs`` and for every observation with the same arrays.

    Raises:
        SchemaMismatch: An array cannot be sent, e.g. one of dtype float16.
        ContractMismatch: A field is not a numpy array.
    """
    _require_arrays(obs)
    arrays = _observation_arrays(obs)
    specs = [ArraySpec(name, str(array.dtype), array.shape) for name, array in arrays.items()]
    if obs.raw_lang:
        specs.append(ArraySpec("raw_lang", "uint8", (MAX_LANG_BYTES,)))
    specs += [ArraySpec("timestep", "int64", ()), ArraySpec("t_capture_ns", "int64", ())]
    return Schema(tuple(specs))


def _observation_arrays(obs: MetaObs) -> dict[str, Any]:
    """The arrays of ``obs`` by name in a message; not checked to be arrays."""
    arrays: dict[str, Any] = {IMAGE + name: a for name, a in obs.images.items()}
    for name, array in obs.depth.items():
        arrays[DEPTH + name] = array
    arrays["state"] = obs.state
    if obs.state_ee is not None:
        arrays["state_ee"] = obs.state_ee
    if obs.state_joint is not None:
        arrays["state_joint"] = obs.state_joint
    return arrays


def _require_arrays(obs: MetaObs) -> None:
    fields = [("state", obs.state), *((n, getattr(obs, n)) for n in _OPTIONAL_STATES)]
    for kind, arrays in (("images", obs.images), ("depth", obs.depth)):
        fields += [(f"{kind}.{name}", array) for name, array in arrays.items()]
    for name, value in fields:
        if not isinstance(value, np.ndarray) and (
            name not in _OPTIONAL_STATES or value is not None
        ):
            raise ContractMismatch(name, type(value).__name__, "a numpy array")


def write_observation(obs: MetaObs, views: Mapping[str, NDArray[Any]]) -> None:
    """Copy ``obs`` into the arrays of a message of its ``observation_schema``.

    Images that were rendered into the message's own arrays are not copied.

    Raises:
        ContractMismatch: The arrays, shapes or dtypes differ from those of the schema.
    """
    arrays = _observation_arrays(obs)
    for name, array in arrays.items():
        view = views.get(name)
        if view is array:
            continue
        if view is None:
            raise _array_mismatch(arrays, views)
        if not isinstance(array, np.ndarray):
            _require_arrays(obs)
        if array.shape != view.shape or array.dtype != view.dtype:
            raise ContractMismatch(
                name.replace("/", ".", 1),
                f"{array.dtype} {array.shape}",
                f"{view.dtype} {view.shape}",
            )
        np.copyto(view, array, casting="no")
    if len(arrays) + len(_SCALARS) + ("raw_lang" in views) != len(views):
        raise _array_mismatch(arrays, views)
    if "raw_lang" in views:
        views["raw_lang"][:] = _padded(obs.raw_lang)
    elif obs.raw_lang:
        raise ContractMismatch("raw_lang", "text", "none, as in the session's first observation")
    views["timestep"][()] = obs.timestep
    views["t_capture_ns"][()] = obs.t_capture_ns


def _array_mismatch(arrays: Mapping[str, Any], views: Mapping[str, Any]) -> ContractMismatch:
    name = min(arrays.keys() ^ (views.keys() - {*_SCALARS, "raw_lang"}))
    got, expected = ("an array", "none") if name in arrays else ("nothing", "an array")
    return ContractMismatch(
        name.replace("/", ".", 1), got, f"{expected}, as in the session's first observation"
    )


def _padded(text: str) -> NDArray[np.uint8]:
    encoded = text.encode()
    if len(encoded) > MAX_LANG_BYTES:
        raise ContractMismatch("raw_lang", f"{len(encoded)} bytes", f"at most {MAX_LANG_BYTES}")
    padded = np.zeros(MAX_LANG_BYTES, np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return padded


def read_observation(arrays: Mapping[str, NDArray[Any]]) -> MetaObs:
    """The observation in a message: views of its arrays, valid until the message is released."""
    images, depth = _image_names(tuple(arrays))
    lang = arrays.get("raw_lang")
    return MetaObs(
        images={camera: arrays[name] for camera, name in images},
        depth={camera: arrays[name] for camera, name in depth},
        state=arrays["state"],
        state_ee=arrays.get("state_ee"),
        state_joint=arrays.get("state_joint"),
        raw_lang="" if lang is None else lang.tobytes().rstrip(b"\0").decode(errors="replace"),
        timestep=int(arrays["timestep"]),
        t_capture_ns=int(arrays["t_capture_ns"]),
    )


@functools.lru_cache(maxsize=64)
def _image_names(names: tuple[str, ...]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(camera, array name) pairs of a schema's images, and of its depth images."""
    images, depth = (
        [(name[len(kind) :], name) for name in names if name.startswith(kind)]
        for kind in (IMAGE, DEPTH)
    )
    return images, depth


def check_observation_schema(schema: Schema, contract: PolicyContract) -> None:
    """Check that observations of ``schema`` are what ``contract`` needs.

    Raises:
        ContractMismatch: They are not; names the field, what the schema has and what is needed.
    """
    specs, axes = dict(schema.specs), contract.obs_axes
    ticks = f", of {contract.n_obs_steps} consecutive ticks" if axes else ""
    cameras = [name[len(IMAGE) :] for name in specs if name.startswith(IMAGE)]
    if set(cameras) != set(contract.camera_names):
        raise ContractMismatch("cameras", f"{sorted(cameras)}", f"{sorted(contract.camera_names)}")
    for camera in contract.cameras:
        spec = specs.pop(IMAGE + camera.name)
        shapes = [(*axes, *hw, 3) for hw in camera.accepted_hw]
        if spec.dtype != "uint8" or spec.shape not in shapes:
            sizes = " or ".join(map(str, shapes))
            raise ContractMismatch(f"images.{camera.name}", str(spec), f"uint8 {sizes}, RGB{ticks}")
    state = ArraySpec("state", "float32", (*axes, contract.state_dim))
    _require_spec(specs.pop("state", None), state)
    for name in ("timestep", "t_capture_ns"):
        _require_spec(specs.pop(name, None), ArraySpec(name, "int64", ()))
    if "raw_lang" in specs:
        _require_spec(specs.pop("raw_lang"), ArraySpec("raw_lang", "uint8", (MAX_LANG_BYTES,)))
    for name in _OPTIONAL_STATES:
        spec = specs.pop(name, ArraySpec(name, "float32", (*axes, 1)))
        fits = len(spec.shape) == len(axes) + 1 and spec.shape[:-1] == axes
        if spec.dtype != "float32" or not fits or spec.nbytes > MAX_STATE_BYTES:
            shape = ", ".join(map(str, (*axes, "n"))) + ("" if axes else ",")
            raise ContractMismatch(
                name, str(spec), f"float32 ({shape}), at most {MAX_STATE_BYTES} bytes"
            )
    for camera in contract.cameras:
        shapes = [(*axes, *hw) for hw in camera.accepted_hw]
        spec = specs.pop(DEPTH + camera.name, ArraySpec("none", "uint16", shapes[0]))
        if spec.dtype not in ("uint16", "float32") or spec.shape not in shapes:
            sizes = " or ".join(map(str, shapes))
            raise ContractMismatch(f"depth.{camera.name}", str(spec), f"uint16 or float32 {sizes}")
    if specs:
        name, spec = next(iter(specs.items()))
        raise ContractMismatch(
            name, str(spec), f"images, depth of {contract.camera_names}, state, {_OPTIONAL_STATES}"
        )


def _require_spec(got: ArraySpec | None, expected: ArraySpec) -> None:
    if got != expected:
        raise ContractMismatch(expected.name, str(got) if got else "nothing", str(expected))


def encode_reset(seed: int | None) -> bytes:
    """The body of a RESET: a seed of 0 to 2⁶³-1 in 8 bytes, little-endian; empty for None.

    Raises:
        ValueError: ``seed`` is out of range.
    """
    if seed is None:
        return b""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, expected 0 to 2**63 - 1")
    return seed.to_bytes(SEED_BYTES, "little")


def decode_reset(body: bytes) -> int | None:
    """The seed that ``encode_reset`` wrote; None for any other bytes."""
    seed = int.from_bytes(body, "little")
    return seed if len(body) == SEED_BYTES and seed < 2**63 else None


def reply_schema(contract: PolicyContract) -> Schema:
    """The layout of a reply.

    ``actions`` is float32 (chunk_size, action_dim). ``numbers`` is int64: the count of valid
    actions, the observation's tick, its capture time (ns), the policy's id, and the duration of
    each of ``SERVER_STAGES`` (ns).
    """
    return Schema(
        (
            ArraySpec("actions", "float32", (contract.chunk_size, contract.action_dim)),
            ArraySpec("numbers", "int64", (4 + len(SERVER_STAGES),)),
        )
    )


def check_chunk(chunk: object, contract: PolicyContract) -> None:
    """Check that what a policy returned is a chunk of its own contract.

    Raises:
        InferenceError: It is not, or it has a NaN or infinity, which must never reach an arm.
    """
    if not isinstance(chunk, ActionChunk) or not isinstance(chunk.actions, np.ndarray):
        raise InferenceError(
            f"the policy returned a {type(chunk).__name__}, expected an ActionChunk over an array"
        )
    shape, (most, width) = chunk.actions.shape, (contract.chunk_size, contract.action_dim)
    if len(shape) != 2 or not 0 < shape[0] <= most or shape[1] != width:
        raise InferenceError(
            f"the policy returned actions of shape {shape}, expected (1 to {most}, {width})"
        )
    if chunk.actions.dtype != np.float32:
        raise InferenceError(
            f"the policy returned actions of dtype {chunk.actions.dtype}, expected float32"
        )
    # 0 times anything finite is 0, and times a NaN or an infinity is a NaN: one pass, no array.
    if not math.isfinite(np.vdot(chunk.actions, _zeros(chunk.actions.size))):
        raise InferenceError("the policy returned NaN or infinity among its actions")


@functools.lru_cache(maxsize=64)
def _zeros(size: int) -> NDArray[np.float32]:
    return np.zeros(size, np.float32)


def write_chunk(
    chunk: ActionChunk, server_wait_ns: int, policy_id: int, views: Mapping[str, NDArray[Any]]
) -> None:
    """Copy ``chunk``, which ``check_chunk`` accepted, into the arrays of a reply; ns."""
    actions, count = views["actions"], len(chunk.actions)
    actions[:count] = chunk.actions
    actions[count:] = 0
    stages = chunk.stages_ns
    views["numbers"][:] = (
        count,
        chunk.obs_timestep,
        chunk.t_capture_ns,
        policy_id,
        server_wait_ns,
        *(stages.get(name, 0) for name in SERVER_STAGES[1:]),
    )


def read_chunk(arrays: Mapping[str, NDArray[Any]], contract: PolicyContract) -> ActionChunk:
    """The chunk in a reply, as a copy.

    Raises:
        InferenceError: The count of actions is out of range.
    """
    count, obs_timestep, t_capture_ns, _, *stages = arrays["numbers"].tolist()
    if not 0 < count <= contract.chunk_size:
        raise InferenceError(f"reply: got {count} actions, expected 1 to {contract.chunk_size}")
    return ActionChunk(
        arrays["actions"][:count].copy(),
        obs_timestep,
        t_capture_ns,
        contract.first_action_offset,
        contract.ctrl_space,
        contract.ctrl_type,
        contract.gripper_continuous,
        dict(zip(SERVER_STAGES, stages, strict=True)),
    )


def policy_id(arrays: Mapping[str, NDArray[Any]]) -> int:
    """The id of the policy that computed a reply; see ``LoadedModel.generation``."""
    return int(arrays["numbers"][3])


_ERRORS: dict[str, type[PolicyError]] = {
    kind.__name__: kind
    for kind in (
        ObservationError,
        InferenceError,
        RequestExpired,
        DeviceLost,
        UpstreamLost,
        PolicyError,
    )
}


def encode_error(error: PolicyError) -> bytes:
    """An error as the body of an ERROR message: JSON of at most ``MAX_BODY_BYTES``."""
    if isinstance(error, ContractMismatch):
        body = {"kind": "ContractMismatch", "args": [error.field, error.got, error.expected]}
    else:
        kind = type(error).__name__ if type(error).__name__ in _ERRORS else "PolicyError"
        body = {"kind": kind, "args": [str(error)]}
    # Each argument is cut, so that the body stays JSON; a character takes at most 6 bytes of it.
    limit = MAX_BODY_BYTES // 7 // len(body["args"])
    body["args"] = [str(argument)[:limit] for argument in body["args"]]
    return json.dumps(body).encode()


def decode_error(body: bytes) -> PolicyError:
    """The error that ``encode_error`` wrote; an ``InferenceError`` for any other bytes."""
    try:
        raw = json.loads(body)
        kind, args = raw["kind"], [str(argument) for argument in raw["args"]]
        if kind == "ContractMismatch" and len(args) == 3:
            return ContractMismatch(*args)
        return _ERRORS.get(kind, PolicyError)(*args[:1])
    except (ValueError, KeyError, TypeError, RecursionError):
        return InferenceError(f"the server reported a failure: {body[:200]!r}")


def contract_hash(contract: PolicyContract) -> str:
    """A hash over the fields of a contract, without ``assumed``: 16 hexadecimal digits."""
    stated = dataclasses.replace(contract, assumed=())
    return hashlib.sha256(stated.to_json().encode()).hexdigest()[:16]


def is_deterministic(info: PolicyInfo) -> bool:
    """Whether the same observation gives the same bits in any process of one machine.

    True on a CPU with one engine, precision and number of threads; not shown for a GPU.
    """
    return info.device == "cpu"


def describe(contract: PolicyContract, info: PolicyInfo) -> dict[str, Any]:
    """The description of a server's policy, as JSON values, for clients without a session."""
    fields = {name: getattr(info, name) for name in PolicyInfo.__slots__}
    # Beside ``info``, of which an older client accepts only the fields that it knows.
    weights_hash = fields.pop("weights_hash")
    return {"contract": contract.to_json(), "info": fields, "weights_hash": weights_hash}


def read_description(description: Mapping[str, Any]) -> tuple[PolicyContract, PolicyInfo]:
    """The contract and info that ``describe`` encoded; no hash from an older server.

    Raises:
        ContractMismatch: The description has another form.
    """
    try:
        weights_hash = description.get("weights_hash", "")
        if not isinstance(weights_hash, str):
            raise TypeError(f"weights_hash: {weights_hash!r:.80}")
        info = PolicyInfo(**description["info"], weights_hash=weights_hash)
        return PolicyContract.from_json(description["contract"]), info
    except (KeyError, TypeError) as error:
        raise ContractMismatch("description", repr(error), "contract and info") from error
