"""Conversion of observations, chunks and errors to messages and back; refused schemas."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.errors import ContractMismatch, InferenceError, ObservationError, PolicyError
from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract, PolicyInfo
from runtime.protocol import messages
from transport.channel import MAX_BODY_BYTES
from transport.schema import ArraySpec, Schema

CONTRACT = PolicyContract(
    policy_type="test",
    cameras=(
        CameraContract("top", (24, 32), (16, 16), crop=(4, 8, 16, 16)),
        CameraContract("wrist", (8, 8), (8, 8)),
    ),
    state_dim=5,
    action_dim=3,
    chunk_size=4,
    n_action_steps=4,
)


def observation(**changes: object) -> MetaObs:
    rng = np.random.default_rng(0)
    fields: dict[str, object] = {
        "images": {
            "top": rng.integers(0, 256, (24, 32, 3), np.uint8),
            "wrist": rng.integers(0, 256, (8, 8, 3), np.uint8),
        },
        "state": np.arange(5, dtype=np.float32),
        "timestep": 7,
        "t_capture_ns": 123456789012345,
    }
    return MetaObs(**{**fields, **changes})


def buffer_for(schema: Schema) -> dict[str, np.ndarray]:
    return schema.views(bytearray(schema.nbytes), writable=True)


def same(a: MetaObs, b: MetaObs) -> None:
    assert a.images.keys() == b.images.keys()
    for name in a.images:
        np.testing.assert_array_equal(a.images[name], b.images[name])
    for name in ("state", "state_ee", "state_joint"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.depth.keys() == b.depth.keys()
    assert (a.raw_lang, a.timestep, a.t_capture_ns) == (b.raw_lang, b.timestep, b.t_capture_ns)


@given(
    state=st.lists(st.floats(width=32, allow_nan=True), min_size=5, max_size=5),
    timestep=st.integers(0, 2**62),
    lang=st.text(max_size=100).filter(lambda t: not t.endswith("\0")),
    ee=st.booleans(),
)
def test_observation_round_trip(state: list[float], timestep: int, lang: str, ee: bool) -> None:
    obs = observation(
        state=np.array(state, np.float32),
        timestep=timestep,
        raw_lang=lang,
        state_ee=np.ones(6, np.float32) if ee else None,
        depth={"top": np.full((24, 32), 1.5, np.float32)},
    )
    schema = messages.observation_schema(obs)
    assert Schema.from_json(schema.to_json()) == schema
    views = buffer_for(schema)
    messages.write_observation(obs, views)
    same(messages.read_observation(views), obs)


def test_images_rendered_in_place_are_not_copied() -> None:
    obs = observation()
    views = buffer_for(messages.observation_schema(obs))
    views["images/top"][:] = 9
    messages.write_observation(
        observation(images={"top": views["images/top"], "wrist": obs.images["wrist"]}), views
    )
    assert (views["images/top"] == 9).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": {"top": np.zeros((24, 32, 3), np.uint8)}}, "images.wrist: got nothing"),
        ({"state": np.zeros(6, np.float32)}, r"state: got float32 \(6,\), expected float32 \(5,\)"),
        ({"state": np.zeros(5)}, r"state: got float64 \(5,\)"),
        ({"state": [0.0] * 5}, "state: got list, expected a numpy array"),
        ({"state": None}, "state: got NoneType, expected a numpy array"),
        ({"images": {"top": "a file", "wrist": None}}, "images.top: got str"),
        ({"raw_lang": "go"}, "raw_lang: got text, expected none"),
        ({"state_ee": np.zeros(3, np.float32)}, "state_ee: got an array, expected none"),
    ],
)
def test_observation_with_other_arrays_is_refused(changes: dict[str, object], message: str) -> None:
    views = buffer_for(messages.observation_schema(observation()))
    with pytest.raises(ContractMismatch, match=message):
        messages.write_observation(observation(**changes), views)


def test_schema_is_accepted_at_source_and_at_model_size() -> None:
    messages.check_observation_schema(messages.observation_schema(observation()), CONTRACT)
    small = dict(observation().images, top=np.zeros((16, 16, 3), np.uint8))
    schema = messages.observation_schema(observation(images=small))
    messages.check_observation_schema(schema, CONTRACT)


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        (
            {"images": {"top": np.zeros((24, 32, 3), np.uint8)}},
            "cameras",
            r"got \['top'\], expected \['top', 'wrist'\]",
        ),
        (
            {
                "images": {
                    "top": np.zeros((9, 9, 3), np.uint8),
                    "wrist": np.zeros((8, 8, 3), np.uint8),
                }
            },
            "images.top",
            r"got uint8 \(9, 9, 3\), expected uint8 \(24, 32, 3\) or \(16, 16, 3\), RGB",
        ),
        (
            {
                "images": {
                    "top": np.zeros((24, 32, 3), np.float32),
                    "wrist": np.zeros((8, 8, 3), np.uint8),
                }
            },
            "images.top",
            "got float32",
        ),
        (
            {"state": np.zeros(4, np.float32)},
            "state",
            r"got float32 \(4,\), expected float32 \(5,\)",
        ),
        ({"state": np.zeros(5)}, "state", r"got float64 \(5,\)"),
    ],
)
def test_wrong_schema_is_refused_by_field(
    changes: dict[str, object], field: str, message: str
) -> None:
    schema = messages.observation_schema(observation(**changes))
    with pytest.raises(ContractMismatch, match=message) as caught:
        messages.check_observation_schema(schema, CONTRACT)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ArraySpec("depth/elsewhere", "float32", (24, 32)), "depth/elsewhere: got float32"),
        (
            ArraySpec("depth/top", "float32", (10_000_000,)),
            r"expected uint16 or float32 \(24, 32\)",
        ),
        (ArraySpec("depth/top", "uint8", (24, 32)), "depth.top: got uint8"),
        (
            ArraySpec("state_ee", "float32", (100_000,)),
            "state_ee: got float32 .*at most 4096 bytes",
        ),
        (ArraySpec("state_joint", "uint8", (1, 2)), r"state_joint: got uint8 \(1, 2\)"),
        (ArraySpec("raw_lang", "uint8", (10**6,)), "raw_lang: got uint8"),
    ],
)
def test_optional_arrays_have_a_maximum_size(spec: ArraySpec, message: str) -> None:
    specs = tuple(messages.observation_schema(observation()).specs.values())
    with pytest.raises(ContractMismatch, match=message):
        messages.check_observation_schema(Schema((*specs, spec)), CONTRACT)


def test_depth_of_a_known_camera_is_accepted() -> None:
    obs = observation(
        depth={"top": np.zeros((24, 32), np.float32)}, state_ee=np.zeros(7, np.float32)
    )
    messages.check_observation_schema(messages.observation_schema(obs), CONTRACT)


def test_unknown_array_is_refused() -> None:
    specs = tuple(messages.observation_schema(observation()).specs.values())
    schema = Schema((*specs, ArraySpec("mood", "float32", (1,))))
    with pytest.raises(ContractMismatch, match="mood: got float32"):
        messages.check_observation_schema(schema, CONTRACT)


@pytest.mark.parametrize("length", [1, 4])
def test_chunk_round_trip(length: int) -> None:
    rng = np.random.default_rng(1)
    chunk = ActionChunk(
        rng.normal(size=(length, 3)).astype(np.float32),
        obs_timestep=9,
        t_capture_ns=77,
        stages_ns={"preprocess": 1, "infer": 2, "postprocess": 3},
    )
    views = buffer_for(messages.reply_schema(CONTRACT))
    messages.write_chunk(chunk, 42, 7, views)
    assert messages.policy_id(views) == 7
    got = messages.read_chunk(views, CONTRACT)
    np.testing.assert_array_equal(got.actions, chunk.actions)
    assert (got.obs_timestep, got.t_capture_ns) == (9, 77)
    assert got.stages_ns == {"server_wait": 42, "preprocess": 1, "infer": 2, "postprocess": 3}
    assert len(got) == length
    assert got[0].action.tolist() == chunk.actions[0].tolist()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned a NoneType, expected an ActionChunk"),
        (np.zeros((4, 3), np.float32), "returned a ndarray"),
        (ActionChunk([[0.0] * 3]), "returned a ActionChunk, expected an ActionChunk over an array"),
        (ActionChunk(np.zeros((5, 3), np.float32)), r"shape \(5, 3\), expected \(1 to 4, 3\)"),
        (ActionChunk(np.zeros((0, 3), np.float32)), r"shape \(0, 3\)"),
        (ActionChunk(np.zeros((4, 2), np.float32)), r"shape \(4, 2\)"),
        (ActionChunk(np.zeros(4, np.float32)), r"shape \(4,\)"),
        (ActionChunk(np.zeros((4, 3))), "dtype float64, expected float32"),
        (ActionChunk(np.full((4, 3), np.nan, np.float32)), "NaN or infinity"),
    ],
)
def test_chunk_that_breaks_the_contract_is_an_error(answer: object, message: str) -> None:
    with pytest.raises(InferenceError, match=message):
        messages.check_chunk(answer, CONTRACT)


@pytest.mark.parametrize("count", [0, 5, -1])
def test_invalid_action_count_is_an_error(count: int) -> None:
    views = buffer_for(messages.reply_schema(CONTRACT))
    views["numbers"][0] = count
    with pytest.raises(InferenceError, match=f"got {count} actions, expected 1 to 4"):
        messages.read_chunk(views, CONTRACT)


@pytest.mark.parametrize(
    "error",
    [
        ObservationError("state: got NaN"),
        InferenceError("out of memory"),
        ContractMismatch("state", "6", "5"),
        PolicyError("ä" * 5000),
        PolicyError("\0" * 5000),
        ContractMismatch("a" * 5000, "\x01" * 5000, "c"),
    ],
)
def test_error_round_trip_within_the_size_limit(error: PolicyError) -> None:
    body = messages.encode_error(error)
    assert len(body) <= MAX_BODY_BYTES
    again = messages.decode_error(body)
    assert type(again) is type(error)
    assert str(again)[:150] == str(error)[:150]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"kind": 3}', b"\xff"])
def test_malformed_error_body_is_an_inference_error(body: bytes) -> None:
    assert isinstance(messages.decode_error(body), PolicyError)


def test_description_round_trip() -> None:
    info = PolicyInfo("ckpt/x", threads=1, weights_hash="0123456789abcdef")
    wire = json.loads(json.dumps(messages.describe(CONTRACT, info)))
    assert messages.read_description(wire) == (CONTRACT, info)
    assert "weights_hash" not in wire["info"]  # an older client refuses fields it does not know
    with pytest.raises(ContractMismatch, match="weights_hash: 7"):
        messages.read_description({**wire, "weights_hash": 7})
    del wire["weights_hash"]  # as an older server
    assert messages.read_description(wire)[1].weights_hash == ""
    with pytest.raises(ContractMismatch, match="description"):
        messages.read_description({"info": {}})
