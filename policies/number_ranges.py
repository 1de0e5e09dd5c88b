"""Ranges and choices of configuration values, defined once for flags and YAML keys.

A field's annotation has it: ``port: Annotated[int, PORT]`` or
``transport: Annotated[str, Choice(("shm", "zmq"))]``. ``policies.yaml_config`` checks it for YAML,
``policies.command_line`` for flags, and ``check_ranges`` for configurations made by code. If a
field may be None, None is valid in every range.
"""

from __future__ import annotations

import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers from ``low`` to ``high``, both included; neither NaN nor infinity.

    Attributes:
        above: Whether ``low`` itself is excluded.
        also: Further valid numbers with a meaning of their own, such as -1 for "all" or ``inf``.
    """

    low: float
    high: float
    above: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if value in self.also:
            return True
        lowest = self.low < value if self.above else self.low <= value
        return lowest and value <= self.high

    def __str__(self) -> str:
        start = f"more than {self.low:g}, at most" if self.above else f"{_show(self.low)} to"
        others = "".join(f", or {_show(number)}" for number in self.also)
        return f"{start} {_show(self.high)}{others}"

    def require(self, name: str, value: float) -> None:
        """Raise ``ValueError``, naming ``name``, if ``value`` is not in the range."""
        if value not in self:
            raise ValueError(f"{name}: got {value}, expected {self}")


@dataclass(frozen=True, slots=True)
class Choice:
    """A set of valid words."""

    choices: tuple[str, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.choices

    def __str__(self) -> str:
        return f"one of {self.choices}"

    def require(self, name: str, value: object) -> None:
        """Raise ``ValueError``, naming ``name``, if ``value`` is not one of the words."""
        if value not in self:
            raise ValueError(f"{name}: got {value!r}, expected {self}")


def _show(number: float) -> str:
    return str(int(number)) if math.isfinite(number) and number == int(number) else f"{number:g}"


COUNT = Range(1, 1_000_000)
COUNT_OR_NONE = Range(0, 1_000_000)
TICKS = Range(1, 1_000_000)
RATE_HZ = Range(0.01, 10_000)
RATE_HZ_OR_ANY = Range(0, 10_000)
PERIOD_S = Range(0.0001, 100)
"""1 / ``RATE_HZ``."""
DURATION_S = Range(0, 1_000_000, above=True)
DURATION_S_OR_NONE = Range(0, 1_000_000)
PORT_OR_ANY = Range(0, 65_535)
PIXELS = Range(1, 8192)
OFFSET = Range(0, 8191)
MSAA = Range(0, 64)
SEED = Range(0, 2**32 - 1)
"""The seeds that numpy's legacy generator accepts."""
THREADS = Range(1, 1024)
PROCESSES = Range(1, 1024)
RETRIES = Range(0, 1000)
LATENCY_MS = Range(0, 60_000)
FRACTION = Range(0, 1)
FINITE = Range(-1e9, 1e9)
POSITIVE = Range(0, 1e9, above=True)
POSITIVE_OR_ANY = Range(0, 1e9, above=True, also=(math.inf,))


def check_ranges(config: Any) -> None:
    """Check every field of a dataclass instance against its annotation; for ``__post_init__``.

    Raises:
        ValueError: A number is out of range or a word is not a choice; names field, got, expected.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        _check(name, getattr(config, name), hint)


def _check(name: str, value: Any, hint: Any) -> None:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        for mark in arguments[1:]:
            if isinstance(mark, Range | Choice) and value is not None:
                mark.require(name, value)
        _check(name, value, arguments[0])
    elif origin in (typing.Union, types.UnionType):
        for one in arguments:
            if value is not None and one is not type(None):
                _check(name, value, one)
    elif origin is tuple and isinstance(value, tuple):
        hints = arguments[:1] * len(value) if arguments[1:] == (Ellipsis,) else arguments
        for i, (one, item) in enumerate(zip(hints, value, strict=False)):
            _check(f"{name}[{i}]", item, one)
