"""Ranges of numbers: what is in them, how they are said, and how flags and keys are checked."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.command_line import CommandLine, Number
from policies.number_ranges import Range, check_ranges
from policies.yaml_config import InvalidConfig, parse_config

FROM_1, ABOVE_0, OR_ALL = Range(1, 8), Range(0, 2.5, above=True), Range(1, 8, also=(-1, math.inf))


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "said"),
    [
        (FROM_1, (1, 8, 2.5), (0, 9, -1, math.nan, math.inf, -math.inf, True, "3"), "1 to 8"),
        (ABOVE_0, (1e-300, 2.5), (0, 2.6, math.nan), "more than 0, at most 2.5"),
        (OR_ALL, (-1, 1, math.inf), (0, -2, -math.inf), "1 to 8, or -1, or inf"),
        (Range(0.0001, 1e6), (0.0001,), (0,), "0.0001 to 1000000"),
    ],
)
def test_a_range_says_what_is_in_it(
    bounds: Range, inside: tuple[float, ...], outside: tuple[object, ...], said: str
) -> None:
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)
    assert str(bounds) == said


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(-10, 10), st.floats(0, 10))
def test_nothing_outside_of_its_bounds_is_in_a_range(
    value: float, low: float, width: float
) -> None:
    bounds = Range(low, low + width)
    assert (value in bounds) == (math.isfinite(value) and low <= value <= low + width)


@dataclass(frozen=True)
class Inner:
    sizes: tuple[Annotated[int, FROM_1], ...] | str = ()


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, FROM_1] = 1
    share: Annotated[float, ABOVE_0] | None = None
    pair: tuple[Annotated[int, FROM_1], Annotated[float, ABOVE_0]] = (1, 1.0)
    inner: Inner = Inner()

    def __post_init__(self) -> None:
        check_ranges(self)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"count": 0}, "here.yaml: count: got 0, expected 1 to 8"),
        ({"count": 2.0}, "here.yaml: count: got 2.0 (float), expected int"),
        ({"share": math.inf}, "here.yaml: share: got inf, expected more than 0, at most 2.5"),
        ({"share": math.nan}, "here.yaml: share: got nan (float), expected float"),
        ({"pair": [1, 3]}, "here.yaml: pair[1]: got 3.0, expected more than 0, at most 2.5"),
        ({"inner": {"sizes": [1, 9]}}, "here.yaml: inner.sizes[1]: got 9, expected 1 to 8"),
        (
            {"inner": {"sizes": 3}},
            "here.yaml: inner.sizes: got 3 (int), expected a list or str",
        ),
    ],
)
def test_a_key_out_of_range_is_named_by_file_and_path(raw: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_config(Outer, raw, source="here.yaml")
    assert str(caught.value) == message


def test_keys_within_their_ranges_are_taken() -> None:
    raw = {"count": 8, "share": 0.5, "pair": [2, 2], "inner": {"sizes": [1, 8]}}
    assert parse_config(Outer, raw, source="here.yaml") == Outer(8, 0.5, (2, 2.0), Inner((1, 8)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": 9}, r"count: got 9, expected 1 to 8"),
        ({"share": 0.0}, r"share: got 0.0, expected more than 0"),
        ({"pair": (1, math.nan)}, r"pair\[1\]: got nan, expected more than 0"),
    ],
)
def test_what_is_made_without_yaml_is_checked_as_well(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Outer(**fields)  # type: ignore[arg-type]
    assert Outer(share=None).share is None


def cli() -> argparse.ArgumentParser:
    made = CommandLine(prog="it")
    made.add_argument("-c", "--count", type=Number(int, FROM_1))
    made.add_argument("--share", type=Number(float, ABOVE_0))
    made.add_argument("--kind", choices=("a", "b"))
    return made


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--count", "0"], "error: -c/--count: got 0, expected 1 to 8"),
        (["--count", "1.5"], "error: -c/--count: got '1.5', expected a whole number, 1 to 8"),
        (["--share", "x"], "error: --share: got 'x', expected a number, more than 0, at most 2.5"),
        (["--share", "nan"], "error: --share: got nan, expected more than 0, at most 2.5"),
        (["--kind", "c"], "error: --kind: invalid choice: 'c' (choose from 'a', 'b')"),
        (["--nothing"], "error: unrecognized arguments: --nothing"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        cli().parse_args(argv)
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines() == [message]
    assert cli().parse_args(["-c", "8", "--share", "2.5"]).count == 8
