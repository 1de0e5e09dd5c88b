"""``metronome eval-real``, also ``eval_real.py``: evaluate a policy on a robot.

Writes ``<save_dir>/<robot>/<task>.json`` after every rollout, with recordings and videos beside it;
``metronome replay`` recomputes the commands of a recording. Exit status: 0 done, 1 the server, the
robot or a process was lost (finished rollouts are kept), 2 bad input, before the robot moved,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from envs.config import TaskConfig
from policies.command_line import CommandLine
from policies.flag_builder import add_flags, from_flags
from policies.standard_streams import run_command
from policies.types import PolicyContract, PolicyInfo
from policies.yaml_config import as_plain, load_config
from robots.base import Robot
from robots.factory import make_robot
from runtime.client.policy_client import PolicyClient
from runtime.control import strategy_selection
from runtime.control.strategy_selection import choose_execution
from runtime.datasets.dataset_recorder import DatasetRecorder
from runtime.datasets.errors import RecorderFailed
from runtime.errors import ModelNameError
from runtime.eval_real.compatibility import Incompatible, check_compatible
from runtime.eval_real.dataset_episode import dataset_features
from runtime.eval_real.latency_check import latency_lines
from runtime.eval_real.live_rollout import live_view_layout
from runtime.eval_real.operator_console import OperatorConsole
from runtime.eval_real.rollout_session import Interrupted, Rollout, RolloutSession, SessionOver
from runtime.eval_real.run_config import EvalRealConfig, RobotLimits, RunConfig
from runtime.eval_real.supervisor import Supervisor
from runtime.eval_real.worker_process import EXPECTED_FAILURES
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.results import (
    format_report,
    policy_record,
    result_path,
    summarize,
    versions,
    write_result,
)
from runtime.live_view.live_view import LiveView
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.connection import check_flags
from runtime.options.model_name import ServerAddress
from runtime.options.overrides import read_overrides
from runtime.options.upstream import check_upstream
from runtime.server.model_loader import model_flags
from runtime.server.server_process import ServerProcess
from runtime.trace import recorder as trace
from runtime.trace.buffer import TraceError

T = TypeVar("T")
logger = logging.getLogger(__name__)

LOST, BAD_INPUT, INTERRUPTED = 1, 2, 130


def parser() -> argparse.ArgumentParser:
    """Return the parser, with one argument per flag of ``EvalRealConfig``."""
    cli = CommandLine(
        prog="metronome eval-real",
        description="Evaluate a policy on a robot.",
        epilog="--robot.KEY VALUE overrides KEY of the robot's configuration. While the arm moves, "
        "any key stops it.",
    )
    add_flags(cli, EvalRealConfig)
    return cli


@dataclasses.dataclass(slots=True)
class Evaluation:
    """A running evaluation: its configuration, its processes and the results so far.

    Attributes:
        config: The command line.
        task: The task's configuration.
        robot: The robot, not connected; other processes connect to it.
        rollouts: The finished rollouts.
        setting: How the policy is reached, for the result; empty until the processes run.
        run_config: What the processes run with; None until the policy's contract is known.
        server: The server started for the model; None if ``-m`` is an address.
    """

    config: EvalRealConfig
    task: TaskConfig
    robot: Robot
    rollouts: list[Rollout] = dataclasses.field(default_factory=list)
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
    run_config: RunConfig | None = None
    server: ServerProcess | None = None

    @property
    def path(self) -> Path:
        """The result file."""
        config = self.config
        return result_path(config.save_dir, self.robot.name, Path(config.task).stem)

    def start_server(self) -> str:
        """Start a server, unless ``-m`` is the address of one; return its address."""
        config, model = self.config, self.config.model
        if isinstance(model, ServerAddress):
            return str(model)
        if self.server is not None:
            self.server.close()
        flags = model_flags(model, config.checkpoint, config.upstream)
        if config.trace is not None:
            flags += ["--trace", str(trace.sibling(config.trace, "server"))]
        self.server = ServerProcess(flags)
        return self.server.address

    def new_server(self) -> str | None:
        """Restart a private server that has died and return its address; None if none has died."""
        dead = self.server is not None and not self.server.alive
        return self.start_server() if dead else None


def read_evaluation(argv: Sequence[str] | None) -> Evaluation:
    """Return the evaluation that the command line describes, nothing started yet.

    Args:
        argv: The arguments; None for ``sys.argv``.

    Raises:
        InvalidConfig, RobotError, RuntimeFault, ValueError: A flag or an override is invalid.
    """
    args, rest = parser().parse_known_args(argv)
    overrides = read_overrides(rest, "robot.", "metronome eval-real")
    config = from_flags(EvalRealConfig, args, overrides=overrides)
    robot = make_robot(config.robot, overrides)
    if config.ros_discovery is not None:
        from robots.ros2_robot import Ros2Robot

        if not isinstance(robot, Ros2Robot):
            raise ValueError(
                f"--ros_discovery: got with -c {config.robot}, expected a robot of type ros2"
            )
        overrides = {**overrides, "discovery": config.ros_discovery}
        config = dataclasses.replace(config, overrides=overrides)
        robot = make_robot(config.robot, overrides)
    check_flags(config.connection)
    check_upstream(config.model, config.upstream, config.checkpoint)
    config.live_view.check()
    if isinstance(config.model, ServerAddress) and config.checkpoint != CheckpointOptions():
        raise ValueError(
            f"{', '.join(config.checkpoint.given_flags())}: got with -m {config.model}, expected "
            "none: they are for the server there, which loads the checkpoint"
        )
    return Evaluation(
        config=config,
        task=load_config(TaskConfig, config.task, kind="task"),
        robot=robot,
    )


def make_run_config(
    evaluation: Evaluation,
    address: str,
    contract: PolicyContract,
    found: dict[str, str],
    weights_hash: str = "",
) -> RunConfig:
    """Return the configuration of the processes, with every open option decided.

    Args:
        evaluation: The command line's.
        address: The policy server's address.
        contract: The policy's contract, from the server.
        found: Overrides of the robot's keys with which a driver finds the robot's companion.
        weights_hash: Of the policy, from the server.

    Raises:
        Incompatible: Neither the checkpoint nor ``--fps`` defines the policy's rate.
        ValueError: An unknown strategy, or a number that it does not accept.
    """
    config = evaluation.config
    contract_used = contract.at_rate(config.fps)
    if contract_used.assumes_rate:
        raise Incompatible(
            "--fps: got none, and the policy's checkpoint does not say its rate "
            f"({1 / contract_used.dt_s:g} Hz would be assumed); expected the rate that its "
            "demonstrations were recorded at"
        )
    execution = choose_execution(
        contract_used,
        config.action_manager,
        config.manager_coef,
        config.n_action_steps,
        config.ensemble_stride,
    )
    rate = 1 / contract_used.dt_s
    longest_s = contract_used.chunk_size * contract_used.dt_s + 1.0
    decided = {
        "overrides": {**config.overrides, **found},
        "action_manager": execution.action_manager,
        "manager_coef": execution.manager_coef,
        "n_action_steps": execution.n_action_steps,
        "publish_rate": _given(config.publish_rate, rate),
        "sensing_rate": _given(config.sensing_rate, rate),
        "max_timesteps": _given(config.max_timesteps, evaluation.task.max_timesteps),
        "max_chunk_age_s": _given(config.max_chunk_age_s, longest_s),
    }
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return RunConfig(
        **{**given, **decided},
        contract_json=contract.to_json(),
        address=address,
        language=evaluation.task.language,
        execution_source=execution.source,
        weights_hash=weights_hash,
        max_latency_ms=execution.max_latency_ms,
    )


def _given(value: T | None, default: T) -> T:
    return default if value is None else value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the evaluation. Returns the exit status."""
    try:
        evaluation = read_evaluation(argv)
        evaluation.path.parent.mkdir(parents=True, exist_ok=True)
    except (*EXPECTED_FAILURES, ModelNameError, OSError) as error:
        return _fail(error)
    logging.basicConfig(
        level=evaluation.config.log_level, format="%(levelname)s %(name)s: %(message)s"
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    failure, status = "", 0
    try:
        with trace.tracing(evaluation.config.trace, "eval_real"):
            _evaluate(evaluation)
    except TraceError as error:
        return _fail(error)
    except (SessionOver, RecorderFailed) as over:
        failure, status = str(over), LOST
    except Interrupted:
        failure, status = "interrupted", INTERRUPTED
    except KeyboardInterrupt:
        failure, status = "interrupted before anything moved", INTERRUPTED
    except OSError as error:
        failure, status = str(error), LOST
    except EXPECTED_FAILURES as error:
        return _fail(error)
    finally:
        if evaluation.server is not None:
            evaluation.server.close()
    if evaluation.rollouts:
        status = _conclude(evaluation, failure) or status
    if failure:
        kept = f"; {len(evaluation.rollouts)} of {evaluation.config.num_rollout} rollouts were kept"
        print(f"error: {failure}{kept}", file=sys.stderr)
    return status


def _evaluate(evaluation: Evaluation) -> None:
    config, robot = evaluation.config, evaluation.robot
    with contextlib.ExitStack() as stack:
        found = dict(stack.enter_context(robot.companion()))
        address = evaluation.start_server()
        with PolicyClient(address, **config.connection.keywords()) as client:
            contract, weights_hash = client.contract, client.info.weights_hash
        run_config = make_run_config(evaluation, address, contract, found, weights_hash)
        check_compatible(run_config, robot)
        evaluation.run_config = run_config
        for line in strategy_selection.summary_lines(run_config.contract, run_config.execution):
            _tell(line)
        for line in latency_lines(run_config):
            _tell(line)
        recorder = _start_recorder(run_config, robot)
        if recorder is not None:
            stack.enter_context(recorder)
        live_view, tell = None, _tell
        if run_config.live_view.rerun is not None:
            layout = live_view_layout(run_config, robot)
            live_view = stack.enter_context(LiveView(run_config.live_view.rerun, layout, _tell))
            tell = functools.partial(_tell_and_show, live_view)
        supervisor = stack.enter_context(Supervisor(run_config, robot, tell, live_view))
        tell(supervisor.realtime)
        evaluation.setting = supervisor.setting
        operator = stack.enter_context(OperatorConsole(tell))
        session = RolloutSession(
            supervisor,
            RobotLimits.of(robot),
            operator,
            folder=evaluation.path.with_suffix(""),
            unattended=config.yes,
            new_server=evaluation.new_server,
            tell=tell,
            recorder=recorder,
        )
        for rollout in session.run(config.seeds):
            evaluation.rollouts.append(rollout)
            write_result(evaluation.path, *_result(evaluation, ""))
        if recorder is not None:
            recorder.finish()


def _start_recorder(config: RunConfig, robot: Robot) -> DatasetRecorder | None:
    """Start the dataset's recorder; None without ``--dataset``. Raises ``DatasetError``."""
    options = config.recording
    if options.dataset is None:
        return None
    features = dataset_features(
        robot.contract, robot.name, config.contract, lossless=options.dataset_lossless
    )
    return DatasetRecorder(options.dataset, features)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _tell_and_show(live_view: LiveView, line: str) -> None:
    _tell(line)
    live_view.text(line)


def _fail(error: BaseException) -> int:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


def _result(evaluation: Evaluation, failure: str) -> tuple[dict[str, Any], list[Episode]]:
    rollouts = evaluation.rollouts
    episodes = [rollout.episode for rollout in rollouts]
    judged = [rollout.episode for rollout in rollouts if rollout.judged]
    all_episodes = summarize(episodes)
    result = summarize(judged) | {name: all_episodes[name] for name in ("episodes", "timing")}
    details = {rollout.episode.seed: rollout.details() for rollout in rollouts}
    result["episodes"] = [entry | details[entry["seed"]] for entry in result["episodes"]]
    config, run_config, setting = evaluation.config, evaluation.run_config, evaluation.setting
    if run_config is not None:
        contract = run_config.contract
        result |= {
            "action_manager": strategy_selection.result_entry(contract, run_config.execution),
            "assumed": [str(assumption) for assumption in contract.assumed],
            "transport": setting["transport"],
            "transport_reason": setting["transport_reason"],
            "pictures": setting["pictures"],
            "deterministic": False,
            "policy": policy_record(contract, PolicyInfo(**setting["info"])),
        }
    result |= {
        "requested": config.num_rollout,
        "skipped": len(rollouts) - len(judged),
        "failure": failure,
        "mode": "real",
        "clamped_ticks": sum(rollout.clamped_ticks for rollout in rollouts),
        "faults": [fault for rollout in rollouts for fault in rollout.faults],
        "robot": {"name": evaluation.robot.name, "config": config.robot},
        "task": dataclasses.asdict(evaluation.task),
        "config": as_plain(config),
        "versions": versions(),
    }
    return json.loads(json.dumps(result, default=str)), episodes


def _conclude(evaluation: Evaluation, failure: str) -> int:
    """Print the summary and write the result; return ``LOST`` if it cannot be written, else 0."""
    result, episodes = _result(evaluation, failure)
    print(format_report(result))
    try:
        write_result(evaluation.path, result, episodes)
    except OSError as error:
        print(f"error: the result was not written: {error}", file=sys.stderr)
        return LOST
    print(f"  clamped {result['clamped_ticks']}, faults {len(result['faults'])}")
    print(f"result       {evaluation.path}")
    print(f"recordings   {evaluation.path.with_suffix('')}/")
    if evaluation.config.recording.dataset is not None:
        print(f"dataset      {evaluation.config.recording.dataset}/")
    if evaluation.config.live_view.file is not None:
        print(f"rerun        {evaluation.config.live_view.file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
