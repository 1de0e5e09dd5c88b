"""An argument parser with one-line errors, and the type of its numeric arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NoReturn

from policies.number_ranges import Range


class CommandLine(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print ``message``, which names the flag, and exit with status 2."""
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")


@dataclass(frozen=True, slots=True)
class Number:
    """A ``type=`` for ``add_argument``: a number in a range.

    Attributes:
        kind: ``int`` or ``float``.
        range: The valid numbers.
    """

    kind: type[int] | type[float]
    range: Range

    def __call__(self, text: str) -> float:
        """Convert ``text``. Raises ``ArgumentTypeError``: not a number, or out of range."""
        try:
            value = self.kind(text)
        except ValueError as error:
            noun = "a whole number" if self.kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"got {text!r}, expected {noun}, {self.range}"
            ) from error
        if value not in self.range:
            raise argparse.ArgumentTypeError(f"got {text}, expected {self.range}")
        return value
