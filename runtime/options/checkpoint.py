"""How to load a checkpoint: the same options for the server, the evaluation, and YAML."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, fields
from typing import Annotated

from policies.act.config import LARGEST
from policies.act.engine import ENGINES, PRECISIONS
from policies.command_line import Number
from policies.number_ranges import PIXELS, RATE_HZ, THREADS, Range, check_ranges
from policies.types import Policy

CHUNK = Range(1, LARGEST["chunk_size"])
HEADS = Range(1, LARGEST["n_heads"])
ALL = -1
"""The ancestor's way of saying "all" of a chunk."""


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """What ``load_policy`` may be told; None leaves it to the checkpoint or the machine.

    Attributes:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        engine: One of ``ENGINES``.
        precision: One of ``PRECISIONS``.
        dataset_id: Whose normalizers; the checkpoint's first.
        chunk_size: Truncate every chunk to this many actions.
        threads: CPU threads of one inference; all cores but one where None.
        camera_names, n_heads: For the original ACT's layout, which does not say.
        image_hw: (height, width) of the pictures, for layouts that do not say.
        fps: Policy ticks per second, for checkpoints that do not say.
    """

    device: str = "auto"
    engine: str = "auto"
    precision: str = "auto"
    dataset_id: str | None = None
    chunk_size: Annotated[int, CHUNK] | None = None
    threads: Annotated[int, THREADS] | None = None
    camera_names: tuple[str, ...] | None = None
    n_heads: Annotated[int, HEADS] | None = None
    image_hw: tuple[Annotated[int, PIXELS], Annotated[int, PIXELS]] | None = None
    fps: Annotated[float, RATE_HZ] | None = None

    def __post_init__(self) -> None:
        for name, choices in (("engine", ENGINES), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {choices}")
        check_ranges(self)

    def load(self, model: str) -> Policy:
        """The policy at ``model``; raises as ``load_policy``."""
        from policies.checkpoint.load import load_policy

        return load_policy(
            model,
            device=self.device,
            engine=self.engine,
            precision=self.precision,
            dataset_id=self.dataset_id,
            chunk_size=self.chunk_size,
            threads=self.threads,
            camera_names=self.camera_names,
            n_heads=self.n_heads,
            image_hw=self.image_hw,
            fps=self.fps,
        )

    def given(self) -> list[str]:
        """The flags of what is not left to the checkpoint or the machine."""
        changed = (f.name for f in fields(self) if getattr(self, f.name) != f.default)
        return [f"--{name}" for name in changed]

    def flags(self) -> list[str]:
        """The command line that says the same."""
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name}", *(str(v) for v in values)]
        return words


def add_flags(cli: argparse.ArgumentParser) -> None:
    """Add a flag for every option; absent ones are None."""
    group = cli.add_argument_group("a checkpoint's options")
    add = group.add_argument
    add("--device", help="auto, cpu, cuda or cuda:N (auto)")
    add("--engine", choices=ENGINES, help="what runs the network (auto: the fastest there is)")
    add(
        "--precision",
        choices=PRECISIONS,
        help="(auto: bf16 where the hardware has it and errs little, else fp32)",
    )
    add("--dataset_id", help="whose normalizers to use (the checkpoint's first)")
    chunk = Number(int, dataclasses.replace(CHUNK, also=(ALL,)))
    add("-ck", "--chunk_size", type=chunk, help="truncate chunks to this many actions (-1: all)")
    add(
        "--threads",
        type=Number(int, THREADS),
        help="CPU threads of one inference (all cores but one)",
    )
    add("--camera_names", nargs="+", help="in the network's order; for the original ACT's layout")
    heads, pixels = Number(int, HEADS), Number(int, PIXELS)
    add("--n_heads", type=heads, help="attention heads; for the original ACT's layout")
    add("--image_hw", nargs=2, type=pixels, metavar=("H", "W"), help="size of the pictures")
    add(
        "--fps",
        type=Number(float, RATE_HZ),
        help="policy ticks per second, where the checkpoint does not say (its own, else 50)",
    )


def from_flags(
    args: argparse.Namespace, default: CheckpointOptions | None = None
) -> CheckpointOptions:
    """The options that the flags of ``add_flags`` say; the others from ``default``.

    Raises:
        ValueError: A value that cannot be.
    """
    default = default or CheckpointOptions()
    values = {field.name: getattr(default, field.name) for field in fields(default)}
    for name in values:
        given = getattr(args, name)
        if given is None or given == "":  # the ancestor's default for --dataset_id
            continue
        values[name] = tuple(given) if isinstance(given, list) else given
    if values["chunk_size"] == ALL:
        values["chunk_size"] = None
    return CheckpointOptions(**values)
