"""Command lines made from configurations: a flag is described once, by its field.

A configuration is a frozen dataclass. The annotation of a field says what its flag is::

    port: Annotated[int, PORT_OR_ANY, Flag("0 takes a free one", "-p")] = 5000

``add_flags`` makes the parser's argument of it: name, type, range, choices, and the help with the
default. ``from_flags`` makes the configuration of what the command line says. A field that is a
configuration itself brings its own flags; a field without a ``Flag`` has none.

What is wrong is said in one line: which flag, got, expected; the exit status is 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from policies.command_line import Number
from policies.number_ranges import Choice, Range

T = TypeVar("T")


class Flag:
    """What a field's annotation says beside its type: how it is given on a command line.

    Args:
        help: What it is, without its default, which is added.
        also: Other names, e.g. ``"-p"``.
        name: In place of the field's own name.
        default: The default in words, where the field's value alone does not tell.
        metavar: The value's name in the help.
        const: The value of the flag without one.
        positional: Given by its place, not by name.
        read: From the command line's text to the value, where the type alone does not tell.
        hidden: Absent from the help: for programs, not for people.
    """

    def __init__(
        self,
        help: str = "",
        *also: str,
        name: str = "",
        default: str = "",
        metavar: str | tuple[str, ...] | None = None,
        const: Any = None,
        positional: bool = False,
        read: Callable[[str], Any] | None = None,
        hidden: bool = False,
    ) -> None:
        self.help, self.also, self.name, self.default = help, also, name, default
        self.metavar, self.const, self.positional, self.read = metavar, const, positional, read
        self.hidden = hidden


@dataclass(frozen=True, slots=True)
class Group:
    """Beside the type of a field that is a configuration: about its flags.

    Attributes:
        title: Above them in the help.
        without: Its fields that are no flags of this command.
    """

    title: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FlagField:
    """A field that is a flag.

    Attributes:
        owner: The configuration that has it.
        field: Of ``owner``.
        kind: Its type; without None, where it may be that.
        limit: What it may be, beyond its type.
        flag: How it is given.
        title: Of the group that it belongs to.
    """

    owner: type[Any]
    field: dataclasses.Field[Any]
    kind: Any
    limit: Range | Choice | None
    flag: Flag
    title: str

    @property
    def name(self) -> str:
        """On the command line, and in what the parser returns."""
        return self.flag.name or self.field.name

    @property
    def names(self) -> tuple[str, ...]:
        """As they are typed, its own last."""
        return (self.name,) if self.flag.positional else (*self.flag.also, f"--{self.name}")

    @property
    def help(self) -> str:
        """With the default in parentheses; ``argparse.SUPPRESS`` where it is hidden."""
        if self.flag.hidden:
            return argparse.SUPPRESS
        value = self.field.default
        if value in (dataclasses.MISSING, None, "", ()) or value is False:
            shown = ""
        else:
            shown = f"{value:g}" if isinstance(value, int | float) else str(value)
        default = ": ".join(part for part in (shown, self.flag.default) if part)
        return f"{self.flag.help} ({default})".lstrip() if default else self.flag.help


def flags_of(cls: type[Any], group: Group = Group("")) -> Iterator[FlagField]:
    """The flags of ``cls`` and of the configurations in it, in the order of its fields."""
    for field, kind, marks in _fields(cls, group):
        flag, limit = _find_annotation(Flag, marks), _find_annotation((Range, Choice), marks)
        if flag is not None:
            yield FlagField(cls, field, kind, limit, flag, group.title)
        elif _is_configuration(kind):
            yield from flags_of(kind, _find_annotation(Group, marks) or Group(""))


def _fields(
    cls: type[Any], group: Group
) -> Iterator[tuple[dataclasses.Field[Any], Any, list[Any]]]:
    """Each field, its type and what is marked beside it."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if field.name not in group.without:
            yield field, *_unwrap(hints[field.name])


def _is_configuration(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and isinstance(kind, type)


def _find_annotation(kind: Any, marks: list[Any]) -> Any:
    return next((mark for mark in marks if isinstance(mark, kind)), None)


def _unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """The type itself, without None, and the marks beside it."""
    marks: list[Any] = []
    while True:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            hint, marks = arguments[0], [*marks, *arguments[1:]]
        elif origin in (typing.Union, types.UnionType) and type(None) in arguments:
            rest = [one for one in arguments if one is not type(None)]
            if len(rest) > 1:
                return hint, marks
            (hint,) = rest
        else:
            return hint, marks


def add_flags(cli: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Add every flag of ``cls``; of those that are not given, nothing is in the namespace."""
    groups: dict[str, Any] = {"": cli}
    for one in flags_of(cls):
        if one.title not in groups:
            groups[one.title] = cli.add_argument_group(one.title)
        keywords: dict[str, Any] = {
            "help": one.help or None,
            **_argument(one),
        }
        if one.flag.metavar is not None:
            keywords["metavar"] = one.flag.metavar
        if not one.flag.positional:
            keywords |= {"dest": one.name, "default": argparse.SUPPRESS}
            keywords["required"] = _is_required(one.field)
        groups[one.title].add_argument(*one.names, **keywords)


def _argument(one: FlagField) -> dict[str, Any]:
    """What ``add_argument`` is told of a value's type."""
    kind, flag = one.kind, one.flag
    if kind is bool:
        return {"action": "store_true"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        item, marks = _unwrap(arguments[0])
        limit = _find_annotation(Range, marks)
        count = "+" if arguments[1:] == (Ellipsis,) else len(arguments)
        return {"nargs": count, "type": flag.read or _reader(one, item, limit)}
    if origin in (dict, Mapping):
        return {"nargs": "+"}
    optional = {} if flag.const is None else {"nargs": "?", "const": flag.const}
    choices = arguments if origin is Literal else getattr(one.limit, "choices", None)
    if choices is not None:
        return {"choices": choices, **optional}
    return {"type": flag.read or _reader(one, kind, one.limit), **optional}


def _reader(one: FlagField, kind: Any, limit: Range | Choice | None) -> Any:
    if kind in (int, float):
        if not isinstance(limit, Range):
            raise TypeError(f"{one.owner.__name__}.{one.field.name}: a number without a range")
        return Number(kind, limit)
    if kind in (str, Path):
        return kind
    raise TypeError(f"{one.owner.__name__}.{one.field.name}: no flag can be a {kind}")


def from_flags(cls: type[T], given: argparse.Namespace, base: T | None = None, **known: Any) -> T:
    """``cls`` as the flags say.

    Args:
        given: What a parser with the flags of ``cls`` returned.
        base: What holds where nothing is given. None: the defaults.
        known: Fields that are known already, by name; flags win inside of configurations.

    Raises:
        ValueError: Flags that do not go together.
    """
    return typing.cast("T", _from_flags(cls, vars(given), base, known, Group("")))


def _from_flags(
    cls: type[Any], given: Mapping[str, Any], base: Any, known: Mapping[str, Any], group: Group
) -> Any:
    values = dict(known)
    own = {one.field.name: one for one in flags_of(cls, group) if one.owner is cls}
    for field, kind, marks in _fields(cls, group):
        if (one := own.get(field.name)) is not None:
            # An empty text says nothing of a field that may be None.
            if one.name in given and not (given[one.name] == "" and field.default is None):
                values[field.name] = _value(one, given[one.name])
        elif _is_configuration(kind):
            inner = _find_annotation(Group, marks) or Group("")
            before = values.get(field.name, getattr(base, field.name, None))
            if any(flag.name in given for flag in flags_of(kind, inner)):
                values[field.name] = _from_flags(kind, given, before, {}, inner)
    return cls(**values) if base is None else dataclasses.replace(base, **values)


def _value(one: FlagField, given: Any) -> Any:
    if not isinstance(given, list):
        return given
    if typing.get_origin(one.kind) is tuple:
        return tuple(given)
    pairs: dict[str, str] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--{one.name}: got {text!r}, expected {one.flag.metavar}")
        if name in pairs:
            raise ValueError(f"--{one.name}: got {name!r} twice, expected it once")
        pairs[name] = value
    return pairs


def flag_value(cls: type[Any], field: str, given: argparse.Namespace) -> Any:
    """What the command line says of one field, else its default."""
    one = next(flag for flag in flags_of(cls) if flag.owner is cls and flag.field.name == field)
    return getattr(given, one.name, one.field.default)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
