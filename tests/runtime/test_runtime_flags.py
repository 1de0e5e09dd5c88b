"""Every flag of the commands does what it says: a table of each command's flags and their effects.

A flag that is in no table fails, so that none is added without its effect. What runs for real is
below the tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs.factory import make_world
from policies.checkpoint import load
from policies.flag_builder import flags_of
from policies.types import PolicyContract
from policies.yaml_config import parse_config
from runtime.eval_real import cli as eval_real
from runtime.eval_real import replay
from runtime.eval_real.cli import make_run_config, read_evaluation
from runtime.eval_real.recording import Recording
from runtime.eval_real.run_config import EvalRealConfig, RunConfig
from runtime.eval_sim import cli as eval_sim
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.gateway import cli as gateway
from runtime.gateway.config import GatewayCommand
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.model_name import LocalModel, ServerAddress, read_model_name
from runtime.server import cli as serve
from runtime.server.cli import read_command
from runtime.server.config import ServeCommand, ServerConfig
from runtime.server.gateway_options import GatewayOptions
from runtime.server.gateway_processes import shared_flags
from runtime.server.model_loader import model_flags
from runtime.tools import ctl, keys, top, train
from runtime.trace import merge
from tests.runtime.command import status_of
from tests.runtime.test_runtime_numbers import NOT_FOR_PEOPLE
from tests.runtime.toy_policy import CONTRACT

ROOT = Path(__file__).resolve().parents[2]
TOY = "python:tests.runtime.toy_policy:make"
UNSAID = "python:tests.runtime.test_runtime_strategy_choice:make"
PICTURES = ("--robot.obs_config.image.top.shape", "(24, 32, 3)")

Effect = Callable[[Any], Any]
Row = tuple[tuple[str, ...], Effect, Any]
"""Words of a command line, what to look at, and what is to be seen there with these words and not
without."""

CHECKPOINT: dict[str, tuple[tuple[str, ...], Any]] = {
    "device": (("--device", "cpu"), "cpu"),
    "engine": (("--engine", "torch"), "torch"),
    "precision": (("--precision", "fp32"), "fp32"),
    "dataset_id": (("--dataset_id", "d"), "d"),
    "chunk_size": (("-ck", "7"), 7),
    "threads": (("--threads", "2"), 2),
    "graph_options": (("--graph_options", "compiled"), ("compiled",)),
    "camera_names": (("--camera_names", "a", "b"), ("a", "b")),
    "n_heads": (("--n_heads", "4"), 4),
    "image_hw": (("--image_hw", "60", "80"), (60, 80)),
}
"""Options of a checkpoint: dest to words and the argument of ``load_policy``."""


UPSTREAM: dict[str, tuple[tuple[str, ...], str, Any]] = {
    "upstream_contract": (("--upstream_contract", "c"), "contract", "c"),
    "upstream_timeout_s": (("--upstream_timeout_s", "3"), "timeout_s", 3.0),
    "api_key": (("--api_key", "k"), "api_key", "k"),
}
"""Options of another system's server: dest to words, field and value."""


def loaded_with(option: str, monkeypatch: pytest.MonkeyPatch, options: Any) -> Any:
    """The argument that ``load_policy`` gets."""
    got: dict[str, Any] = {}
    monkeypatch.setattr(load, "load_policy", lambda model, **given: got.update(given))
    options.load("somewhere")
    return got[option]


def dests(cli: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in cli._actions} - {"help"}


def parsers_of(cli: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """``cli`` by an empty name, and its commands by theirs."""
    found = {"": cli}
    for action in cli._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= dict(action.choices)
    return found


COMMANDS = {
    "server": (serve, {"": ServeCommand}),
    "eval_sim": (eval_sim, {"": EvalSimConfig}),
    "eval_real": (eval_real, {"": EvalRealConfig}),
    "gateway": (gateway, {"": GatewayCommand}),
    "train": (train, {"": train.TrainCommand}),
    "ctl": (ctl, {"": ctl.ServerAccess, "status": None, "load": ctl.LoadCommand}),
    "top": (top, {"": top.TopCommand}),
    "keys": (
        keys,
        {
            "": None,
            "new": keys.NewCommand,
            "allow": keys.AllowCommand,
            "show": keys.ShowCommand,
        },
    ),
    "replay": (replay, {"": replay.ReplayCommand}),
    "trace": (merge, {"": merge.MergeCommand}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_of_a_command_is_one_field_of_its_configuration(name: str) -> None:
    module, configurations = COMMANDS[name]
    parsers = parsers_of(module.parser())  # type: ignore[attr-defined]
    assert parsers.keys() == configurations.keys()
    for command, cli in parsers.items():
        options = {
            action.dest: (action.help, tuple(action.option_strings))
            for action in cli._actions
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        }
        configuration = configurations[command]
        fields = [] if configuration is None else list(flags_of(configuration))
        assert len(fields) == len(options)
        assert options == {
            field.name: (
                argparse.SUPPRESS if field.flag.hidden else field.help or None,
                () if field.flag.positional else field.names,
            )
            for field in fields
        }


def test_no_command_describes_a_flag_by_hand() -> None:
    by_hand = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "runtime").rglob("*.py")
        if ".add_argument(" in path.read_text()
    }
    assert by_hand <= NOT_FOR_PEOPLE


# --- eval_real -------------------------------------------------------------------------------


def run_config(*words: str) -> RunConfig:
    evaluation = read_evaluation(["-c", "dummy", *words])
    contract = PolicyContract.from_json(CONTRACT.to_json())
    return make_run_config(evaluation, "127.0.0.1:1", contract, {})


def stream(made: RunConfig) -> Any:
    from runtime.eval_real.run_config import RobotLimits

    return made.make_state_machine(RobotLimits.of(made.make_robot())).stream


REAL: dict[str, Row] = {
    "publish_rate": (("--publish_rate", "100"), lambda m: (m.ratio, m.period_s), (2, 0.01)),
    "sensing_rate": (("--sensing_rate", "10"), lambda m: m.sensing_rate, 10.0),
    "fps": (("--fps", "25"), lambda m: (m.contract.dt_s, m.publish_rate), (0.04, 25.0)),
    "max_timesteps": (("--max_timesteps", "3"), lambda m: m.max_timesteps, 3),
    "task": (("--task", "fake"), lambda m: (m.language, m.max_timesteps), ("Reach the pose.", 50)),
    "action_manager": (("--action_manager", "latest"), lambda m: m.strategy().name, "latest"),
    "manager_coef": (
        ("--action_manager", "overlap", "--manager_coef", "0.3"),
        lambda m: m.strategy().coefficient,
        0.3,
    ),
    "n_action_steps": (("--n_action_steps", "4"), lambda m: m.strategy().stride, 4),
    "ensemble_stride": (
        ("--action_manager", "temporal_ensemble", "--ensemble_stride", "5"),
        lambda m: (m.strategy().stride, m.demand().get("rate_hz")),
        (5, 10.0),
    ),
    "near": (("--near", "2.5"), lambda m: m.near, 2.5),
    "same_joints": (("--same_joints",), lambda m: m.same_joints, True),
    "fault_after_s": (("--fault_after_s", "0.5"), lambda m: stream(m)._fault_after, 25),
    "max_chunk_age_s": (("--max_chunk_age_s", "3"), lambda m: m.max_chunk_age_s, 3.0),
    "max_sensing_age_s": (("--max_sensing_age_s", "2"), lambda m: m.max_sensing_age_s, 2.0),
    "connect_timeout_s": (("--connect_timeout_s", "3"), lambda m: m.connect_timeout_s, 3.0),
    "priority": (("--priority", "5"), lambda m: m.realtime.priority, 5),
    "video_fps": (("--video_fps", "0"), lambda m: m.video_fps, 0.0),
    "trace": (("--trace", "/x/t.json"), lambda m: m.trace, Path("/x/t.json")),
    "transport": (("--transport", "zmq"), lambda m: m.connection.transport, "zmq"),
    "resize": (("--resize",), lambda m: m.connection.resize, True),
    "dataset": (("--dataset", "/x/d"), lambda m: m.recording.dataset, Path("/x/d")),
    "dataset_lossless": (
        ("--dataset_lossless",),
        lambda m: m.recording.dataset_lossless,
        True,
    ),
    "rerun": (("--rerun", "/x/r.rrd"), lambda m: m.live_view.file, Path("/x/r.rrd")),
    "robot_config": (("-c", "sim_twin"), lambda m: m.make_robot().name, "sim_twin"),
}
REAL_READ: dict[str, Row] = {
    "model_name_or_path": (("-m", TOY), lambda e: e.config.model, LocalModel(TOY)),
    "save_dir": (("-o", "/x"), lambda e: e.path, Path("/x/dummy/sim_transfer_cube.json")),
    "log_level": (("--log_level", "INFO"), lambda e: e.config.log_level, "INFO"),
}
REAL_ROS2 = {"ros_discovery"}
REAL_RUN = {"num_rollout", "seed", "yes", "video_fps", "trace"}
"""Seen in ``test_a_rollout_is_played_as_the_flags_say``."""
REAL_ELSEWHERE = {"jpeg", "server_key", "client_key"}
"""In test_runtime_frames and test_transport_curve."""


def test_no_flag_of_eval_real_is_left_out() -> None:
    known = REAL.keys() | REAL_READ.keys() | REAL_RUN | REAL_ELSEWHERE | CHECKPOINT.keys()
    known |= UPSTREAM.keys() | REAL_ROS2
    assert known == dests(eval_real.parser())


@pytest.mark.parametrize("flag", REAL)
def test_a_flag_of_eval_real(flag: str) -> None:
    words, look, expected = REAL[flag]
    assert look(run_config(*words)) == expected
    assert look(run_config()) != expected


@pytest.mark.parametrize("flag", REAL_READ)
def test_what_eval_real_reads(flag: str) -> None:
    words, look, expected = REAL_READ[flag]
    assert look(read_evaluation(["-c", "dummy", *words])) == expected
    assert look(read_evaluation(["-c", "dummy"])) != expected


def test_where_ros2_nodes_are_looked_for() -> None:
    robot = read_evaluation(["-c", "ros2_aloha_twin", "--ros_discovery", "subnet"]).config.overrides
    assert robot == {"discovery": "subnet"}
    with pytest.raises(ValueError, match="got with -c dummy, expected a robot of type ros2"):
        read_evaluation(["-c", "dummy", "--ros_discovery", "subnet"])


def test_defaults_follow_the_rate_that_is_played() -> None:
    made = run_config("--fps", "25")
    assert made.sensing_rate == made.publish_rate == 25.0
    assert made.max_chunk_age_s == pytest.approx(CONTRACT.chunk_size * 0.04 + 1.0)
    assert made.served_contract == CONTRACT  # what the server's is compared with


def real(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = ["-m", UNSAID, "-c", "dummy", *PICTURES, "--near", "500", "--yes", "-o", str(folder)]
    return subprocess.run(
        [sys.executable, "eval_real.py", *argv, *words],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_a_rollout_is_played_as_the_flags_say(tmp_path: Path) -> None:
    """Not the contract's rate, twice as many commands, and the checkpoint's own strategy."""
    flags = "--fps 25 --publish_rate 50 --max_timesteps 20 -n 2 --seed 7 --video_fps 5 --task fake"
    trace = tmp_path / "trace.json"
    ended = real(tmp_path, *flags.split(), "--trace", str(trace))
    assert ended.returncode == 0, ended.stderr
    before = ended.stderr[: ended.stderr.index("rollout")]
    assert "rate         25 Hz\n" in before
    assert "execution    temporal_ensemble, coefficient 0.05, a new chunk every tick (con" in before
    assert "assumed" not in ended.stderr
    result = json.loads((tmp_path / "dummy" / "fake.json").read_text())
    config = parse_config(EvalRealConfig, result["config"], source="result")
    assert (config.fps, config.publish_rate, config.sensing_rate) == (25.0, 50.0, None)
    assert (config.robot, config.overrides) == (
        "dummy",
        {PICTURES[0].removeprefix("--robot."): PICTURES[1]},
    )
    assert [episode["seed"] for episode in result["episodes"]] == [7, 8]
    assert [episode["horizon"] for episode in result["episodes"]] == [20, 20]
    assert result["policy"]["contract"]["dt_s"] == 0.04
    assert result["policy"]["weights_hash"] == "0f"
    assert result["action_manager"]["name"] == "temporal_ensemble"
    assert result["action_manager"]["source"] == "config.json: temporal_ensemble_coeff"
    assert trace.is_file()
    folder = tmp_path / "dummy" / "fake"
    assert len(list(folder.rglob("*.mp4"))) == 2
    for stem in replay.find(folder):
        recording = Recording.load(stem)
        rows = recording.rows
        played = rows["played"].astype(bool)
        apart_ns = np.diff(rows["deadline_ns"][played])
        assert set((apart_ns // 20_000_000).tolist()) >= {1}
        assert not (apart_ns % 20_000_000).any()
        assert recording.config.contract.dt_s == 0.04
        assert recording.config.seeds == config.seeds
    assert replay.main([str(folder)]) == 0  # bit for bit


def test_a_robot_is_not_driven_at_an_assumed_rate(tmp_path: Path) -> None:
    ended = real(tmp_path, "--task", "fake")
    assert ended.returncode == 2
    (said,) = ended.stderr.splitlines()
    assert said.startswith("error: --fps: got none, and the policy's checkpoint does not say its")
    assert "50 Hz would be assumed" in said
    assert not list(tmp_path.rglob("*.npz"))


# --- eval_sim --------------------------------------------------------------------------------


def sim_config(*words: str) -> Any:
    return eval_sim.read_config(["-e", "fake", *words])


SIM: dict[str, Row] = {
    "model_name_or_path": (("-m", "[::1]:7"), lambda p: p.model, ServerAddress("::1", 7)),
    "env": (("-e", "aloha"), lambda p: p.env.kind, "aloha"),
    "num_rollout": (("-n", "3"), lambda p: len(p.seeds), 3),
    "seed": (("-s", "9"), lambda p: p.seeds[0], 9),
    "num_envs": (("-bs", "2"), lambda p: p.num_envs, 2),
    "realtime": (("--realtime",), lambda p: p.realtime, True),
    "fps": (("--fps", "30"), lambda p: p.fps, 30.0),
    "action_manager": (("--action_manager", "latest"), lambda p: p.action_manager, "latest"),
    "manager_coef": (("--manager_coef", "0.2"), lambda p: p.manager_coef, 0.2),
    "n_action_steps": (("--n_action_steps", "2"), lambda p: p.n_action_steps, 2),
    "ensemble_stride": (("--ensemble_stride", "5"), lambda p: p.ensemble_stride, 5),
    "latency_ms": (("--latency_ms", "120"), lambda p: p.latency.latency_ms, 120.0),
    "latency_jitter_ms": (
        ("--latency_ms", "120", "--latency_jitter_ms", "30"),
        lambda p: p.latency.latency_jitter_ms,
        30.0,
    ),
    "drop": (("--drop", "0.1"), lambda p: p.latency.drop, 0.1),
    "camera_latency_ms": (
        ("--camera_latency_ms", "40"),
        lambda p: p.latency.camera_ticks(0.02),
        2,
    ),
    "videos": (("--videos", "1"), lambda p: p.videos, 1),
    "camera_map": (
        ("--camera_map", "top=side"),
        lambda p: (p.env.camera_map, p.camera_map),
        ({"top": "side"}, {"top": "side"}),
    ),
    "trace": (("--trace", "/x/t.json"), lambda p: p.trace, Path("/x/t.json")),
    "transport": (("--transport", "shm"), lambda p: p.connection.transport, "shm"),
    "resize": (("--resize",), lambda p: p.connection.resize, True),
    "dataset": (("--dataset", "/x/d"), lambda p: p.recording.dataset, Path("/x/d")),
    "dataset_lossless": (("--dataset_lossless",), lambda p: p.recording.dataset_lossless, True),
    "dataset_objects": (("--dataset_objects",), lambda p: p.dataset_objects, True),
    "resume": (("--resume",), lambda p: p.resume, True),
    "retries": (("--retries", "0"), lambda p: p.retries, 0),
    "episode_timeout_s": (("--episode_timeout_s", "9"), lambda p: p.episode_timeout_s, 9.0),
    "rerun": (("--rerun",), lambda p: p.live_view.rerun, "viewer"),
    "ray": (("--ray", "10.0.0.1:6379"), lambda p: p.fleet.ray, "10.0.0.1:6379"),
    "env_cpus": (("--ray", "--env_cpus", "0.5"), lambda p: p.fleet.env_cpus, 0.5),
    "servers": (("--ray", "--servers", "2"), lambda p: p.fleet.servers, 2),
    "server_gpus": (
        ("--ray", "--servers", "1", "--server_gpus", "0.5"),
        lambda p: p.fleet.server_gpus,
        0.5,
    ),
    "output_dir": (("-o", "/x"), lambda p: p.video_dir, Path("/x/fake/video/fake")),
}  # fmt: skip
SIM_ELSEWHERE = {"jpeg", "server_key", "client_key", "use_spawn", "log_level"}


def test_no_flag_of_eval_sim_is_left_out() -> None:
    known = SIM.keys() | SIM_ELSEWHERE | CHECKPOINT.keys() | UPSTREAM.keys()
    assert known == dests(eval_sim.parser())


@pytest.mark.parametrize("flag", SIM)
def test_a_flag_of_eval_sim(flag: str) -> None:
    words, look, expected = SIM[flag]
    assert look(sim_config("-m", "127.0.0.1:1", *words)) == expected
    assert look(sim_config("-m", "127.0.0.1:1")) != expected


RUNS: dict[str, tuple[tuple[str, ...], Effect, Any]] = {
    "num_rollout": (("-n", "3"), lambda r: r["total"], 3),
    "seed": (("-s", "9"), lambda r: r["episodes"][0]["seed"], 9),
    "fps": (
        ("--env.dt_s", "0.04", "--fps", "25"),
        lambda r: (r["policy"]["contract"]["dt_s"], r["world"]["dt_s"]),
        (0.04, 0.04),
    ),
    "n_action_steps": (("--n_action_steps", "2"), lambda r: r["timing"]["chunks"], 10),
    "action_manager": (("--action_manager", "latest"), lambda r: r["timing"]["chunks"], 20),
    "ensemble_stride": (
        ("--action_manager", "temporal_ensemble", "--ensemble_stride", "5"),
        lambda r: r["timing"]["chunks"],
        4,
    ),
    "latency_ms": (("--latency_ms", "60"), lambda r: r["timing"]["answer_delay"]["max"], 0.06),
    "manager_coef": (
        ("--action_manager", "overlap", "--manager_coef", "0.5"),
        lambda r: r["action_manager"]["coefficient"],
        0.5,
    ),
    "realtime": (("--realtime",), lambda r: r["timing"]["lateness"]["count"] > 0, True),
}


@pytest.mark.parametrize("flag", RUNS)
def test_a_simulation_runs_as_its_flag_says(tmp_path: Path, flag: str) -> None:
    def result(*words: str) -> Any:
        argv = ["-m", TOY, "-e", "fake", "--env.max_timesteps", "20", "-n", "1", "--videos", "0"]
        assert status_of(eval_sim.main, [*argv, "-o", str(tmp_path), *words]) == 0
        return json.loads((tmp_path / "fake" / "fake.json").read_text())

    words, look, expected = RUNS[flag]
    assert look(result(*words)) == expected
    assert look(result()) != expected


def test_a_result_says_what_was_asked_for(tmp_path: Path) -> None:
    argv = ["-m", TOY, "-e", "fake", "--env.max_timesteps", "9", "-n", "1", "--videos", "0"]
    argv += ["-o", str(tmp_path), "--log_level", "ERROR", "--camera_map", "top=top"]
    assert status_of(eval_sim.main, argv) == 0
    result = json.loads((tmp_path / "fake" / "fake.json").read_text())
    config = parse_config(EvalSimConfig, result["config"], source="result")
    assert config == eval_sim.read_config(argv)
    assert result["config"]["env"] == result["env"]


# --- the server ------------------------------------------------------------------------------

SERVER: dict[str, Row] = {
    "model_name_or_path": (("-m", TOY), lambda c: c.model_name_or_path, TOY),
    "host": (("--host", "0.0.0.0"), lambda c: c.host, "0.0.0.0"),  # noqa: S104
    "port": (("-p", "0"), lambda c: c.port, 0),
    "transport": (("--transport", "zmq"), lambda c: c.transport, "zmq"),
    "max_sessions": (("--max_sessions", "3"), lambda c: c.max_sessions, 3),
    "max_batch": (("--max_batch", "2"), lambda c: c.max_batch, 2),
    "batch_wait_ms": (("--batch_wait_ms", "4"), lambda c: c.batch_wait_ms, 4.0),
    "session_timeout_s": (("--session_timeout_s", "9"), lambda c: c.session_timeout_s, 9.0),
    "max_rate_hz": (("--max_rate_hz", "5"), lambda c: c.limits.rate_hz, 5.0),
    "metrics_port": (("--metrics_port", "9100"), lambda c: c.metrics_port, 9100),
    "gateway": (
        ("--gateway", "openpi:8000:map", "--gateway", "lerobot"),
        lambda c: c.gateways,
        (GatewayOptions("openpi", 8000, "map"), GatewayOptions("lerobot")),
    ),
    "gateway_host": (("--gateway_host", "::1"), lambda c: c.gateway_host, "::1"),
    "gateway_key": (
        ("--gateway_key", "g", "--curve_key", "k", "--curve_allow", "d", "--gateway", "groot"),
        lambda c: shared_flags(c, "here:1", insecure=False, log_level="INFO")[-2:],
        ["--server_key=k", "--client_key=g"],
    ),
    "fps": (("--fps", "30"), lambda c: c.checkpoint.fps, 30.0),
    "curve_key": (
        ("--curve_key", "k", "--curve_allow", "d"),
        lambda c: (c.curve_key, c.curve_allow),
        ("k", "d"),
    ),
}
SERVER_ELSEWHERE = {"curve_allow", "insecure", "config", "trace", "log_level"}
SERVER_ELSEWHERE |= {"stop_with_stdin", "ready_fd"}  # of every test that uses ``ServerProcess``
PASSED_ON = ("host", "max_sessions", "max_batch", "batch_wait_ms", "session_timeout_s")


def read_server(*words: str) -> ServerConfig:
    return read_command(words).server


def test_no_flag_of_the_server_is_left_out() -> None:
    known = SERVER.keys() | SERVER_ELSEWHERE | CHECKPOINT.keys() | UPSTREAM.keys()
    assert known == dests(serve.parser())


@pytest.mark.parametrize("flag", SERVER)
def test_a_flag_of_the_server(flag: str) -> None:
    words, look, expected = SERVER[flag]
    assert look(read_server(*words)) == expected
    assert look(read_server()) != expected


def test_the_server_is_made_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}

    class Made(Exception):
        pass

    def server(policy: Any, **given: Any) -> None:
        made.update(given, contract=policy.contract)
        raise Made

    monkeypatch.setattr(serve, "PolicyServer", server)
    words = [word for flag in (*PASSED_ON, "port", "transport") for word in SERVER[flag][0]]
    with pytest.raises(Made):
        serve._serve(read_server("-m", TOY, *words), insecure=True)
    for flag in PASSED_ON:
        assert made[flag] == SERVER[flag][2]
    assert (made["port"], made["transports"]) == (0, ("zmq",))


@pytest.mark.parametrize("option", UPSTREAM)
def test_an_option_of_an_upstream_reaches_its_loader_and_a_server_started_for_it(
    option: str,
) -> None:
    words, name, expected = UPSTREAM[option]
    given = ["-m", "openpi://127.0.0.1:1", "--upstream_contract", "x", *words]
    plain = given[:4]
    for read in (
        lambda given: read_server(*given),
        lambda given: sim_config(*given),
        lambda given: read_evaluation(["-c", "dummy", *given]).config,
    ):
        assert (
            getattr(read(given).upstream, name) == expected != getattr(read(plain).upstream, name)
        )
        model = read_model_name(given[1])
        told = model_flags(model, CheckpointOptions(), read(given).upstream)
        assert read_server(*told).upstream == read(given).upstream


@pytest.mark.parametrize("option", CHECKPOINT)
def test_an_option_of_a_checkpoint_reaches_its_loader(
    monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    words, expected = CHECKPOINT[option]
    for read in (
        lambda given: read_server(*given).checkpoint,
        lambda given: sim_config("-m", TOY, *given).checkpoint,
        lambda given: read_evaluation(["-c", "dummy", "-m", TOY, *given]).config.checkpoint,
    ):
        assert loaded_with(option, monkeypatch, read(list(words))) == expected
        assert loaded_with(option, monkeypatch, read([])) != expected
    # and a server that is started for it is told the same
    again = read_server(*read_server(*words).checkpoint.to_argv()).checkpoint
    assert again == read_server(*words).checkpoint


# --- the gateways ----------------------------------------------------------------------------

GATEWAY: dict[str, Row] = {
    "protocol": (("groot",), lambda c: (c.protocol, c.port), ("groot", 5555)),
    "server": (("--server", "x:7"), lambda c: c.server, "x:7"),
    "host": (("--host", "::1"), lambda c: c.host, "::1"),
    "insecure": (("--insecure", "--host", "x"), lambda c: c.host, "x"),
    "port": (("-p", "0"), lambda c: c.port, 0),
    "config": (("--config", "m"), lambda c: c.config, "m"),
    "api_keys": (("--api_keys", "k"), lambda c: c.api_keys, "k"),
    "max_clients": (("--max_clients", "2"), lambda c: c.max_clients, 2),
    "kind": (
        ("--kind", "robot", "--rate_hz", "50", "--deadline_ms", "20"),
        lambda c: (c.sessions.kind, c.sessions.rate_hz, c.sessions.deadline_ms),
        ("robot", 50.0, 20.0),
    ),
    "timeout_s": (("--timeout_s", "3"), lambda c: c.sessions.timeout_s, 3.0),
    "transport": (("--transport", "zmq"), lambda c: c.connection.transport, "zmq"),
    "log_level": (("--log_level", "ERROR"), lambda c: c.log_level, "ERROR"),
}
GATEWAY_ELSEWHERE = {"rate_hz", "deadline_ms", "server_key", "client_key"}
GATEWAY_ELSEWHERE |= {"stop_with_stdin", "ready_fd"}  # of every test with ``GatewayProcesses``


def read_gateway_command(*words: str) -> GatewayCommand:
    protocol = () if words[:1] == ("groot",) else ("openpi",)
    return gateway.read_command((*protocol, *words))


def test_no_flag_of_the_gateways_is_left_out() -> None:
    assert GATEWAY.keys() | GATEWAY_ELSEWHERE == dests(gateway.parser())


@pytest.mark.parametrize("flag", GATEWAY)
def test_a_flag_of_the_gateways(flag: str) -> None:
    words, look, expected = GATEWAY[flag]
    assert look(read_gateway_command(*words)) == expected
    assert look(read_gateway_command()) != expected


def test_an_environments_keys_do_what_they_say() -> None:
    words = ("--env.max_timesteps", "7", "--env.dt_s", "0.04", "--env.image_hw", "[10, 12]")
    world = make_world(sim_config("-m", TOY, *words).env, cameras=CONTRACT.cameras)
    assert (world.max_timesteps, world.dt_s) == (7, 0.04)
    assert world.observe().images["top"].shape == (10, 12, 3)
