"""How to load a checkpoint: options that the server and the evaluations share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from policies.act.config import LARGEST
from policies.act.engine import DEFAULT_GRAPH_OPTIONS, ENGINES, GRAPH_OPTIONS, PRECISIONS
from policies.flag_builder import Flag
from policies.number_ranges import THREADS, Choice, Range, check_ranges
from policies.types import Pixels, Policy
from runtime.options.shared_flags import Fps

ALL = -1
"""``--chunk_size`` for the whole chunk, as in ILStudio."""
CHUNK = Range(1, LARGEST["chunk_size"], also=(ALL,))
HEADS = Range(1, LARGEST["n_heads"])


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """The options of ``load_policy``; None means the value of the checkpoint or the machine.

    ``camera_names``, ``n_heads`` and ``image_hw`` are for checkpoints that do not contain them.

    Raises:
        ValueError: A value is out of range.
    """

    device: Annotated[str, Flag("device of the network: auto, cpu, cuda or cuda:N")] = "auto"
    engine: Annotated[
        str, Choice(ENGINES), Flag("inference engine", default="the fastest available")
    ] = "auto"
    precision: Annotated[
        str,
        Choice(PRECISIONS),
        Flag(
            "number format of the network",
            default="bf16 where the hardware supports it and its error is small, else fp32",
        ),
    ] = "auto"
    dataset_id: Annotated[
        str | None, Flag("data set whose normalizers are used", default="the checkpoint's first")
    ] = None
    chunk_size: Annotated[
        int | None, CHUNK, Flag("actions of a chunk to use", "-ck", default="-1: all")
    ] = None
    threads: Annotated[
        int | None,
        THREADS,
        Flag("CPU threads of one inference", default="all cores but one"),
    ] = None
    graph_options: Annotated[
        tuple[str, ...] | None,
        Flag(
            f"steps of the cuda-graph engine, of {', '.join(GRAPH_OPTIONS)}",
            default=" ".join(DEFAULT_GRAPH_OPTIONS),
        ),
    ] = None
    camera_names: Annotated[
        tuple[str, ...] | None,
        Flag("cameras in the network's order; for checkpoints of the original ACT"),
    ] = None
    n_heads: Annotated[
        int | None, HEADS, Flag("attention heads; for checkpoints of the original ACT")
    ] = None
    image_hw: Annotated[
        tuple[Pixels, Pixels] | None,
        Flag("image height and width in pixels, if the checkpoint has none", metavar=("H", "W")),
    ] = None
    fps: Fps = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.chunk_size == ALL:
            object.__setattr__(self, "chunk_size", None)

    def load(self, model: str) -> Policy:
        """Load the policy that ``model`` names. Raises ``PolicyError``, as ``load_policy``."""
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
            graph_options=self.graph_options,
        )

    def given_flags(self) -> list[str]:
        """Return the names of the flags whose values differ from their defaults."""
        changed = (f.name for f in fields(self) if getattr(self, f.name) != f.default)
        return [f"--{name}" for name in changed]

    def to_argv(self) -> list[str]:
        """Return command-line arguments that give the same options."""
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                values = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name}", *(str(v) for v in values)]
        return words
