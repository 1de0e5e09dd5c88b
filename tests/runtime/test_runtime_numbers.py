"""Every number that a person can give, on any command line and in any YAML, has a checked range.

New flags and keys are found by themselves: one without a range fails here.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml

from envs import demonstrations
from envs.config import EnvConfig, TaskConfig
from policies.checkpoint.extras import Extras
from policies.command_line import CommandLine, Number
from policies.number_ranges import Range
from policies.training.trainer import TrainConfig
from policies.types import CameraContract
from policies.yaml_config import InvalidConfig, parse_config
from robots.agilex_config import AgilexConfig
from robots.dummy import DummyConfig
from robots.factory import RobotFile
from robots.lerobot_robot import LeRobotConfig
from robots.ros2_config import Ros2Config
from robots.twin_config import TwinConfig
from runtime.eval_real import cli as eval_real
from runtime.eval_real import replay
from runtime.eval_real.run_config import RunConfig
from runtime.eval_sim import cli as eval_sim
from runtime.gateway import cli as gateway
from runtime.options.connection import absolute_path
from runtime.options.observation_keys import ObservationKeys, StateSource
from runtime.server import cli as serve
from runtime.server.config import ServerConfig
from runtime.server.gateway_options import GatewayOptions, read_gateway
from runtime.tools import compare, ctl, keys, latency, top, train
from runtime.trace import merge
from runtime.upstream.contract import UpstreamContract

ROOT = Path(__file__).resolve().parents[2]
COMMANDS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "runtime/eval_real/cli.py": eval_real.parser,
    "runtime/eval_sim/cli.py": eval_sim.parser,
    "runtime/server/cli.py": serve.parser,
    "runtime/gateway/cli.py": gateway.parser,
    "runtime/tools/train.py": train.parser,
    "runtime/tools/compare.py": compare.parser,
    "runtime/tools/latency.py": latency.parser,
    "runtime/tools/ctl.py": ctl.parser,
    "runtime/tools/top.py": top.parser,
    "runtime/tools/keys.py": keys.parser,
    "runtime/eval_real/replay.py": replay.parser,
    "runtime/trace/merge.py": merge.parser,
    "envs/demonstrations.py": demonstrations.parser,
}
NOT_FOR_PEOPLE = {
    "runtime/datasets/recorder_process.py",
    "runtime/eval_real/worker_process.py",
    "runtime/live_view/logger_process.py",
    "robots/twin_owner_process.py",
    "robots/twin_render_process.py",
    "robots/lerobot_owner_process.py",
    "robots/ros2_owner_process.py",
    "robots/twin_ros2_node.py",
}
"""Started by our own processes, which write their flags."""
NO_NUMBERS = {"robots/twin_ros_node.py"}


def test_every_command_is_known_here() -> None:
    makers = {
        str(path.relative_to(ROOT))
        for package in ("runtime", "envs", "robots", "policies", "transport")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"\b(ArgumentParser|CommandLine)\($", path.read_text(), re.MULTILINE)
        or re.search(r"= (argparse\.ArgumentParser|CommandLine)\(", path.read_text())
    }
    assert makers == COMMANDS.keys() | NOT_FOR_PEOPLE | NO_NUMBERS
    for name in NO_NUMBERS:
        assert "type=int" not in (ROOT / name).read_text()


def test_the_benchmarks_numbers_have_ranges() -> None:
    """They need packages that tests do not: their text says enough."""
    for path in (ROOT / "bench").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"type=(int|float)\b", text), path


Flag = tuple[argparse.ArgumentParser, argparse.Action]


def flags(cli: argparse.ArgumentParser) -> Iterator[Flag]:
    for action in cli._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from flags(command)
        else:
            yield cli, action


EVERY_FLAG = [
    pytest.param(cli, action, id=f"{Path(name).stem}-{action.dest}")
    for name, make in COMMANDS.items()
    for cli, action in flags(make())
]
NUMBERS = [flag for flag in EVERY_FLAG if isinstance(flag.values[1].type, Number)]


@pytest.mark.parametrize(("cli", "action"), EVERY_FLAG)
def test_every_flag_with_a_number_has_a_range(
    cli: argparse.ArgumentParser, action: argparse.Action
) -> None:
    assert isinstance(cli, CommandLine)  # whose errors are one line
    texts = (None, str, Path, absolute_path, read_gateway)
    assert action.type in texts or isinstance(action.type, Number), action.dest
    if not isinstance(action.type, Number):
        # A number's default without a number's type would be a number as text.
        assert not isinstance(action.default, int | float) or isinstance(action.default, bool)
    elif action.default not in (None, argparse.SUPPRESS):
        assert action.default in action.type.range


def bad_numbers(kind: type, bounds: Range) -> Iterator[str]:
    """As text, for flags and YAML alike."""
    for value in (math.nan, math.inf, -math.inf, 0, bounds.low - 1, 2 * bounds.high + 1, -3):
        if value not in bounds and not (kind is int and not math.isfinite(value)):
            yield str(kind(value))
    yield from ("nan", "inf", "abc", "1 2", "1e999")[2 if math.inf in bounds.also else 0 : 4]
    if bounds.above:
        yield str(kind(bounds.low))
    if kind is int:
        yield "1.5"


@pytest.mark.parametrize(("cli", "action"), NUMBERS)
def test_a_flags_number_out_of_range_is_one_line(
    capsys: pytest.CaptureFixture[str], cli: argparse.ArgumentParser, action: argparse.Action
) -> None:
    number = action.type
    assert isinstance(number, Number)
    for text in bad_numbers(number.kind, number.range):
        for name in action.option_strings:
            # A value that begins with a dash is given after an equals sign.
            argv = [f"{name}={text}"] if action.nargs in (None, "?") else [name, *[text] * 2]
            if name.startswith("--") or not text.startswith("-"):
                if not name.startswith("--"):
                    argv = [name, text]
                with pytest.raises(SystemExit) as left:
                    cli.parse_known_args(argv)
                said = capsys.readouterr().err
                assert left.value.code == 2
                assert re.fullmatch(r"error: [^\n]*\n", said), said
                assert name in said
                assert "expected" in said
    good = number.range.high
    assert number(str(number.kind(good))) == good


def test_the_same_for_the_command_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for main, argv in (
        (eval_real.main, ["-c", "dummy", "--fps", "0"]),
        (eval_sim.main, ["-e", "fake", "--fps", "0"]),
        (serve.main, ["--fps", "0"]),
        (demonstrations.main, ["--task", "sim_insertion", "--out", "x", "--num", "0"]),
    ):
        with pytest.raises(SystemExit) as left:
            main(argv)
        assert left.value.code == 2
        assert re.fullmatch(r"error: --(fps|num): got 0, expected .*\n", capsys.readouterr().err)


# The same for YAML


def shipped(path: str) -> dict[str, Any]:
    raw = yaml.safe_load((ROOT / "configs" / path).read_text())
    return raw.get("args", raw)  # type: ignore[no-any-return]


CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "env": (EnvConfig, shipped("env/aloha.yaml")),
    "task": (TaskConfig, shipped("task/fake.yaml")),
    "train": (TrainConfig, shipped("train/act_sim_insertion.yaml")),
    "server": (ServerConfig, shipped("server/default.yaml")),
    "robot": (RobotFile, yaml.safe_load((ROOT / "configs/robot/dummy.yaml").read_text())),
    "dummy": (DummyConfig, shipped("robot/dummy.yaml")),
    "sim_twin": (TwinConfig, shipped("robot/sim_twin.yaml")),
    "agilex": (AgilexConfig, shipped("robot/agilex_aloha.yaml")),
    "ros2": (Ros2Config, shipped("robot/aloha_ros2.yaml")),
    "gateway": (ObservationKeys, {"cameras": {"top": {"key": "image"}}}),
    "upstream": (UpstreamContract, shipped("upstream/openpi_aloha.yaml")),
    "metronome": (Extras, {"execution": {"action_manager": "temporal_ensemble"}}),
}
"""What is read from YAML, and a whole example of it."""
NAMES = {
    "sim_twin": "top",
    "agilex": "primary",
    "ros2": "cam_high",
    "dummy": "top",
    "gateway": "top",
    "upstream": "top",
}
"""A key that the example has in its mappings."""
ELSEWHERE = {LeRobotConfig, RunConfig}


def test_every_configuration_is_known_here() -> None:
    read = {
        name
        for package in ("runtime", "envs", "robots", "policies")
        for path in (ROOT / package).rglob("*.py")
        for name in re.findall(r"(?:load|parse)_config\(\s*([A-Z]\w+),", path.read_text())
    }
    assert read == {cls.__name__ for cls, _ in CONFIGS.values()} | {
        cls.__name__ for cls in ELSEWHERE
    }


Wrap = Callable[[str], str]
ANY_NAME = "<name>"


def numbers(hint: Any, path: str, wrap: Wrap = str) -> Iterator[tuple[str, Wrap, Any]]:
    """(dotted path, what makes a YAML value of a number's text, the annotation) of every number."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and not {float, int} & {arguments[0], *typing.get_args(arguments[0])}:
        yield from numbers(arguments[0], path, wrap)
    elif hint in (int, float) or origin is Annotated:
        yield path, wrap, hint
    elif origin in (typing.Union, types.UnionType):
        for one in arguments:
            yield from numbers(one, path, wrap)
    elif origin is tuple and arguments:
        if arguments[0] in ITEMS:
            for inner, _, leaf in numbers(arguments[0], ""):
                yield path, _item_with(arguments[0], inner.removeprefix(".")), leaf
            return
        count = 2 if arguments[1:] == (Ellipsis,) else len(arguments)
        for one in (one for one in arguments if one is not Ellipsis):
            yield from numbers(one, path, lambda text: "[" + ", ".join([wrap(text)] * count) + "]")
    elif origin in (dict, collections.abc.Mapping):
        yield from numbers(arguments[1], f"{path}.{ANY_NAME}", wrap)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint, include_extras=True)
        for field in dataclasses.fields(hint):
            yield from numbers(hints[field.name], f"{path}.{field.name}", wrap)


ITEMS: dict[type, tuple[dict[str, str], dict[str, int]]] = {
    CameraContract: (
        {"name": "x", "source_hw": "[9, 9]", "model_hw": "[9, 9]"},
        {"source_hw": 2, "model_hw": 2, "crop": 4},
    ),
    GatewayOptions: ({"protocol": "openpi"}, {}),
    StateSource: ({"key": "x"}, {}),
}
"""What stands in lists: the keys that it needs, and how many numbers those have that are lists."""


def _item_with(item: type, key: str) -> Wrap:
    needed, counts = ITEMS[item]

    def wrap(text: str) -> str:
        value = "[" + ", ".join([text] * counts[key]) + "]" if key in counts else text
        return "[{" + ", ".join(f"{k}: {v}" for k, v in {**needed, key: value}.items()) + "}]"

    return wrap


EVERY_KEY = [
    pytest.param(
        name,
        path.removeprefix(".").replace(ANY_NAME, NAMES.get(name, ANY_NAME)),
        wrap,
        hint,
        id=f"{name}{path}",
    )
    for name, (cls, _) in CONFIGS.items()
    for path, wrap, hint in numbers(cls, "")
]


@pytest.mark.parametrize(("name", "path", "wrap", "hint"), EVERY_KEY)
def test_every_key_with_a_number_has_a_range_and_keeps_it(
    name: str, path: str, wrap: Wrap, hint: Any
) -> None:
    assert typing.get_origin(hint) is Annotated, f"{name}: {path}: a number without a range"
    kind, *marks = typing.get_args(hint)
    (bounds,) = (mark for mark in marks if isinstance(mark, Range))
    kind = next((one for one in typing.get_args(kind) if one is not types.NoneType), kind)
    cls, example = CONFIGS[name]
    for text in bad_numbers(kind, bounds):
        spelled = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(text, text)
        with pytest.raises(InvalidConfig) as caught:
            parse_config(cls, example, source="here.yaml", overrides={path: wrap(spelled)})
        said = str(caught.value)
        assert re.match(rf"here\.yaml: {re.escape(path)}[^ ]*: got ", said), said
        assert "expected" in said
        assert "\n" not in said


def test_there_are_numbers_to_check() -> None:
    assert len(NUMBERS) > 45
    assert len(EVERY_KEY) > 70


@pytest.mark.parametrize("name", CONFIGS)
def test_the_examples_are_whole(name: str) -> None:
    cls, example = CONFIGS[name]
    parse_config(cls, example, source="here.yaml")
