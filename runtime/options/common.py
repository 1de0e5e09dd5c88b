"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from policies.flags import Flag
from policies.number_ranges import RATE_HZ, Choice

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

LogLevel = Annotated[str, Choice(LOG_LEVELS), Flag("what is logged")]
TraceFile = Annotated[Path | None, Flag("what happened when, for ui.perfetto.dev", metavar="FILE")]
Fps = Annotated[
    float | None,
    RATE_HZ,
    Flag("policy ticks per second, where the checkpoint does not say", default="its own, else 50"),
]
