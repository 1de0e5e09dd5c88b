"""Trains ACT on demonstrations. Runs can be resumed and are reproducible from their seed.

Every random number of step n comes from (seed, n), so an interrupted run continues exactly as if it
had not been interrupted.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from policies.act.config import LARGEST, ActConfig
from policies.checkpoint.extras import Extras
from policies.checkpoint.save import Saved, StoredAs, save_ilstudio
from policies.errors import CheckpointError
from policies.number_ranges import (
    COUNT,
    COUNT_OR_NONE,
    FRACTION,
    OFFSET,
    PERIOD_S,
    POSITIVE,
    SEED,
    THREADS,
    TICKS,
    Range,
    check_ranges,
)
from policies.training.cvae import ActCvae, checkpoint_tensors
from policies.training.dataset import Demonstrations
from policies.training.episode_source import DatasetColumns, EpisodeSource
from policies.types import CameraContract, Rendering

logger = logging.getLogger(__name__)

STATE_FILE = "state.pt"
"""Training state, in the run's folder."""
LOSS_FILE = "loss.csv"
"""Losses of every step."""
CURVE_FILE = "loss.png"
"""Plot of the losses."""
POLICY_FOLDER = "policy"
"""The exported checkpoint, in the run's folder."""
LOSS_COLUMNS = ("step", "l1", "kl", "aux", "grad_norm", "success")


_SIZES = {name: Range(1, largest) for name, largest in LARGEST.items()}
STEPS = Range(1, 1_000_000_000)
"""Valid numbers of steps."""
WEIGHT = Range(0, 1e6)
"""Valid weights of a loss."""
DEFAULT_DT_S = 0.02
"""Seconds per tick of demonstrations without a rate: ACT's HDF5."""
SAME_RATE = 2e-3
"""Largest relative difference of two periods that count as equal: 0.0333 s is 30 fps."""


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The options in ``configs/train/*.yaml``.

    Attributes:
        task: Data set id of the checkpoint, and the task to evaluate.
        demonstrations: Folder with the episodes as HDF5 files, or ``lerobot:`` and the folder of a
            LeRobotDataset v3; ``max_episodes`` of them are used.
        dataset_columns: The columns of a LeRobotDataset that are learned from.
        max_images_gb: Most memory for the images at the model's size, in 10**9 bytes; None for
            what is free.
        output: Folder for the run; its ``policy`` folder is the checkpoint.
        cameras: Crop and size of each camera's images, all of one model size.
        rendering: How the demonstrations were rendered.
        dt_s: Seconds per tick; None for the data's own, or ``DEFAULT_DT_S`` where they have none.
        n_action_steps: Actions per chunk that the checkpoint recommends to execute; None for all.
        width, n_heads, feedforward, n_encoder_layers, n_style_layers: See ``ActConfig``.
        kl_weight: Weight of the style encoder's divergence; None trains without a style encoder.
        aux_weight: Weight of the auxiliary task, the objects' positions; 0 for none.
        warmup_steps: Steps of linear warm-up of the learning rate.
        clip_norm: Largest norm of the gradient.
        ema: Decay per step of the moving average of the weights, which is evaluated and exported.
        shift_px, brightness: Augmentation, see ``Demonstrations.batch``.
        threads: CPU threads; None for all cores.
        save_every, evaluate_every: In steps.
        evaluate_episodes: Episodes of each evaluation.
        stored_as: Number format of the exported weights; see ``StoredAs``.

    Raises:
        ValueError: Cameras of several sizes, or a number out of range.
    """

    task: str
    demonstrations: Path
    output: Path
    cameras: tuple[CameraContract, ...]
    rendering: Rendering | None = None
    dataset_columns: DatasetColumns = field(default_factory=DatasetColumns)
    max_episodes: Annotated[int, COUNT] | None = None
    max_images_gb: Annotated[float, POSITIVE] | None = None
    dt_s: Annotated[float, PERIOD_S] | None = None
    chunk_size: Annotated[int, _SIZES["chunk_size"]] = 100
    n_action_steps: Annotated[int, TICKS] | None = None
    width: Annotated[int, _SIZES["width"]] = 256
    n_heads: Annotated[int, _SIZES["n_heads"]] = 8
    feedforward: Annotated[int, _SIZES["feedforward"]] = 1024
    n_encoder_layers: Annotated[int, _SIZES["n_encoder_layers"]] = 4
    n_style_layers: Annotated[int, _SIZES["n_style_layers"]] = 2
    dropout: Annotated[float, FRACTION] = 0.1
    kl_weight: Annotated[float, WEIGHT] | None = 10.0
    aux_weight: Annotated[float, WEIGHT] = 0.2
    steps: Annotated[int, STEPS] = 1000
    batch_size: Annotated[int, COUNT] = 32
    learning_rate: Annotated[float, POSITIVE] = 3e-4
    weight_decay: Annotated[float, WEIGHT] = 1e-4
    warmup_steps: Annotated[int, COUNT_OR_NONE] = 50
    clip_norm: Annotated[float, POSITIVE] = 10.0
    ema: Annotated[float, FRACTION] = 0.998
    shift_px: Annotated[int, OFFSET] = 5
    brightness: Annotated[float, FRACTION] = 0.15
    seed: Annotated[int, SEED] = 0
    threads: Annotated[int, THREADS] | None = None
    save_every: Annotated[int, STEPS] = 100
    evaluate_every: Annotated[int, STEPS] = 500
    evaluate_episodes: Annotated[int, COUNT_OR_NONE] = 10
    stored_as: StoredAs = "bf16"

    def __post_init__(self) -> None:
        if not self.cameras or len({c.model_hw for c in self.cameras}) != 1:
            raise ValueError("cameras: expected at least one, all of one model_hw")
        names = [camera.name for camera in self.cameras]
        if unknown := sorted(set(self.dataset_columns.cameras) - set(names)):
            raise ValueError(f"dataset_columns.cameras: got {unknown}, expected some of {names}")
        check_ranges(self)

    def at_rate_of(self, source: EpisodeSource) -> TrainConfig:
        """Return this configuration with the rate of ``source``.

        Raises:
            ValueError: ``dt_s`` is given, and the source has another.
        """
        if source.dt_s is None:
            return dataclasses.replace(self, dt_s=self.dt_s or DEFAULT_DT_S)
        if self.dt_s is None:
            return dataclasses.replace(self, dt_s=source.dt_s)
        if abs(self.dt_s / source.dt_s - 1) > SAME_RATE:
            raise ValueError(
                f"dt_s: got {self.dt_s:g}, expected {source.dt_s:g} ({1 / source.dt_s:g} fps), the "
                f"rate of {source.name}; leave dt_s out to take it"
            )
        return self

    def act(self, state_dim: int, action_dim: int) -> ActConfig:
        """Return the network's sizes for demonstrations of these dimensions."""
        return ActConfig(
            state_dim=state_dim,
            action_dim=action_dim,
            chunk_size=self.chunk_size,
            n_cameras=len(self.cameras),
            image_hw=self.cameras[0].model_hw,
            width=self.width,
            n_heads=self.n_heads,
            feedforward=self.feedforward,
            n_encoder_layers=self.n_encoder_layers,
            n_style_layers=self.n_style_layers,
            dropout=self.dropout,
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """Result of a step: its number (from 1), losses, and the success rate if it was evaluated."""

    step: int
    l1: float
    kl: float
    aux: float
    grad_norm: float
    success: float | None = None


@dataclass(slots=True, eq=False)
class Trainer:
    """One training run.

    Args:
        config: What to train and how.
        data: The demonstrations.
        evaluate: Success rate, 0 to 1, of the checkpoint in a folder; None for no evaluations.

    Attributes:
        history: Progress of every step.
        step: Completed steps.
        seconds: Training time in s, without evaluations.

    Raises:
        CheckpointError: The run's saved state is not one of this configuration.
    """

    config: TrainConfig
    data: Demonstrations
    evaluate: Callable[[Path], float] | None = None
    history: list[Progress] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    _net: ActCvae = field(init=False)
    _average: dict[str, Tensor] = field(init=False)
    _optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self._net = ActCvae(
            self.act_config,
            objects_dim=self.data.objects.shape[1] if self.config.aux_weight else 0,
            style=self.config.kl_weight is not None,
        )
        self._net.model.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._average = {k: v.clone() for k, v in self._net.state_dict().items()}
        self._optimizer = torch.optim.AdamW(
            self._net.parameters(),
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        if (self.config.output / STATE_FILE).is_file():
            self._resume()

    @property
    def act_config(self) -> ActConfig:
        """The network's sizes."""
        return self.config.act(self.data.state.shape[1], self.data.actions.shape[1])

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> None:
        """Train to the last step, saving and evaluating in between; call ``report`` after each
        step.

        Raises:
            CheckpointError: The loss is not finite.
        """
        while self.step < self.config.steps:
            start = time.monotonic()
            progress = self._train_step()
            self.seconds += time.monotonic() - start
            last = self.step == self.config.steps
            evaluated = self.evaluate is not None and (
                last or self.step % self.config.evaluate_every == 0
            )
            if last or evaluated or self.step % self.config.save_every == 0:
                self.export(self.config.output / POLICY_FOLDER)
            if evaluated and self.evaluate is not None:
                success = self.evaluate(self.config.output / POLICY_FOLDER)
                progress = dataclasses.replace(progress, success=success)
            self.history.append(progress)
            if last or evaluated or self.step % self.config.save_every == 0:
                self._save()
            report(progress)

    def export(self, folder: Path) -> None:
        """Write the averaged weights in ILStudio's layout."""
        save_ilstudio(folder, self.saved(), stored_as=self.config.stored_as)

    def saved(self) -> Saved:
        """Return the averaged weights in the form that the writers of all layouts take."""
        config = self.config
        return Saved(
            config=self.act_config,
            tensors=checkpoint_tensors(self._average),
            stats=self.data.stats,
            dataset_id=config.task,
            extras=Extras(
                cameras=config.cameras,
                rendering=config.rendering,
                dt_s=config.dt_s,
                n_action_steps=config.n_action_steps,
                training={
                    "episodes": self.data.episodes,
                    "steps": self.step,
                    "batch_size": config.batch_size,
                    "seed": config.seed,
                    "minutes": round(self.seconds / 60, 1),
                    "torch": str(torch.__version__),
                },
            ),
        )

    def _train_step(self) -> Progress:
        config = self.config
        torch.manual_seed(hash((config.seed, self.step)) % 2**63)
        rng = np.random.default_rng((config.seed, self.step))
        batch = self.data.batch(
            rng, config.batch_size, shift_px=config.shift_px, brightness=config.brightness
        )
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self._net.train()
        losses = self._net(
            *(
                torch.from_numpy(np.ascontiguousarray(array))
                for array in (
                    batch.images,
                    batch.state,
                    batch.actions,
                    batch.padded,
                    batch.objects,
                )
            )
        )
        total = losses.l1 + (config.kl_weight or 0.0) * losses.kl + config.aux_weight * losses.aux
        if not torch.isfinite(total):
            raise CheckpointError(
                f"step {self.step}: the loss is {total.item()}; try a lower learning_rate"
            )
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._net.parameters(), config.clip_norm)
        self._optimizer.step()
        self._update_average()
        self.step += 1
        return Progress(
            self.step, losses.l1.item(), losses.kl.item(), losses.aux.item(), norm.item()
        )

    def _learning_rate(self) -> float:
        """Return the rate: a linear warm-up, then half a cosine down to a fiftieth."""
        config = self.config
        if self.step < config.warmup_steps:
            return config.learning_rate * (self.step + 1) / config.warmup_steps
        span = max(1, config.steps - config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * (self.step - config.warmup_steps) / span))
        return config.learning_rate * (0.02 + 0.98 * cosine)

    def _update_average(self) -> None:
        # Use a smaller decay in the first steps, or the average would keep the initial weights.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self._net.state_dict().items():
                if value.is_floating_point():
                    self._average[key].lerp_(value, 1 - decay)
                else:
                    self._average[key].copy_(value)

    def _save(self) -> None:
        folder = self.config.output
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "net": self._net.state_dict(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "history": [list(dataclasses.astuple(p)) for p in self.history],
        }
        partial = folder / f"{STATE_FILE}.partial"
        torch.save(state, partial)
        partial.rename(folder / STATE_FILE)
        with (folder / LOSS_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(LOSS_COLUMNS)
            writer.writerows(dataclasses.astuple(p) for p in self.history)
        draw_curve(self.history, folder / CURVE_FILE)

    def _resume(self) -> None:
        path = self.config.output / STATE_FILE
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            self._net.load_state_dict(state["net"])
            self._average = state["average"]
            self._optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.history = [Progress(*row) for row in state["history"]]
        except (RuntimeError, KeyError, ValueError, TypeError, OSError) as error:
            raise CheckpointError(
                f"{path}: not a state of this configuration; move it away to start over: {error}"
            ) from error
        logger.info("%s: resuming at step %d", path, self.step)


def draw_curve(history: list[Progress], path: Path) -> None:
    """Plot the losses over the steps, and the success rate where it was evaluated, to ``path``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), dpi=110)
    steps = [p.step for p in history]
    axis.plot(steps, [p.l1 for p in history], label="L1 (standard deviations)", linewidth=0.8)
    if any(p.aux for p in history):
        axis.plot(steps, [p.aux for p in history], label="object position", linewidth=0.8)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    rated = [(p.step, p.success) for p in history if p.success is not None]
    if rated:
        right = axis.twinx()
        right.plot(*zip(*rated, strict=True), "ko--", label="success rate")
        right.set_ylim(-0.02, 1.02)
        right.set_ylabel("success rate")
    axis.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
