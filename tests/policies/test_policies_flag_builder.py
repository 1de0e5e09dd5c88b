"""Flags that are described by a configuration's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from policies.command_line import CommandLine
from policies.flag_builder import Flag, Group, add_flags, flag_value, flags_of, from_flags
from policies.number_ranges import Choice, Range, check_ranges

COUNT = Range(0, 9)


@dataclass(frozen=True)
class Inner:
    size: Annotated[tuple[Annotated[int, COUNT], Annotated[int, COUNT]] | None, Flag()] = None
    names: Annotated[tuple[str, ...], Flag("names")] = ()
    hz: Annotated[float, Range(0, 100), Flag("how often", name="max_hz", default="any")] = 0.0
    hidden: int = 3


@dataclass(frozen=True)
class Example:
    model: Annotated[str, Flag("what is served", "-m", "--checkpoint")]
    count: Annotated[int | None, COUNT, Flag("how many", default="all")] = None
    kind: Annotated[str, Choice(("a", "b")), Flag("which")] = "a"
    mode: Annotated[Literal["fast", "slow"], Flag("how")] = "fast"
    loud: Annotated[bool, Flag("say more")] = False
    out: Annotated[Path | None, Flag("where to")] = None
    whose: Annotated[str | None, Flag("of whom")] = None
    quality: Annotated[int | None, COUNT, Flag("as JPEG", const=7, metavar="Q")] = None
    pairs: Annotated[Mapping[str, str], Flag("which is which", metavar="A=B")] = field(
        default_factory=dict
    )
    upper: Annotated[str, Flag("in capitals", read=str.upper)] = ""
    many: Annotated[tuple[str, ...], Flag("any number of them", name="one")] = ()
    inner: Annotated[Inner, Group("inner options", without=("names",))] = Inner()

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.loud and self.count == 0:
            raise ValueError("--loud with --count 0: nothing to say")


def parser() -> CommandLine:
    cli = CommandLine(prog="it")
    add_flags(cli, Example)
    return cli


def read(*words: str) -> Example:
    return from_flags(Example, parser().parse_args(["-m", "x", *words]))


def test_what_is_not_given_is_the_fields_default() -> None:
    assert read() == Example("x")


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("--checkpoint", "y"), {"model": "y"}),
        (("--count", "0"), {"count": 0}),
        (("--kind", "b", "--mode", "slow", "--loud"), {"kind": "b", "mode": "slow", "loud": True}),
        (("--out", "a/b"), {"out": Path("a/b")}),
        (("--whose", "me"), {"whose": "me"}),
        (("--whose", ""), {}),
        (("--quality",), {"quality": 7}),
        (("--quality", "3"), {"quality": 3}),
        (("--pairs", "a=b", "c.d=e"), {"pairs": {"a": "b", "c.d": "e"}}),
        (("--upper", "shout"), {"upper": "SHOUT"}),
        (("--one", "a", "--one", "b", "c"), {"many": ("a", "b", "c")}),
        (("--size", "1", "2", "--max_hz", "4"), {"inner": Inner(size=(1, 2), hz=4.0)}),
    ],
)
def test_a_flag_sets_its_field(words: tuple[str, ...], changed: dict[str, object]) -> None:
    assert read(*words) == dataclasses.replace(Example("x"), **changed)  # type: ignore[arg-type]


def test_what_a_file_says_holds_where_no_flag_is_given() -> None:
    file = Example("file", count=2, inner=Inner(size=(5, 6), hidden=4))
    given = parser().parse_args(["-m", "x", "--max_hz", "1"])
    assert from_flags(Example, given, file) == Example(
        "x", count=2, inner=Inner(size=(5, 6), hz=1.0, hidden=4)
    )
    known = from_flags(Example, given, inner=Inner(size=(5, 6)))
    assert known == Example("x", inner=Inner(size=(5, 6), hz=1.0))
    assert flag_value(Example, "count", given) is None
    assert flag_value(Example, "model", given) == "x"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--count", "10"), "error: --count: got 10, expected 0 to 9"),
        (("--size", "1", "x"), "error: --size: got 'x', expected a whole number, 0 to 9"),
        (("--kind", "c"), "error: --kind: invalid choice: 'c' (choose from 'a', 'b')"),
        (("--quality", "x"), "error: --quality: got 'x', expected a whole number, 0 to 9"),
        (("--names", "a"), "error: unrecognized arguments: --names a"),
        (("--hidden", "1"), "error: unrecognized arguments: --hidden 1"),
    ],
)
def test_what_a_flag_cannot_be_is_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        read(*words)
    assert left.value.code == 2
    assert capsys.readouterr().err == f"{message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pairs", "a"), "--pairs: got 'a', expected A=B"),
        (("--pairs", "a=b", "a=c"), "--pairs: got 'a' twice, expected it once"),
        (("--loud", "--count", "0"), "--loud with --count 0: nothing to say"),
    ],
)
def test_flags_that_exclude_each_other_are_an_error(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(*words)


def test_a_missing_required_flag_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([])
    said = capsys.readouterr().err
    assert said == "error: the following arguments are required: -m/--checkpoint/--model\n"


def test_help_ends_with_the_default() -> None:
    assert {flag.name: flag.help for flag in flags_of(Example)} == {
        "model": "what is served",
        "count": "how many (all)",
        "kind": "which (a)",
        "mode": "how (fast)",
        "loud": "say more",
        "out": "where to",
        "whose": "of whom",
        "quality": "as JPEG",
        "pairs": "which is which",
        "upper": "in capitals",
        "one": "any number of them",
        "size": "",
        "max_hz": "how often (0: any)",
    }
    shown = parser().format_help()
    assert "inner options:" in shown
    assert "-m MODEL, --checkpoint MODEL, --model MODEL" in shown


@dataclass(frozen=True)
class Unbounded:
    count: Annotated[int, Flag("how many")] = 1


@dataclass(frozen=True)
class Shapeless:
    thing: Annotated[object, Flag("anything")] = None


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Unbounded, r"Unbounded\.count: a number without a range"),
        (Shapeless, r"Shapeless\.thing: no flag can be a <class 'object'>"),
    ],
)
def test_a_field_that_can_be_no_flag_is_refused(cls: type, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        add_flags(CommandLine(), cls)
