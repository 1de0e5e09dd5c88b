"""How to load a checkpoint: the same options for the server, the evaluation, and YAML."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from policies.act.config import LARGEST
from policies.act.engine import ENGINES, PRECISIONS
from policies.flags import Flag
from policies.number_ranges import THREADS, Choice, Range, check_ranges
from policies.types import Pixels, Policy
from runtime.options.common import Fps

ALL = -1
"""ILStudio's way of saying "all" of a chunk."""
CHUNK = Range(1, LARGEST["chunk_size"], also=(ALL,))
HEADS = Range(1, LARGEST["n_heads"])


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """What ``load_policy`` may be told; None leaves it to the checkpoint or the machine.

    ``camera_names``, ``n_heads`` and ``image_hw`` are for layouts that do not say.
    """

    device: Annotated[str, Flag("auto, cpu, cuda or cuda:N")] = "auto"
    engine: Annotated[
        str, Choice(ENGINES), Flag("what runs the network", default="the fastest there is")
    ] = "auto"
    precision: Annotated[
        str,
        Choice(PRECISIONS),
        Flag(default="bf16 where the hardware has it and errs little, else fp32"),
    ] = "auto"
    dataset_id: Annotated[
        str | None, Flag("whose normalizers to use", default="the checkpoint's first")
    ] = None
    chunk_size: Annotated[
        int | None, CHUNK, Flag("truncate chunks to this many actions", "-ck", default="-1: all")
    ] = None
    threads: Annotated[
        int | None,
        THREADS,
        Flag("CPU threads of one inference", default="all cores but one"),
    ] = None
    camera_names: Annotated[
        tuple[str, ...] | None, Flag("in the network's order; for the original ACT's layout")
    ] = None
    n_heads: Annotated[
        int | None, HEADS, Flag("attention heads; for the original ACT's layout")
    ] = None
    image_hw: Annotated[
        tuple[Pixels, Pixels] | None, Flag("size of the pictures", metavar=("H", "W"))
    ] = None
    fps: Fps = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.chunk_size == ALL:
            object.__setattr__(self, "chunk_size", None)

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
