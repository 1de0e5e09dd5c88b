"""Foreign observations: where the policy's inputs are found, and what is said otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from policies.errors import ContractMismatch
from policies.types import CameraContract, MetaObs
from policies.yaml_config import INSTALLED_CONFIGS, InvalidConfig, load_config, parse_config
from runtime.gateway.observation_map import ObservationMap, find_value
from runtime.options.observation_keys import ImageSource, ObservationKeys, StateSource
from tests.runtime.toy_policy import CONTRACT

TWO = dataclasses.replace(
    CONTRACT,
    cameras=(CameraContract("top", (24, 32), (12, 16), resize="area"),
             CameraContract("wrist", (8, 10), (8, 10))),
    state_dim=3,
)  # fmt: skip
TOP = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)
WRIST = np.random.default_rng(2).integers(0, 256, (8, 10, 3), np.uint8)
STATE = np.array([1.5, -2.0, 3.0], np.float32)
OBSERVATION = {"top": TOP, "wrist": WRIST, "state": STATE}


def read(observation: dict[str, Any], keys: ObservationKeys | None = None) -> MetaObs:
    """As a protocol reads it whose own keys are a camera's name, then ``pictures/<camera>``."""
    made = ObservationMap(
        TWO,
        keys or ObservationKeys(),
        image_keys=lambda camera: (camera, f"pictures/{camera}"),
        state_keys=("state", "joints"),
    )
    return made.read(observation, timestep=7, raw_lang="lift")


def check(obs: MetaObs) -> None:
    np.testing.assert_array_equal(obs.images["top"], TOP)
    np.testing.assert_array_equal(obs.images["wrist"], WRIST)
    np.testing.assert_array_equal(obs.state, STATE)
    assert obs.state.dtype == np.float32 and list(obs.images) == ["top", "wrist"]


def test_the_protocols_own_keys_are_found() -> None:
    obs = read(OBSERVATION)
    check(obs)
    assert (obs.timestep, obs.raw_lang) == (7, "lift") and obs.t_capture_ns > 0
    check(read({"pictures": {"top": TOP, "wrist": WRIST}, "joints": STATE}))
    check(read({"pictures/top": TOP, "wrist": WRIST, "joints": STATE}))
    check(read({**OBSERVATION, "more": object()}))


def test_the_first_key_that_is_there_counts() -> None:
    check(read({**OBSERVATION, "pictures": {"top": TOP[:3]}, "joints": STATE[:1]}))


def test_nothing_is_copied_that_is_as_it_should_be() -> None:
    obs = read(OBSERVATION)
    assert np.shares_memory(obs.images["top"], TOP)
    assert np.shares_memory(obs.images["wrist"], WRIST)


def test_either_order_of_the_axes_is_taken_and_leading_ones_too() -> None:
    turned = WRIST.transpose(2, 0, 1)
    obs = read({**OBSERVATION, "top": TOP[None, None], "wrist": turned[None]})
    check(obs)
    assert obs.images["wrist"].flags.c_contiguous


def test_a_camera_may_send_the_models_size() -> None:
    small = np.zeros((12, 16, 3), np.uint8)
    assert read({**OBSERVATION, "top": small}).images["top"].shape == (12, 16, 3)


def test_a_layout_that_is_given_is_not_guessed() -> None:
    keys = ObservationKeys(cameras={"wrist": ImageSource("hand", "hwc")})
    with pytest.raises(ContractMismatch, match=r"images.wrist: got shape \(3, 8, 10\)"):
        read({**OBSERVATION, "hand": WRIST.transpose(2, 0, 1)}, keys)
    check(read({**OBSERVATION, "hand": WRIST}, keys))


@pytest.mark.parametrize(
    "state",
    [
        STATE.astype(np.float64),
        STATE[None, None],
        [1.5, -2, 3.0],
        [[1.5], [-2.0], [3.0]],
        STATE.astype(">f4"),
        STATE.astype(np.float16),
    ],
)
def test_a_state_may_be_any_numbers(state: Any) -> None:
    check(read({**OBSERVATION, "state": state}))


def test_a_history_of_states_is_refused() -> None:
    """Its first row would be the oldest one."""
    with pytest.raises(ContractMismatch, match=r"got shape \(2, 3\), expected one row"):
        read({**OBSERVATION, "state": np.stack([STATE, STATE])})


def test_a_state_is_put_together_in_the_maps_order() -> None:
    keys = ObservationKeys(
        state=(StateSource("arm/joints", 1, 3), StateSource("gripper", 0, 1)),
    )
    check(read({**OBSERVATION, "arm": {"joints": [0.0, 1.5, -2.0, 9.0]}, "gripper": 3.0}, keys))
    whole = ObservationKeys(state=(StateSource("two"), StateSource("one", 0, 1)))
    check(read({**OBSERVATION, "one": [3.0], "two": [1.5, -2.0]}, whole))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"top": None}, "images.top: got keys ['top', 'wrist', 'state'], expected 'top' or 'pic"),
        ({"top": TOP[:20]}, "images.top: got shape (20, 32, 3), expected (24, 32, 3) or (12, 16"),
        ({"top": TOP[:, :, :1]}, "images.top: got shape (24, 32, 1), expected (24, 32, 3) or ("),
        ({"top": TOP / 255.0}, "images.top: got dtype float64, expected uint8 (24, 32, 3) or"),
        ({"top": TOP.tolist()}, "images.top: got list, expected a uint8 array (24, 32, 3) or"),
        ({"top": {"a": 1}}, "images.top: got dict, expected a uint8 array (24, 32, 3) or"),
        ({"state": None}, "state: got keys ['top', 'wrist', 'state'], expected 'state' or 'joint"),
        ({"state": STATE[:2]}, "state: got 2 numbers (state 2), expected 3"),
        ({"state": []}, "state (state): got 0 numbers, expected at least 1"),
        ({"state": "1.5"}, "state (state): got '1.5', expected numbers"),
        ({"state": ["1", "2", "3"]}, "state (state): got ['1', '2', '3'], expected numbers"),
        ({"state": b"123"}, "state (state): got b'123', expected numbers"),
        ({"state": [[1.0], [2.0, 3.0]]}, "state (state): got [[1.0], [2.0, 3.0]], expected numb"),
        ({"state": STATE.astype(complex)}, "state (state): got array([ 1.5+0.j, -2. +0.j,  3. "),
        ({"state": [10**400, 1, 2]}, "state (state): got [1000000000000"),
        ({"state": {"a": 1}}, "state (state): got {'a': 1}, expected numbers"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ContractMismatch) as caught:
        read({**OBSERVATION, **change})
    assert str(caught.value).startswith(error)
    assert len(str(caught.value)) < 400


def test_a_number_beyond_float32_becomes_infinity_for_the_policy_to_refuse() -> None:
    assert np.isposinf(read({**OBSERVATION, "state": [1e300, 0.0, 0.0]}).state[0])


def test_a_slice_beyond_the_array_is_named() -> None:
    keys = ObservationKeys(state=(StateSource("arm", 2, 5),))
    with pytest.raises(ContractMismatch, match=r"state \(arm\): got 4 numbers, expected at least"):
        read({**OBSERVATION, "arm": [0.0] * 4}, keys)
    keys = ObservationKeys(state=(StateSource("arm", 4), StateSource("gripper", 0, 1)))
    with pytest.raises(
        ContractMismatch, match=r"state \(arm\): got 4 numbers, expected at least 5"
    ):
        read({**OBSERVATION, "arm": [0.0] * 4, "gripper": 0.0}, keys)
    with pytest.raises(
        ContractMismatch, match=r"state: got 2 numbers \(arm 1, gripper 1\), expected 3"
    ):
        read({**OBSERVATION, "arm": [0.0] * 5, "gripper": 0.0}, keys)


def test_one_part_of_the_state_may_have_the_size_that_the_others_leave() -> None:
    keys = ObservationKeys(state=(StateSource("arm", 1), StateSource("gripper", 0, 1)))
    check(read({**OBSERVATION, "arm": [0.0, 1.5, -2.0], "gripper": [3.0, 9.0]}, keys))
    with pytest.raises(ContractMismatch, match=r"got 4 numbers \(arm 3, gripper 1\), expected 3"):
        read({**OBSERVATION, "arm": [0.0, 1.5, -2.0, 0.0], "gripper": 3.0}, keys)


def test_a_protocol_may_fix_the_size_of_each_part() -> None:
    keys = ObservationKeys(state=tuple(map(StateSource, "abc")))
    made = ObservationMap(TWO, keys, image_keys=lambda name: (name,), state_keys=(), part_size=1)
    numbers = {"a": 1.5, "b": -2.0, "c": [3.0]}
    check(made.read({**OBSERVATION, **numbers}))
    with pytest.raises(ContractMismatch, match=r"state \(b\): got 2 numbers, expected 1"):
        made.read({**OBSERVATION, **numbers, "b": [1.0, 2.0]})
    with pytest.raises(InvalidConfig, match="got 2 dimensions of known size of the policy's 3"):
        ObservationMap(
            TWO,
            ObservationKeys(state=keys.state[:2]),
            image_keys=lambda name: (name,),
            state_keys=(),
            part_size=1,
        )


def test_many_keys_are_not_all_shown() -> None:
    with pytest.raises(ContractMismatch) as caught:
        read({f"key {i}": 0 for i in range(10_000)})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"cameras": {"side": {"key": "x"}}}, "cameras: got 'side', expected cameras of the poli"),
        ({"state": [{"key": "x", "stop": 2}]}, "state: got 2 dimensions of known si"),
        (
            {"state": [{"key": "x"}, {"key": "y", "stop": 3}]},
            "state: got 3 dimensions of known size"
            " of the policy's 3, expected fewer, beside 'x' without stop",
        ),
        (
            {"state": [{"key": "x"}, {"key": "y", "start": 3}]},
            "state: got 2 parts without stop, ["
            "'x', 'y'], expected at most one: their sizes could not be told apart",
        ),
    ],
)
def test_keys_that_do_not_fit_the_policy_are_refused(keys: dict[str, Any], error: str) -> None:
    parsed = parse_config(ObservationKeys, keys, source="keys")
    with pytest.raises(InvalidConfig) as caught:
        read(OBSERVATION, parsed)
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"camera": {}}, "keys: camera: unknown key, expected one of ['cameras', 'state']"),
        ({"cameras": {"top": "x"}}, "keys: cameras.top: got 'x' (str), expected a mapping of"),
        ({"cameras": {"top": {}}}, "keys: cameras.top.key: missing"),
        (
            {"cameras": {"top": {"key": "x", "layout": "whc"}}},
            "keys: cameras.top.layout: got 'whc', expected one of",
        ),
        ({"state": [{"key": "x", "start": -1}]}, "keys: state[0].start: got -1, expected 0 to"),
        (
            {"state": [{"key": "x", "start": 3, "stop": 3}]},
            "keys: state[0]: stop: got 3, expected more than start 3",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_named(keys: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_config(ObservationKeys, keys, source="keys")
    assert str(caught.value).startswith(error)


@pytest.mark.parametrize("path", sorted((INSTALLED_CONFIGS / "gateway").glob("*.yaml")))
def test_the_examples_can_be_read(path: Any) -> None:
    keys = load_config(ObservationKeys, path.stem, kind="gateway")
    assert keys.cameras or keys.state


def test_a_value_is_found_by_one_key_or_by_a_path() -> None:
    nested = {"a": {"b/c": 1, "d": {"e": 2}}, "a/f": 3, "g": 4}
    found = [find_value(nested, key) for key in ("a/b/c", "a/d/e", "a/f", "g", "g/h", "x", "a/x")]
    assert found == [1, 2, 3, 4, None, None, None]
