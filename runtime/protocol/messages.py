"""Policies' nouns as a transport's arrays, and back: the one place that knows both."""

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
    InferenceError,
    ObservationError,
    PolicyError,
    RequestExpired,
)
from policies.types import ActionChunk, MetaObs, PolicyContract, PolicyInfo
from transport.channel import MAX_BODY_BYTES
from transport.schema import ArraySpec, Schema

IMAGE, DEPTH = "images/", "depth/"
MAX_LANG_BYTES = 1024
"""Room for ``raw_lang`` in a message, UTF-8."""
MAX_STATE_BYTES = 4096
"""Of each of the optional states."""
SERVER_STAGES = ("server_wait", "preprocess", "infer", "postprocess")

_SCALARS = ("timestep", "t_capture_ns")
_OPTIONAL_STATES = ("state_ee", "state_joint")


def observation_schema(obs: MetaObs) -> Schema:
    """The layout that fits ``obs`` and every later observation of its kind.

    Raises:
        SchemaMismatch: An array that cannot cross, e.g. of dtype float16.
    """
    _need_arrays(obs)
    arrays = _observation_arrays(obs)
    specs = [ArraySpec(name, str(array.dtype), array.shape) for name, array in arrays.items()]
    if obs.raw_lang:
        specs.append(ArraySpec("raw_lang", "uint8", (MAX_LANG_BYTES,)))
    specs += [ArraySpec("timestep", "int64", ()), ArraySpec("t_capture_ns", "int64", ())]
    return Schema(tuple(specs))


def _observation_arrays(obs: MetaObs) -> dict[str, Any]:
    """Arrays, where the caller kept to the types."""
    arrays: dict[str, Any] = {IMAGE + name: a for name, a in obs.images.items()}
    for name, array in obs.depth.items():
        arrays[DEPTH + name] = array
    arrays["state"] = obs.state
    if obs.state_ee is not None:
        arrays["state_ee"] = obs.state_ee
    if obs.state_joint is not None:
        arrays["state_joint"] = obs.state_joint
    return arrays


def _need_arrays(obs: MetaObs) -> None:
    fields = [("state", obs.state), *((n, getattr(obs, n)) for n in _OPTIONAL_STATES)]
    for kind, pictures in (("images", obs.images), ("depth", obs.depth)):
        fields += [(f"{kind}.{name}", picture) for name, picture in pictures.items()]
    for name, value in fields:
        if not isinstance(value, np.ndarray) and (
            name not in _OPTIONAL_STATES or value is not None
        ):
            raise ContractMismatch(name, type(value).__name__, "a numpy array")


def write_observation(obs: MetaObs, views: Mapping[str, NDArray[Any]]) -> None:
    """Copy ``obs`` into the arrays of a message of its ``observation_schema``.

    Pictures already rendered into the message's own arrays are not copied again.

    Raises:
        ContractMismatch: Not of the kind that the schema was made from.
    """
    arrays = _observation_arrays(obs)
    for name, array in arrays.items():
        view = views.get(name)
        if view is array:
            continue
        if view is None:
            raise _other_kind(arrays, views)
        if not isinstance(array, np.ndarray):
            _need_arrays(obs)
        if array.shape != view.shape or array.dtype != view.dtype:
            raise ContractMismatch(
                name.replace("/", ".", 1),
                f"{array.dtype} {array.shape}",
                f"{view.dtype} {view.shape}",
            )
        np.copyto(view, array, casting="no")
    if len(arrays) + len(_SCALARS) + ("raw_lang" in views) != len(views):
        raise _other_kind(arrays, views)
    if "raw_lang" in views:
        views["raw_lang"][:] = _padded(obs.raw_lang)
    elif obs.raw_lang:
        raise ContractMismatch("raw_lang", "text", "none, as in the session's first observation")
    views["timestep"][()] = obs.timestep
    views["t_capture_ns"][()] = obs.t_capture_ns


def _other_kind(arrays: Mapping[str, Any], views: Mapping[str, Any]) -> ContractMismatch:
    odd = min(arrays.keys() ^ (views.keys() - {*_SCALARS, "raw_lang"}))
    got, expected = ("an array", "none") if odd in arrays else ("nothing", "an array")
    return ContractMismatch(
        odd.replace("/", ".", 1), got, f"{expected}, as in the session's first observation"
    )


def _padded(text: str) -> NDArray[np.uint8]:
    encoded = text.encode()
    if len(encoded) > MAX_LANG_BYTES:
        raise ContractMismatch("raw_lang", f"{len(encoded)} bytes", f"at most {MAX_LANG_BYTES}")
    padded = np.zeros(MAX_LANG_BYTES, np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return padded


def read_observation(arrays: Mapping[str, NDArray[Any]]) -> MetaObs:
    """The observation in a message: views of its arrays, valid until the message's release."""
    images, depth = _pictures(tuple(arrays))
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
def _pictures(names: tuple[str, ...]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(camera, name of the array) of a schema's pictures, and of its depth pictures."""
    images, depth = (
        [(name[len(kind) :], name) for name in names if name.startswith(kind)]
        for kind in (IMAGE, DEPTH)
    )
    return images, depth


def check_observation_schema(schema: Schema, contract: PolicyContract) -> None:
    """Whether observations of ``schema`` are what ``contract`` needs.

    Raises:
        ContractMismatch: They are not; names the field, what was offered and what is needed.
    """
    specs = dict(schema.specs)
    cameras = [name[len(IMAGE) :] for name in specs if name.startswith(IMAGE)]
    if set(cameras) != set(contract.camera_names):
        raise ContractMismatch("cameras", f"{sorted(cameras)}", f"{sorted(contract.camera_names)}")
    for camera in contract.cameras:
        spec = specs.pop(IMAGE + camera.name)
        sizes = " or ".join(f"({h}, {w}, 3)" for h, w in camera.accepted_hw)
        if spec.dtype != "uint8" or spec.shape not in [(*hw, 3) for hw in camera.accepted_hw]:
            raise ContractMismatch(f"images.{camera.name}", str(spec), f"uint8 {sizes}, RGB")
    _need(specs.pop("state", None), ArraySpec("state", "float32", (contract.state_dim,)))
    for name in ("timestep", "t_capture_ns"):
        _need(specs.pop(name, None), ArraySpec(name, "int64", ()))
    if "raw_lang" in specs:
        _need(specs.pop("raw_lang"), ArraySpec("raw_lang", "uint8", (MAX_LANG_BYTES,)))
    for name in _OPTIONAL_STATES:
        spec = specs.pop(name, ArraySpec(name, "float32", (1,)))
        if spec.dtype != "float32" or len(spec.shape) != 1 or spec.nbytes > MAX_STATE_BYTES:
            raise ContractMismatch(
                name, str(spec), f"float32 (n,), at most {MAX_STATE_BYTES} bytes"
            )
    for camera in contract.cameras:
        spec = specs.pop(DEPTH + camera.name, ArraySpec("none", "uint16", camera.source_hw))
        if spec.dtype not in ("uint16", "float32") or spec.shape not in camera.accepted_hw:
            sizes = " or ".join(map(str, camera.accepted_hw))
            raise ContractMismatch(f"depth.{camera.name}", str(spec), f"uint16 or float32 {sizes}")
    if specs:
        name, spec = next(iter(specs.items()))
        raise ContractMismatch(
            name, str(spec), f"images, depth of {contract.camera_names}, state, {_OPTIONAL_STATES}"
        )


def _need(got: ArraySpec | None, expected: ArraySpec) -> None:
    if got != expected:
        raise ContractMismatch(expected.name, str(got) if got else "nothing", str(expected))


def reply_schema(contract: PolicyContract) -> Schema:
    """The layout of an answer: the actions; their count, tick and capture time, the id of the
    policy, and the durations of the server's stages."""
    return Schema(
        (
            ArraySpec("actions", "float32", (contract.chunk_size, contract.action_dim)),
            ArraySpec("numbers", "int64", (4 + len(SERVER_STAGES),)),
        )
    )


def check_chunk(chunk: object, contract: PolicyContract) -> None:
    """Whether a policy's answer is what its own contract says.

    Raises:
        InferenceError: It is not; or it holds a NaN or infinity, which must never reach an arm.
    """
    if not isinstance(chunk, ActionChunk) or not isinstance(chunk.actions, np.ndarray):
        raise InferenceError(
            f"the policy answered a {type(chunk).__name__}, expected an ActionChunk over an array"
        )
    shape, (most, width) = chunk.actions.shape, (contract.chunk_size, contract.action_dim)
    if len(shape) != 2 or not 0 < shape[0] <= most or shape[1] != width:
        raise InferenceError(
            f"the policy answered actions of shape {shape}, expected (1 to {most}, {width})"
        )
    if chunk.actions.dtype != np.float32:
        raise InferenceError(
            f"the policy answered actions of dtype {chunk.actions.dtype}, expected float32"
        )
    # 0 times anything finite is 0, and times a NaN or an infinity is a NaN: one pass, no array.
    if not math.isfinite(np.vdot(chunk.actions, _zeros(chunk.actions.size))):
        raise InferenceError("the policy answered NaN or infinity among its actions")


@functools.lru_cache(maxsize=64)
def _zeros(size: int) -> NDArray[np.float32]:
    return np.zeros(size, np.float32)


def write_chunk(
    chunk: ActionChunk, server_wait_ns: int, policy_id: int, views: Mapping[str, NDArray[Any]]
) -> None:
    """Copy ``chunk``, which ``check_chunk`` passed, into the arrays of an answer."""
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
    """The chunk in an answer, copied out of it.

    Raises:
        InferenceError: A count that cannot be.
    """
    count, obs_timestep, t_capture_ns, _, *stages = arrays["numbers"].tolist()
    if not 0 < count <= contract.chunk_size:
        raise InferenceError(f"answer: got {count} actions, expected 1 to {contract.chunk_size}")
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
    """Which of the server's policies an answer is of; see ``LoadedModel.generation``."""
    return int(arrays["numbers"][3])


_ERRORS: dict[str, type[PolicyError]] = {
    kind.__name__: kind for kind in (ObservationError, InferenceError, RequestExpired, PolicyError)
}


def encode_error(error: PolicyError) -> bytes:
    """An error as the body of an ERROR message."""
    if isinstance(error, ContractMismatch):
        body = {"kind": "ContractMismatch", "args": [error.field, error.got, error.expected]}
    else:
        kind = type(error).__name__ if type(error).__name__ in _ERRORS else "PolicyError"
        body = {"kind": kind, "args": [str(error)]}
    # Cut by argument, so that what is sent stays JSON; a character takes at most 6 bytes of it.
    limit = MAX_BODY_BYTES // 7 // len(body["args"])
    body["args"] = [str(argument)[:limit] for argument in body["args"]]
    return json.dumps(body).encode()


def decode_error(body: bytes) -> PolicyError:
    """The error that ``encode_error`` wrote; a plain one for anything else."""
    try:
        raw = json.loads(body)
        kind, args = raw["kind"], [str(argument) for argument in raw["args"]]
        if kind == "ContractMismatch" and len(args) == 3:
            return ContractMismatch(*args)
        return _ERRORS.get(kind, PolicyError)(*args[:1])
    except (ValueError, KeyError, TypeError, RecursionError):
        return InferenceError(f"the server reported a failure: {body[:200]!r}")


def contract_hash(contract: PolicyContract) -> str:
    """Tells two contracts apart that are not equal."""
    said = dataclasses.replace(contract, assumed=())
    return hashlib.sha256(said.to_json().encode()).hexdigest()[:16]


def is_deterministic(info: PolicyInfo) -> bool:
    """Whether the same observation gives the same bits in any process of one machine.

    One engine, precision and number of threads do so on a CPU; on a GPU nobody has shown it yet.
    """
    return info.device == "cpu"


def describe(contract: PolicyContract, info: PolicyInfo) -> dict[str, Any]:
    """What a server says of its policy before a session is opened."""
    return {
        "contract": contract.to_json(),
        "info": {name: getattr(info, name) for name in PolicyInfo.__slots__},
    }


def read_description(description: Mapping[str, Any]) -> tuple[PolicyContract, PolicyInfo]:
    """What ``describe`` said.

    Raises:
        ContractMismatch: It is not of that form.
    """
    try:
        return PolicyContract.from_json(description["contract"]), PolicyInfo(**description["info"])
    except (KeyError, TypeError) as error:
        raise ContractMismatch("description", repr(error), "contract and info") from error
