"""The YAML loader: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.yaml_config import InvalidConfig, as_plain, find_config, load_config, parse_config


@dataclass(frozen=True)
class Camera:
    name: str
    hw: tuple[int, int] = (480, 640)


@dataclass(frozen=True)
class Example:
    task: str
    fps: float = 50.0
    limit: int | None = None
    shadows: bool = True
    mode: Literal["fast", "slow"] = "fast"
    cameras: tuple[Camera, ...] = ()
    camera_map: Mapping[str, str] = field(default_factory=dict)
    camera: Camera = Camera("top")

    def __post_init__(self) -> None:
        if self.fps <= 0:
            raise ValueError(f"fps: got {self.fps}, expected a positive number")


def parse(raw: object, **overrides: str) -> Example:
    dotted = {key.replace("__", "."): text for key, text in overrides.items()}
    return parse_config(Example, raw, source="x.yaml", overrides=dotted)


def test_nested_values_become_dataclasses_and_tuples(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text(
        "task: cube\nfps: 3e1\nlimit: null\ncameras:\n"
        "  - {name: top, hw: [240, 320]}\n  - name: angle\ncamera_map: {primary: top}\n"
    )
    config = load_config(Example, str(path), kind="env")
    assert config == Example(
        "cube",
        fps=30.0,
        cameras=(Camera("top", (240, 320)), Camera("angle")),
        camera_map={"primary": "top"},
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"task": "a", "fsp": 1}, r"x.yaml: fsp: unknown key, expected one of .*mean 'fps'"),
        ({"task": "a", "cameras": [{"name": "t", "w": 1}]}, r"x.yaml: cameras\[0\].w: unknown key"),
        ({"task": 3}, r"x.yaml: task: got 3 \(int\), expected str"),
        ({"task": "a", "limit": "x"}, r"x.yaml: limit: got 'x' \(str\), expected int"),
        ({"task": "a", "limit": True}, r"limit: got True \(bool\), expected int"),
        ({"task": "a", "fps": "nan"}, r"fps: got 'nan' \(str\), expected float"),
        ({"task": "a", "fps": True}, r"fps: got True \(bool\), expected float"),
        ({"task": "a", "shadows": 0}, r"shadows: got 0 \(int\), expected bool"),
        ({"task": "a", "mode": "medium"}, r"mode: got 'medium' .*one of \['fast', 'slow'\]"),
        ({"task": "a", "camera": {"name": "t", "hw": [1]}}, r"camera.hw: got .* a list of 2"),
        ({"task": "a", "camera": "top"}, r"camera: got 'top' .* a mapping"),
        ({"task": "a", "camera_map": {1: "top"}}, r"camera_map.1: got the key 1 \(int\)"),
        ({"fps": 1}, r"x.yaml: task: missing"),
        ({"task": "a", "fps": -1}, r"x.yaml: fps: got -1.0, expected a positive"),
        ([1], r"x.yaml: got \[1\] \(list\), expected a mapping"),
    ],
)
def test_refusals_name_file_key_got_and_expected(raw: object, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        parse(raw)


def test_overrides_win_and_are_read_as_the_key_wants() -> None:
    raw = {"task": "a", "camera_map": {"primary": "top"}}
    config = parse(
        raw, task="7", limit="7", camera__name="no", camera_map__wrist="left", shadows="false"
    )
    assert (config.task, config.limit, config.camera.name) == ("7", 7, "no")
    assert config.camera_map == {"primary": "top", "wrist": "left"}
    assert config.shadows is False
    assert raw == {"task": "a", "camera_map": {"primary": "top"}}


def test_an_override_can_replace_a_whole_list_or_mapping() -> None:
    config = parse({"task": "a"}, cameras="[{name: a}, {name: b}]", camera_map="{x: y}")
    assert [camera.name for camera in config.cameras] == ["a", "b"]
    assert config.camera_map == {"x": "y"}


@dataclass(frozen=True)
class Free:
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def test_overrides_go_down_where_anything_is_allowed() -> None:
    raw = {"kwargs": {"a": {"kept": [1], 2: "x"}}}
    overrides = {"kwargs.a.b": "3", "kwargs.c.d.e": "[x, 4]", "kwargs.a.f": "text"}
    config = parse_config(Free, raw, source="x.yaml", overrides=overrides)
    assert config.kwargs == {
        "a": {"kept": [1], 2: "x", "b": 3, "f": "text"},
        "c": {"d": {"e": ["x", 4]}},
    }
    assert raw == {"kwargs": {"a": {"kept": [1], 2: "x"}}}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"kwargs.a.b": "["}, r"x\.yaml: kwargs\.a\.b: while parsing"),
        ({"kwargs.a": "[", "kwargs.a.b": "3"}, r"x\.yaml: kwargs\.a.*: while parsing"),
    ],
)
def test_an_override_that_is_no_yaml_is_named(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        parse_config(Free, {}, source="x.yaml", overrides=overrides)


def test_an_unknown_override_is_refused_by_its_path() -> None:
    with pytest.raises(InvalidConfig, match=r"camera\.nmae: unknown key"):
        parse({"task": "a"}, camera__nmae="x")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("task: a\ntask: b\n")
    with pytest.raises(InvalidConfig, match=r"e.yaml: key 'task' is given twice"):
        load_config(Example, str(path), kind="env")


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("task: [")
    with pytest.raises(InvalidConfig, match=r"e\.yaml: while parsing"):
        load_config(Example, str(path), kind="env")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: [1,\n  b: {", r"while parsing .*\(line 2, column 7\)"),
        (bytes(range(256)), "codec can't decode byte"),
        (b"task: \xe9", "codec can't decode byte"),
        (b"task: x\0", "unacceptable character"),
        (b"[" * 3000, "too many levels of nesting"),
        (b"task: 2020-13-45", "month must be in"),
        (b"task: " + b"9" * 5000, "limit"),
        (b"? [a]\n: 1", r"unhashable key \(line 1, column 3\)"),
        (b"task: *nobody", r"undefined alias .nobody. \(line 1, column 7\)"),
    ],
)
def test_what_is_no_yaml_is_one_line_that_names_the_file(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidConfig, match=message) as raised:
        load_config(Example, str(path), kind="env")
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-this-name/x.yaml"])
def test_a_name_that_can_be_no_file_is_refused(name: str) -> None:
    with pytest.raises(InvalidConfig, match="env configuration"):
        load_config(Example, name, kind="env")


def test_no_object_is_built_from_yaml_tags(tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_text("task: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(InvalidConfig, match="could not determine a constructor"):
        load_config(Example, str(path), kind="env")


def test_lookup_is_path_then_working_folder_then_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "installed"
    local = tmp_path / "here" / "configs" / "env"
    for folder in (installed / "env", local):
        folder.mkdir(parents=True)
    monkeypatch.setattr("policies.yaml_config.INSTALLED_CONFIGS", installed)
    monkeypatch.chdir(tmp_path / "here")
    (installed / "env" / "a.yaml").write_text("task: installed")
    assert find_config("a", kind="env") == installed / "env" / "a.yaml"
    (local / "a.yaml").write_text("task: local")
    assert load_config(Example, "a", kind="env").task == "local"
    (tmp_path / "here" / "a").write_text("task: path")
    assert load_config(Example, "a", kind="env").task == "path"
    with pytest.raises(InvalidConfig, match=r"env configuration 'b'.*\['a'\]"):
        find_config("b", kind="env")


def test_a_name_cannot_climb_out_of_the_folders(tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text("task: a")
    with pytest.raises(InvalidConfig, match="neither a file nor a name"):
        find_config("../../../../tmp/nothing", kind="env")


@given(
    st.builds(
        Example,
        task=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
        fps=st.floats(1e-3, 1e9),
        limit=st.none() | st.integers(-(10**9), 10**9),
        shadows=st.booleans(),
        mode=st.sampled_from(["fast", "slow"]),
        cameras=st.lists(st.builds(Camera, st.sampled_from(["a", "no", "1"]))).map(tuple),
        camera_map=st.dictionaries(st.sampled_from(["a", "1", "null"]), st.just("top")),
    )
)
def test_a_configuration_is_read_back_from_its_json_as_it_was(config: Example) -> None:
    assert parse(json.loads(json.dumps(as_plain(config)))) == config
