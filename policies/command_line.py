"""Command lines that say in one line what is wrong: got, expected, and which flag."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NoReturn

from policies.number_ranges import Range


class CommandLine(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line and exit status 2, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")


@dataclass(frozen=True, slots=True)
class Number:
    """A flag's ``type=``: a number in a range.

    Attributes:
        kind: ``int`` or ``float``.
        range: What it may be.
    """

    kind: type[int] | type[float]
    range: Range

    def __call__(self, text: str) -> float:
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
