"""The flag of the live view, shared by the evaluations."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from policies.flag_builder import Flag

VIEWER, FILE_SUFFIX, URL_PREFIXES = (
    "viewer",
    ".rrd",
    ("rerun://", "rerun+http://", "rerun+https://"),
)
EXTRA = ("rerun", "simplejpeg")
"""The modules of the extra ``[rerun]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveViewOptions:
    """Where an evaluation is shown while it runs.

    Attributes:
        rerun: ``VIEWER`` for the viewer on this host, a file ``NAME.rrd``, or a viewer's URL; None
            for no live view.

    Raises:
        ValueError: ``rerun`` is something else.
    """

    rerun: Annotated[
        str | None,
        Flag(
            "show the evaluation in Rerun's viewer, opened if none runs; or write FILE.rrd, or use "
            "the viewer at URL",
            metavar="FILE.rrd|URL",
            const=VIEWER,
        ),
    ] = None

    def __post_init__(self) -> None:
        target = self.rerun
        if target is None or target == VIEWER or target.startswith(URL_PREFIXES):
            return
        if Path(target).suffix != FILE_SUFFIX:
            raise ValueError(
                f"--rerun: got {target!r}, expected no value, FILE{FILE_SUFFIX} or a viewer's URL, "
                "such as rerun+http://HOST:9876/proxy"
            )

    @property
    def file(self) -> Path | None:
        """The file that is written; None without one."""
        target = self.rerun
        return Path(target) if target is not None and target.endswith(FILE_SUFFIX) else None

    def check(self) -> None:
        """Check, before anything starts, that the view can be made.

        Raises:
            ValueError: A package is not installed, or the file cannot be written.
        """
        if self.rerun is None:
            return
        missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(
                f"--rerun: got no module {missing[0]!r}, expected it: pip install '.[rerun]'"
            )
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.open("ab").close()
            except OSError as error:
                raise ValueError(f"--rerun: {self.file} cannot be written: {error}") from error
