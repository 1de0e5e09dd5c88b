"""The contract's file: what is refused before anybody is connected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from policies.errors import PolicyError
from policies.yaml_config import load_config
from runtime.errors import ModelNameError
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.model_name import LocalModel, UpstreamModel, read_model_name
from runtime.options.upstream import UpstreamOptions, check_upstream
from runtime.upstream.contract import UpstreamContract
from tests.upstream.toy_upstream import GROOT_TOY, TOY, load

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "configs" / "upstream").glob("*.yaml"))
MODEL = UpstreamModel("openpi", "127.0.0.1", 8000)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_shipped_examples_are_contracts(path: Path) -> None:
    given = load_config(UpstreamContract, str(path), kind="upstream")
    contract = given.policy_contract(path.stem.partition("_")[0])
    assert not contract.assumes_rate
    assert contract.policy_type in ("openpi", "groot")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stat_dim": 3}, "unknown key"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"n_action_steps": 11}, "n_action_steps: got 11, expected 1 to chunk_size = 10"),
        ({"state": []}, "state: got parts of 0 numbers and 0 without stop, expected 14"),
        ({"state": [{"key": "a", "stop": 13}]}, "state: got parts of 13 numbers"),
        ({"state": [{"key": "a", "stop": 14}, {"key": "b"}]}, "1 without stop, expected 14"),
        ({"state": [{"key": "a"}, {"key": "b"}]}, "2 without stop, expected 14 together"),
        (
            {"state": [{"key": "a", "stop": 8}, {"key": "a", "start": 7, "stop": 13}]},
            r"got the slices 0:8 and 7:13 of 'a', expected none that overlap",
        ),
        (
            {"state": [{"key": "a", "start": 1, "stop": 15}]},
            "got 14 of the 15 numbers of 'a', expected all",
        ),
        ({"actions": [{"key": "actions", "stop": 13}]}, "actions: got parts of 13 numbers"),
        ({"prompt": "state"}, "got 'state' and 'state', expected different ones"),
        ({"prompt": "images"}, "got 'images' and 'images/cam_high', expected different ones"),
        ({"cameras": {"top": {"key": "a", "size": [0, 9]}}}, "size"),
        ({"cameras": {"top": {"key": "a", "size": [9, 9], "layout": "auto"}}}, "layout"),
        ({"cameras": {"top": {"key": "a", "size": [9, 9], "source_hw": [18, 18]}}}, "resize"),
        (
            {"cameras": {name: {"key": "same", "size": [9, 9]} for name in ("a", "b")}},
            "expected different ones",
        ),
    ],
)
def test_a_contract_that_contradicts_itself(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolicyError, match=f"^--upstream_contract: .*{message}"):
        load("openpi", 1, tmp_path, TOY, **changes)


def test_groots_pictures_have_one_layout(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"cameras\.top\.layout: got 'chw', expected 'hwc'"):
        load("groot", 1, tmp_path, GROOT_TOY, cameras=TOY["cameras"])


def test_the_address_is_read() -> None:
    assert read_model_name("openpi://localhost:8000") == UpstreamModel("openpi", "localhost", 8000)
    assert read_model_name("groot://[::1]:5555/").name == "groot://[::1]:5555"
    for text in ("openpi://localhost", "groot://:5", "gr00t://localhost:5"):
        with pytest.raises(ModelNameError, match="groot://HOST:PORT"):
            read_model_name(text)


@pytest.mark.parametrize(
    ("model", "upstream", "checkpoint", "message"),
    [
        (MODEL, UpstreamOptions(), CheckpointOptions(), "--upstream_contract: got none"),
        (MODEL, UpstreamOptions("a"), CheckpointOptions(fps=5), "--fps: got with -m openpi://"),
        (LocalModel("x"), UpstreamOptions("a"), CheckpointOptions(), "with -m x, expected none"),
    ],
)
def test_options_of_another_kind_of_model(
    model: Any, upstream: UpstreamOptions, checkpoint: CheckpointOptions, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_upstream(model, upstream, checkpoint)
