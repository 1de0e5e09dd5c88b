"""``metronome train``: train a policy on demonstrations.

An interrupted training continues from its last save when it is started again with the same
configuration.
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
from policies.flag_builder import Flag, add_flags, from_flags
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
    from policies.training.episode_source import EpisodeSource
    from policies.training.trainer import TrainConfig

SELECTION_SEED = 900_000
"""First seed of the evaluations during training; a final evaluation must not share seeds with
those that chose the checkpoint."""
EXPORTS = ("lerobot",)
LEROBOT = "lerobot:"
"""Before the folder of a LeRobotDataset."""


@dataclass(frozen=True, slots=True)
class TrainCommand:
    """The flags of the command; ``--KEY VALUE`` further overrides keys of ``TrainConfig``."""

    config: Annotated[str, Flag("name under configs/train, or a YAML file")]
    data: Annotated[
        str | None,
        Flag(
            "lerobot:DIR, a LeRobotDataset v3, or a folder of HDF5 files, instead of the "
            "configuration's demonstrations",
            metavar="[lerobot:]DIR",
        ),
    ] = None
    export: Annotated[str | None, Choice(EXPORTS), Flag("also write the policy in this layout")] = (
        None
    )
    no_evaluate: Annotated[bool, Flag("do not evaluate during training")] = False


def success_rate(folder: Path, config: TrainConfig) -> float:
    """Return the success rate of a checkpoint over ``config.evaluate_episodes`` in lockstep.

    Args:
        folder: The checkpoint's.
        config: The training's configuration.

    Raises:
        RuntimeFault: The evaluation failed.
    """
    evaluation = EvalSimConfig(
        model_name_or_path=str(folder),
        # The training's number of threads: torch has one number for the whole process.
        checkpoint=CheckpointOptions(device="cpu", precision="fp32", threads=_threads(config)),
        env=load_env_config("aloha", {"task": config.task}),
        seed=SELECTION_SEED,
        num_rollout=config.evaluate_episodes,
        videos=0,
    )
    episodes = [report for report in run(evaluation) if isinstance(report, Episode)]
    return sum(episode.success for episode in episodes) / len(episodes)


def episode_source(config: TrainConfig) -> EpisodeSource:
    """Return the episodes of ``config.demonstrations``.

    Raises:
        DatasetError, CheckpointError: They cannot be read.
        InvalidConfig: A package is missing.
    """
    from policies.training.hdf5_episodes import Hdf5Episodes
    from runtime.datasets.training_episodes import LeRobotEpisodes

    folder = str(config.demonstrations)
    if not folder.startswith(LEROBOT):
        return Hdf5Episodes(config.demonstrations)
    root = Path(folder.removeprefix(LEROBOT)).expanduser()
    try:
        return LeRobotEpisodes(root, config.cameras, config.dataset_columns)
    except ImportError as error:
        raise InvalidConfig(f"{folder}: {error}; pip install '.[dataset]' brings it") from error


@contextlib.contextmanager
def exclusive_output(folder: Path) -> Iterator[None]:
    """Lock ``folder`` for this run; the kernel frees the lock if the process dies.

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
    """Return the parser, with one argument per flag of ``TrainCommand``."""
    cli = CommandLine(
        prog="metronome train",
        description="Train a policy on demonstrations.",
        epilog="--KEY VALUE overrides KEY of the configuration, e.g. --steps 100.",
    )
    add_flags(cli, TrainCommand)
    return cli


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training; return the exit status: 0, 2 bad input, 130 interrupted."""
    # OpenMP threads that wait by spinning would take the cores of other processes.
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
        overrides = read_overrides(rest, "", "metronome train")
        if command.data is not None:
            if "demonstrations" in overrides:
                raise InvalidConfig("got --data and --demonstrations, expected one of them")
            overrides["demonstrations"] = command.data
        config = load_config(TrainConfig, command.config, kind="train", overrides=overrides)
        source = episode_source(config)
        config = config.at_rate_of(source)
        torch.set_num_threads(_threads(config))
        with tqdm(desc="reading", unit="episode") as bar:

            def reading(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            data = Demonstrations(
                source,
                config.cameras,
                chunk_size=config.chunk_size,
                with_objects=config.aux_weight > 0,
                limit=config.max_episodes,
                max_images_gb=config.max_images_gb,
                progress=reading,
            )
        evaluate = None
        if not command.no_evaluate and config.evaluate_episodes > 0:

            def evaluate(folder: Path) -> float:
                return success_rate(folder, config)

        with contextlib.ExitStack() as stack:
            stack.enter_context(exclusive_output(config.output))
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
        print("interrupted; start it again to continue from the last save", file=sys.stderr)
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
