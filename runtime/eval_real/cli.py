"""Evaluate a policy on a robot: ``eval_real.py``.

Writes ``<save_dir>/<robot>/<task>.json`` after every rollout; recordings and videos lie beside it,
and ``python -m runtime.eval_real.replay`` plays a recording again.
Exit status: 0 done, 1 the server, the robot or a process was lost (finished rollouts are kept),
2 bad input, before anything moved, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from envs.config import TaskConfig
from policies.command_line import CommandLine, Number
from policies.number_ranges import COUNT, DURATION_S, POSITIVE, RATE_HZ, TICKS, Range
from policies.standard_streams import run_command
from policies.types import PolicyContract, PolicyInfo
from policies.yaml_config import load_config
from robots.base import Robot
from robots.factory import make_robot
from runtime.client.policy_client import PolicyClient
from runtime.errors import ModelNameError
from runtime.eval_real.compatibility import Incompatible, check_compatible
from runtime.eval_real.operator_console import OperatorConsole
from runtime.eval_real.processes import EXPECTED_FAILURES
from runtime.eval_real.rollout_session import Interrupted, Rollout, RolloutSession, SessionOver
from runtime.eval_real.run_config import RobotLimits, RunConfig
from runtime.eval_real.supervisor import Supervisor
from runtime.evaluation.episode_result import Episode
from runtime.evaluation.results import (
    policy_record,
    report,
    result_path,
    summarize,
    versions,
    write_result,
)
from runtime.options import connection as connection_options
from runtime.options import execution as strategy_options
from runtime.options.checkpoint import CheckpointOptions, add_flags, from_flags
from runtime.options.connection import ConnectionOptions
from runtime.options.execution import choose_execution
from runtime.options.model import LocalModel, ServerAddress, read_model_name
from runtime.options.overrides import read_overrides
from runtime.server.server_process import ServerProcess
from runtime.trace import recorder as trace
from runtime.trace.buffer import TraceError

T = TypeVar("T")
logger = logging.getLogger(__name__)

MOST_SEEDS = 2**24
"""A seed is told to the control process in 24 bits."""
PRIORITY, VIDEO_FPS = Range(0, 99), Range(0, 1000)
LOST, BAD_INPUT, INTERRUPTED = 1, 2, 130


def parser() -> argparse.ArgumentParser:
    cli = CommandLine(
        prog="eval_real.py",
        description="Evaluate a policy on a robot.",
        epilog="--robot.KEY VALUE overrides KEY of the robot's configuration. While the arm moves, "
        "any key stops it.",
    )
    add = cli.add_argument
    add(
        "-m",
        "--model_name_or_path",
        default="127.0.0.1:5000",
        help="HOST:PORT, or a checkpoint or python:MODULE:FACTORY for a server of our own "
        "(127.0.0.1:5000)",
    )
    add("-c", "--robot_config", required=True, help="name under configs/robot, or a YAML")
    add("--task", default="sim_transfer_cube", help="name under configs/task (sim_transfer_cube)")
    rate, seconds = Number(float, RATE_HZ), Number(float, DURATION_S)
    add("--publish_rate", type=rate, help="commands per second (the policy's rate)")
    add("--sensing_rate", type=rate, help="looks at the cameras per second (the policy's rate)")
    add("-n", "--num_rollout", type=Number(int, COUNT), default=1, help="(1)")
    add("--max_timesteps", type=Number(int, TICKS), help="policy ticks per rollout (the task's)")
    strategy_options.add_flags(cli)
    add("-o", "--save_dir", default="results", help="(results)")
    add(
        "-s",
        "--seed",
        type=Number(int, Range(0, MOST_SEEDS - 1)),
        default=0,
        help="of the first rollout, for robots that take one",
    )
    add("--yes", action="store_true", help="do not wait for Enter; a fault ends the evaluation")
    connection_options.add_flags(cli)
    add(
        "--near",
        type=Number(float, POSITIVE),
        help="how far off the policy may begin, in each joint's unit (0.1 rad or 5.7 deg; other "
        "units: a twentieth of the joint's range, a tenth of a gripper's)",
    )
    add(
        "--same_joints",
        action="store_true",
        help="the policy's joints are the robot's, although their names differ",
    )
    add("--fault_after_s", type=seconds, default=1.0, help="without chunks, then latched (1)")
    add("--max_chunk_age_s", type=seconds, help="of what a command rests on (a chunk and 1 s)")
    add("--max_sensing_age_s", type=seconds, default=0.5, help="of the newest picture (0.5)")
    add(
        "--connect_timeout_s",
        type=seconds,
        default=15.0,
        help="for the robot to be connected and its sensors to speak (15)",
    )
    add(
        "--priority",
        type=Number(int, PRIORITY),
        default=0,
        help="SCHED_FIFO priority of the control loop (0: none)",
    )
    add(
        "--video_fps",
        type=Number(float, VIDEO_FPS),
        default=10.0,
        help="pictures per second of videos, 0: none (10)",
    )
    add("--trace", type=Path, metavar="FILE", help="what happened when, for ui.perfetto.dev")
    add_flags(cli)
    add("--log_level", default="WARNING", choices=("DEBUG", "INFO", "WARNING", "ERROR"))
    return cli


@dataclasses.dataclass(slots=True)
class Evaluation:
    """What the command line asks for, and what is known of it by now."""

    args: argparse.Namespace
    overrides: dict[str, str]
    model: LocalModel | ServerAddress
    checkpoint: CheckpointOptions
    task: TaskConfig
    robot: Robot
    options: ConnectionOptions
    rollouts: list[Rollout] = dataclasses.field(default_factory=list)
    setting: dict[str, Any] = dataclasses.field(default_factory=dict)
    config: RunConfig | None = None
    server: ServerProcess | None = None

    @property
    def path(self) -> Path:
        return result_path(self.args.save_dir, self.robot.name, Path(self.args.task).stem)

    def start_server(self) -> str:
        """A private server; its address."""
        if not isinstance(self.model, LocalModel):
            return str(self.model)
        if self.server is not None:
            self.server.close()
        flags = ["-m", self.model.name, *self.checkpoint.flags()]
        if self.args.trace is not None:
            flags += ["--trace", str(trace.sibling(self.args.trace, "server"))]
        self.server = ServerProcess(flags)
        return self.server.address

    def new_server(self) -> str | None:
        """The address of a new private server, where that died; None where there is nothing new."""
        dead = self.server is not None and not self.server.alive
        return self.start_server() if dead else None


def read_evaluation(argv: Sequence[str] | None) -> Evaluation:
    """What the command line asks for.

    Raises:
        ConfigError, RuntimeFault, ValueError: It asks for what cannot be.
    """
    args, rest = parser().parse_known_args(argv)
    if args.seed > MOST_SEEDS - args.num_rollout:
        raise ValueError(f"--seed: got {args.seed}, expected 0 to {MOST_SEEDS - args.num_rollout}")
    overrides = read_overrides(rest, "robot", "eval_real.py")
    model = read_model_name(args.model_name_or_path)
    # The rate is applied to the contract here, wherever the policy is.
    checkpoint = dataclasses.replace(from_flags(args), fps=None)
    if isinstance(model, ServerAddress) and checkpoint != CheckpointOptions():
        raise ValueError(
            f"{', '.join(checkpoint.given())}: got with -m {model}, expected none: they are for "
            "the server there, which loads the checkpoint"
        )
    return Evaluation(
        args=args,
        overrides=overrides,
        model=model,
        checkpoint=checkpoint,
        task=load_config(TaskConfig, args.task, kind="task"),
        robot=make_robot(args.robot_config, overrides),
        options=connection_options.from_flags(args),
    )


def make_run_config(
    evaluation: Evaluation, address: str, contract: PolicyContract, found: dict[str, str]
) -> RunConfig:
    """What the processes are told.

    Args:
        address: Of the policy server.
        found: Overrides by which the robot's companion is found.

    Raises:
        Incompatible: Nobody says how fast the policy is to be played.
        ValueError: A strategy that cannot be.
    """
    args = evaluation.args
    played = contract.at_rate(args.fps)
    if played.assumes_rate:
        raise Incompatible(
            "--fps: got none, and the policy's checkpoint does not say its rate "
            f"({1 / played.dt_s:g} Hz would be assumed); expected the rate that its demonstrations "
            "were recorded at"
        )
    execution = choose_execution(
        played, args.action_manager, args.manager_coef, args.n_action_steps
    )
    rate = 1 / played.dt_s
    longest_s = played.chunk_size * played.dt_s + 1.0
    return RunConfig(
        robot=args.robot_config,
        overrides={**evaluation.overrides, **found},
        contract_json=contract.to_json(),
        address=address,
        options=evaluation.options.keywords(),
        language=evaluation.task.language,
        action_manager=execution.action_manager,
        manager_coef=execution.manager_coef,
        n_action_steps=execution.n_action_steps,
        execution_source=execution.source,
        fps=args.fps,
        publish_rate=_given(args.publish_rate, rate),
        sensing_rate=_given(args.sensing_rate, rate),
        max_timesteps=_given(args.max_timesteps, evaluation.task.max_timesteps),
        near=args.near,
        same_joints=args.same_joints,
        fault_after_s=args.fault_after_s,
        max_chunk_age_s=_given(args.max_chunk_age_s, longest_s),
        max_sensing_age_s=args.max_sensing_age_s,
        connect_timeout_s=args.connect_timeout_s,
        priority=args.priority,
        video_fps=args.video_fps,
        trace=str(args.trace or ""),
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
        level=evaluation.args.log_level, format="%(levelname)s %(name)s: %(message)s"
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    failure, status = "", 0
    try:
        with trace.tracing(evaluation.args.trace, "eval_real"):
            _evaluate(evaluation)
    except TraceError as error:
        return _fail(error)
    except SessionOver as over:
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
        kept = f"; {len(evaluation.rollouts)} of {evaluation.args.num_rollout} rollouts were kept"
        print(f"error: {failure}{kept}", file=sys.stderr)
    return status


def _evaluate(evaluation: Evaluation) -> None:
    args, robot = evaluation.args, evaluation.robot
    with contextlib.ExitStack() as stack:
        found = dict(stack.enter_context(robot.companion()))
        address = evaluation.start_server()
        with PolicyClient(address, **evaluation.options.keywords()) as client:
            contract = client.contract
        config = make_run_config(evaluation, address, contract, found)
        check_compatible(config, robot)
        evaluation.config = config
        for line in strategy_options.say_before(config.contract, config.execution):
            _tell(line)
        supervisor = stack.enter_context(Supervisor(config, robot, _tell))
        _tell(supervisor.realtime)
        evaluation.setting = supervisor.setting
        operator = stack.enter_context(OperatorConsole(_tell))
        session = RolloutSession(
            supervisor,
            RobotLimits.of(robot),
            operator,
            folder=evaluation.path.with_suffix(""),
            unattended=args.yes,
            new_server=evaluation.new_server,
            tell=_tell,
        )
        for rollout in session.run(range(args.seed, args.seed + args.num_rollout)):
            evaluation.rollouts.append(rollout)
            write_result(evaluation.path, *_result(evaluation, ""))


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _fail(error: BaseException) -> int:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


def _result(evaluation: Evaluation, failure: str) -> tuple[dict[str, Any], list[Episode]]:
    rollouts = evaluation.rollouts
    played = [rollout.episode for rollout in rollouts]
    judged = [rollout.episode for rollout in rollouts if rollout.judged]
    everything = summarize(played)
    result = summarize(judged) | {name: everything[name] for name in ("episodes", "timing")}
    details = {rollout.episode.seed: rollout.details() for rollout in rollouts}
    result["episodes"] = [entry | details[entry["seed"]] for entry in result["episodes"]]
    args, config, setting = evaluation.args, evaluation.config, evaluation.setting
    if config is not None:
        contract = config.contract
        result |= {
            "action_manager": strategy_options.record(contract, config.execution),
            "assumed": [str(assumption) for assumption in contract.assumed],
            "transport": setting["transport"],
            "transport_reason": setting["transport_reason"],
            "pictures": setting["pictures"],
            "deterministic": False,
            "policy": policy_record(contract, PolicyInfo(**setting["info"])),
        }
    result |= {
        "requested": args.num_rollout,
        "skipped": len(rollouts) - len(judged),
        "failure": failure,
        "mode": "real",
        "clamped_ticks": sum(rollout.clamped_ticks for rollout in rollouts),
        "faults": [fault for rollout in rollouts for fault in rollout.faults],
        "robot": {"name": evaluation.robot.name, "config": args.robot_config},
        "task": dataclasses.asdict(evaluation.task),
        "versions": versions(),
    }
    return json.loads(json.dumps(result, default=str)), played


def _conclude(evaluation: Evaluation, failure: str) -> int:
    """Say what came of it, written or not; the exit status where that failed."""
    result, played = _result(evaluation, failure)
    print(report(result))
    try:
        write_result(evaluation.path, result, played)
    except OSError as error:
        print(f"error: the result was not written: {error}", file=sys.stderr)
        return LOST
    print(f"  clamped {result['clamped_ticks']}, faults {len(result['faults'])}")
    print(f"result       {evaluation.path}")
    print(f"recordings   {evaluation.path.with_suffix('')}/")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
