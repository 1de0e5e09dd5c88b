"""What a checkpoint says of its execution, and what it leaves to be assumed, reach the contract."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_policies_checkpoints import saved, write_original
from tiny_act import CAMERAS

from policies.checkpoint.extras import ExecutionKeys, Extras
from policies.checkpoint.load import load_policy, load_weights
from policies.checkpoint.save import save_ilstudio, save_lerobot
from policies.errors import CheckpointError, ContractMismatch
from policies.execution import COEFFICIENTS, ILSTUDIO_NAMES, STRATEGIES, Assumption, Execution
from policies.types import DEFAULT_DT_S, PolicyContract

ROOT = Path(__file__).resolve().parents[2]
RATE = Assumption("rate", "50 Hz", "--fps")
SAID: dict[str, Any] = {"cameras": CAMERAS, "dt_s": 0.1}


def edited(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def lerobot(folder: Path, **changes: Any) -> Path:
    """LeRobot's layout as LeRobot writes it: nothing of ours beside it."""
    save_lerobot(folder, saved())
    (folder / "metronome.yaml").unlink()
    return edited(folder, "config.json", **changes)


def contract(**changes: Any) -> PolicyContract:
    given = {"cameras": (), "state_dim": 2, "action_dim": 2, "chunk_size": 5, "n_action_steps": 5}
    return PolicyContract("toy", **{**given, **changes})


# --- what a layout says ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "execution", "steps"),
    [
        ({}, Execution("sequential", None, 5), 5),
        ({"n_action_steps": 3}, Execution("sequential", None, 3), 3),
        (
            {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1},
            Execution("temporal_ensemble", 0.01, 1),
            5,
        ),
        (
            {"temporal_ensemble_coeff": -1, "n_action_steps": 1},
            Execution("temporal_ensemble", -1.0, 1),
            5,
        ),
        (
            {"temporal_ensemble_coeff": 0, "n_action_steps": 1},
            Execution("temporal_ensemble", 0.0, 1),
            5,
        ),
    ],
)
def test_lerobots_execution_is_carried(
    tmp_path: Path, changes: dict[str, Any], execution: Execution, steps: int
) -> None:
    found = load_weights(str(lerobot(tmp_path, **changes))).contract()
    assert found.execution == execution
    assert found.execution is not None
    key = "temporal_ensemble_coeff" if "temporal_ensemble_coeff" in changes else "n_action_steps"
    assert found.execution.source == f"config.json: {key}"
    assert found.n_action_steps == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"temporal_ensemble_coeff": 0.01, "n_action_steps": 3},
            "n_action_steps: got 3, expected 1 with temporal_ensemble_coeff",
        ),
        (
            {"temporal_ensemble_coeff": "0.01", "n_action_steps": 1},
            "temporal_ensemble_coeff: got '0.01', expected int or float",
        ),
        (
            {"temporal_ensemble_coeff": math.nan, "n_action_steps": 1},
            "temporal_ensemble_coeff: manager_coef: got nan, expected -1000000 to 1000000",
        ),
        ({"n_action_steps": 0}, "n_action_steps: got 0, expected 1 to chunk_size = 5"),
        ({"n_action_steps": 6}, "n_action_steps: got 6, expected 1 to chunk_size = 5"),
    ],
)
def test_an_execution_of_lerobots_that_cannot_be(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_weights(str(lerobot(tmp_path, **changes)))
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("write", [save_ilstudio, save_lerobot])
def test_our_file_beside_a_checkpoint_wins(tmp_path: Path, write: Callable[..., None]) -> None:
    keys = ExecutionKeys("temporal_ensemble", 0.05)
    write(tmp_path, saved(extras=Extras(**SAID, execution=keys)))
    written = yaml.safe_load((tmp_path / "metronome.yaml").read_text())["execution"]
    keys_written = {"action_manager", "manager_coef", "n_action_steps", "max_latency_ms"}
    assert written.keys() == keys_written
    found = load_weights(str(tmp_path)).contract()
    assert found.execution == Execution("temporal_ensemble", 0.05)
    assert found.execution is not None
    assert found.execution.source == "metronome.yaml: execution"
    if write is save_lerobot:  # and LeRobot itself plays it so
        raw = json.loads((tmp_path / "config.json").read_text())
        assert (raw["temporal_ensemble_coeff"], raw["n_action_steps"]) == (0.05, 1)
        (tmp_path / "metronome.yaml").unlink()
        assert load_weights(str(tmp_path)).contract().execution == Execution(
            "temporal_ensemble", 0.05, 1
        )


def test_the_latency_of_a_recommendation_reaches_clients(tmp_path: Path) -> None:
    keys = ExecutionKeys("temporal_ensemble", 0.05, 5, 120)
    save_ilstudio(tmp_path, saved(extras=Extras(**SAID, execution=keys)))
    contract = load_weights(str(tmp_path)).contract()
    assert contract.execution is not None
    assert contract.execution.max_latency_ms == 120
    assert PolicyContract.from_json(contract.to_json()).execution == contract.execution
    text = contract.to_json().replace('"max_latency_ms": 120.0', '"max_latency_ms": "far"')
    with pytest.raises(ContractMismatch, match=r"execution\.max_latency_ms: 'far'"):
        PolicyContract.from_json(text)


def test_older_clients_read_a_recommendation_without_a_latency(tmp_path: Path) -> None:
    keys = ExecutionKeys("temporal_ensemble", 0.05)
    save_ilstudio(tmp_path, saved(extras=Extras(**SAID, execution=keys)))
    sent = json.loads(load_weights(str(tmp_path)).contract().to_json())["execution"]
    assert sent.keys() == {"action_manager", "manager_coef", "n_action_steps", "source"}


def test_our_older_key_means_one_chunk_after_another(tmp_path: Path) -> None:
    save_ilstudio(tmp_path, saved(extras=Extras(**SAID, n_action_steps=2)))
    found = load_weights(str(tmp_path)).contract()
    assert found.execution == Execution("sequential", None, 2)
    assert found.n_action_steps == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("execution: {action_manager: temporal_esemble}", "action_manager: got 'temporal_esemble'"),
        ("execution: {manager_coef: 0.1}", "execution.action_manager: missing"),
        (
            "execution: {action_manager: sequential, manager_coef: 0.1}",
            "execution: manager_coef: got 0.1, expected none: sequential has no use for it",
        ),
        (
            "execution: {action_manager: overlap, manager_coef: 1.5}",
            "execution: manager_coef: got 1.5, expected 0 to 1 for overlap",
        ),
        (
            "execution: {action_manager: latest, n_action_steps: 0}",
            "execution.n_action_steps: got 0, expected 1 to 1000000",
        ),
        (
            "execution: {action_manager: latest, max_latency_ms: -1}",
            "execution.max_latency_ms: got -1.0, expected 0 to 60000",
        ),
        ("execution: {action_manager: latest, source: me}", "execution.source: unknown key"),
        ("dt_s: 0", "dt_s: got 0.0, expected 0.0001 to 100"),
        ("n_action_steps: 0", "n_action_steps: got 0, expected 1 to 1000000"),
    ],
)
def test_our_file_is_refused_by_key(tmp_path: Path, line: str, message: str) -> None:
    save_ilstudio(tmp_path, saved())
    (tmp_path / "metronome.yaml").write_text(line)
    with pytest.raises(CheckpointError) as caught:
        load_weights(str(tmp_path))
    assert message in str(caught.value)
    assert "metronome.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["n_action_steps: 6", "execution: {action_manager: latest, n_action_steps: 6}"]
)
def test_more_steps_than_a_chunk_has_are_refused_and_not_cut(tmp_path: Path, key: str) -> None:
    save_lerobot(tmp_path, saved())
    (tmp_path / "metronome.yaml").write_text(key)
    with pytest.raises(ContractMismatch, match=r"n_action_steps: got 6, expected 1 to chunk_size"):
        load_weights(str(tmp_path)).contract()
    # A chunk that the user cuts is played to its end.
    (tmp_path / "metronome.yaml").write_text(key.replace("6", "5"))
    cut = load_weights(str(tmp_path)).contract(2)
    assert cut.execution is not None
    assert cut.execution.n_action_steps == 2


# --- what is assumed -------------------------------------------------------------------------


def test_each_layout_says_what_it_assumes(tmp_path: Path) -> None:
    assert load_weights(str(lerobot(tmp_path / "l"))).contract().assumed == (RATE,)

    save_ilstudio(tmp_path / "i", saved())
    (tmp_path / "i" / "metronome.yaml").unlink()
    size = Assumption("picture size", "480x640", "--image_hw")
    assert load_weights(str(tmp_path / "i")).contract().assumed == (RATE, size)
    assert load_weights(str(tmp_path / "i"), image_hw=(32, 64)).contract().assumed == (RATE,)

    write_original(tmp_path / "o", saved())
    names = {"camera_names": ("top", "wrist"), "n_heads": 2}
    assert load_weights(str(tmp_path / "o"), **names).contract().assumed == (RATE, size)

    for folder, keys in (("l", "dt_s: 0.02"), ("i", "{dt_s: 0.02, image_hw: [32, 64]}")):
        (tmp_path / folder / "metronome.yaml").write_text(keys)
        assert load_weights(str(tmp_path / folder)).contract().assumed == ()


def test_the_first_of_several_normalizers_is_assumed(tmp_path: Path) -> None:
    save_ilstudio(tmp_path, saved(extras=Extras(**SAID)))
    raw = json.loads((tmp_path / "normalize.json").read_text())
    raw["datasets"].append({**raw["datasets"][0], "dataset_id": "e"})
    kinds = {"d": "zscore", "e": "zscore"}
    edited(tmp_path, "normalize.json", datasets=raw["datasets"], state=kinds, action=kinds)
    (first,) = load_weights(str(tmp_path)).contract().assumed
    assert str(first) == (
        "normalizer of 'd', the first of ['d', 'e']: the checkpoint does not say it; "
        "--dataset_id does"
    )
    assert load_weights(str(tmp_path), dataset_id="d").contract().assumed == ()


@pytest.mark.usefixtures("full_width")
@pytest.mark.parametrize("name", ["insertion", "transfer_cube"])
def test_the_shipped_checkpoints_assume_nothing(name: str) -> None:
    folder = ROOT / f"ckpt/act_sim_{name}_scripted_zscore_example"
    said = load_weights(str(folder)).contract()
    assert (said.assumed, said.dt_s) == ((), 0.02)


def test_a_rate_that_is_given_is_not_assumed(tmp_path: Path) -> None:
    folder = str(lerobot(tmp_path))
    given = load_policy(folder, device="cpu", precision="fp32", threads=1, fps=30.0).contract
    assert (given.dt_s, given.assumed) == (1 / 30, ())


@pytest.mark.parametrize(("option", "value"), [("fps", 30.0), ("device", "cpu"), ("threads", 2)])
def test_a_factory_takes_no_options(option: str, value: object) -> None:
    name = "python:tests.runtime.toy_policy:make"
    with pytest.raises(CheckpointError, match=rf"{option}: got .*, expected none: a factory"):
        load_policy(name, **{option: value})  # type: ignore[arg-type]
    assert load_policy(name).contract.assumed == ()


def test_a_contract_without_a_rate_says_so() -> None:
    unsaid = contract()
    assert (unsaid.dt_s, unsaid.assumed, unsaid.assumes_rate) == (DEFAULT_DT_S, (RATE,), True)
    said = contract(dt_s=DEFAULT_DT_S)
    assert (said.assumed, said.assumes_rate) == ((), False)
    assert said == unsaid  # the same policy
    said.require(unsaid)
    assert unsaid.at_rate(None) is unsaid
    faster = unsaid.at_rate(25.0)
    assert (faster.dt_s, faster.assumed) == (0.04, ())
    for bad in (0.0, -1.0, math.nan, math.inf, 1e-9):
        with pytest.raises(ContractMismatch, match="dt_s: got"):
            contract(dt_s=bad)


# --- across a process boundary ---------------------------------------------------------------


def test_both_survive_json() -> None:
    size = Assumption("picture size", "480x640", "--image_hw")
    whole = contract(
        execution=Execution("temporal_ensemble", 0.01, 1, "config.json"), assumed=(size,)
    )
    again = PolicyContract.from_json(whole.to_json())
    assert (again, again.assumed) == (whole, (RATE, size))
    assert again.execution is not None
    assert again.execution.source == "config.json"


def test_older_programs_and_newer_ones_understand_each_other() -> None:
    plain = contract(dt_s=0.02)
    wire = json.loads(plain.to_json())
    # Which the first clients do not know.
    assert not {"execution", "assumed", "n_obs_steps"} & wire.keys()
    assert PolicyContract.from_json(json.dumps(wire)) == plain
    two = contract(n_obs_steps=2)
    assert json.loads(two.to_json())["n_obs_steps"] == 2
    assert PolicyContract.from_json(two.to_json()) == two != plain


@pytest.mark.parametrize(
    "change",
    [
        {"execution": {"action_manager": "fastest"}},
        {"execution": {"action_manager": "latest", "manager_coef": 1, "n_action_steps": None,
                       "source": ""}},
        {"execution": {"action_manager": "latest", "manager_coef": None, "n_action_steps": 6,
                       "source": ""}},
        {"execution": {"action_manager": "latest", "manager_coef": None, "n_action_steps": True,
                       "source": ""}},
        {"execution": {"action_manager": "latest", "manager_coef": None, "n_action_steps": 1,
                       "source": 5}},
        {"execution": []},
        {"assumed": [{"what": 1, "value": "", "flag": ""}]},
        {"assumed": [{}]},
        {"assumed": 3},
        {"n_obs_steps": 0},
        {"n_obs_steps": 17},
        {"n_obs_steps": True},
        {"n_obs_steps": "2"},
    ],
)  # fmt: skip
def test_nonsense_is_refused(change: dict[str, Any]) -> None:
    wire = {**json.loads(contract().to_json()), **change}
    with pytest.raises(ContractMismatch):
        PolicyContract.from_json(json.dumps(wire))


def test_every_strategy_says_what_its_coefficient_may_be() -> None:
    assert COEFFICIENTS.keys() == set(STRATEGIES + ILSTUDIO_NAMES)
