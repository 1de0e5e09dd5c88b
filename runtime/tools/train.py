"""Train a policy on demonstrations: ``metronome train --config act_sim_transfer_cube``.

Interrupt it as you like: started again with the same configuration, it goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from envs.errors import EnvError
from envs.factory import load_env_config
from policies.command_line import CommandLine
from policies.errors import PolicyError
from policies.flags import Flag, add_flags, from_flags
from policies.number_ranges import Choice
from policies.standard_streams import run_command
from policies.yaml_config import InvalidConfig, load_config
from runtime.errors import RuntimeFault
from runtime.eval_sim.run_config import EvalSimConfig
from runtime.eval_sim.runner import run
from runtime.evaluation.episode_result import Episode
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.overrides import read_overrides

if TYPE_CHECKING:
    from policies.training.trainer import TrainConfig

SELECTION_SEED = 900_000
"""Evaluations on the way use the seeds from here on, so that none of a final evaluation is used
for choosing anything."""
EXPORTS = ("lerobot",)


@dataclass(frozen=True, slots=True)
class TrainCommand:
    """The training's command line, beside what ``--KEY VALUE`` overrides of a ``TrainConfig``."""

    config: Annotated[str, Flag("name under configs/train, or a YAML path")]
    export: Annotated[
        str | None, Choice(EXPORTS), Flag("write this layout too, beside the policy")
    ] = None
    no_evaluate: Annotated[bool, Flag("never run the environment")] = False


def success_rate(folder: Path, config: TrainConfig) -> float:
    """Of the checkpoint in ``folder``, over ``config.evaluate_episodes`` in lockstep."""
    evaluation = EvalSimConfig(
        model_name_or_path=str(folder),
        # The same threads as the training, for torch has one number for the whole process.
        checkpoint=CheckpointOptions(device="cpu", precision="fp32", threads=_threads(config)),
        env=load_env_config("aloha", {"task": config.task}),
        seed=SELECTION_SEED,
        num_rollout=config.evaluate_episodes,
        videos=0,
    )
    episodes = [report for report in run(evaluation) if isinstance(report, Episode)]
    return sum(episode.success for episode in episodes) / len(episodes)


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this run; a run that died has let go of it.

    Raises:
        InvalidConfig: Another run is writing there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidConfig(f"output: {folder}: another run is writing there") from error
        yield


def parser() -> argparse.ArgumentParser:
    cli = CommandLine(
        prog="python -m runtime.tools.train",
        description="Train a policy on demonstrations.",
        epilog="--KEY VALUE overrides KEY of the configuration, e.g. --steps 100.",
    )
    add_flags(cli, TrainCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # Threads that wait by spinning take each other's cores when something else runs as well.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch
    from tqdm import tqdm

    from policies.checkpoint.save import save_lerobot
    from policies.training.dataset import Demonstrations
    from policies.training.trainer import Progress, TrainConfig, Trainer

    args, rest = parser().parse_known_args(argv)
    command = from_flags(TrainCommand, args)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        overrides = read_overrides(rest, "", "python -m runtime.tools.train")
        config = load_config(TrainConfig, command.config, kind="train", overrides=overrides)
        torch.set_num_threads(_threads(config))
        with tqdm(desc="reading", unit="episode") as bar:

            def reading(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            data = Demonstrations(
                config.demonstrations,
                config.cameras,
                chunk_size=config.chunk_size,
                with_objects=config.aux_weight > 0,
                limit=config.max_episodes,
                progress=reading,
            )
        evaluate = None
        if not command.no_evaluate and config.evaluate_episodes > 0:

            def evaluate(folder: Path) -> float:
                return success_rate(folder, config)

        with contextlib.ExitStack() as stack:
            stack.enter_context(sole_writer(config.output))
            trainer = Trainer(config, data, evaluate)
            bar = stack.enter_context(
                tqdm(total=config.steps, initial=trainer.step, desc=config.task, unit="step")
            )

            def report(progress: Progress) -> None:
                bar.update()
                bar.set_postfix_str(f"l1 {progress.l1:.4f} aux {progress.aux:.4f}")
                if progress.success is not None:
                    bar.write(f"step {progress.step}: success {progress.success:.0%}")

            trainer.run(report)
        if command.export == "lerobot":
            save_lerobot(config.output / "lerobot", trainer.saved(), stored_as=config.stored_as)
    except KeyboardInterrupt:
        print("interrupted; start again to go on from the last save", file=sys.stderr)
        return 130
    except (InvalidConfig, EnvError, PolicyError, RuntimeFault, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rate = trainer.step * config.batch_size / trainer.seconds if trainer.seconds else 0.0
    print(f"{config.output / 'policy'}: {trainer.step} steps, {rate:.1f} samples/s")
    return 0


def _threads(config: TrainConfig) -> int:
    return os.cpu_count() or 1 if config.threads is None else config.threads


if __name__ == "__main__":
    sys.exit(run_command(main))
