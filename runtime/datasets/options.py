"""The flags that record a dataset, shared by the evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from policies.flag_builder import Flag


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetOptions:
    """Whether and how finished episodes are added to a dataset.

    Attributes:
        dataset: The dataset's folder, new or with the same features; None to record none.
    """

    dataset: Annotated[
        Path | None, Flag("also record the episodes, as a LeRobotDataset", metavar="DIR")
    ] = None
    dataset_lossless: Annotated[
        bool, Flag("with --dataset: pictures as PNG, bit for bit, not as video")
    ] = False
