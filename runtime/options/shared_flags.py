"""Annotated types of the flags ``--log_level``, ``--trace`` and ``--fps``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from policies.flag_builder import Flag
from policies.number_ranges import RATE_HZ, Choice

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

LogLevel = Annotated[str, Choice(LOG_LEVELS), Flag("lowest level that is logged")]
TraceFile = Annotated[Path | None, Flag("write a trace for ui.perfetto.dev", metavar="FILE")]
Fps = Annotated[
    float | None,
    RATE_HZ,
    Flag("policy ticks per second", default="the checkpoint's, else 50"),
]
