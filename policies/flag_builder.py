"""Builds command lines from configurations: each flag is defined once, by a field's annotation.

A configuration is a frozen dataclass. A field's annotation defines its flag::

    port: Annotated[int, PORT_OR_ANY, Flag("TCP port; 0 chooses a free one", "-p")] = 5000

``add_flags`` adds the argument to a parser: name, type, range, choices, and the help text with the
default. ``from_flags`` builds the configuration from the parsed arguments. If a field is itself a
configuration, its flags are included; a field without a ``Flag`` has none.

An error is one line: flag, got, expected; the exit status is 2.
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
    """The part of a field's annotation that defines its command-line flag.

    Args:
        help: The help text without the default, which is appended.
        also: Further names, e.g. ``"-p"``.
        name: The flag's name, if it differs from the field's.
        default: The default in words, if the field's value does not explain it.
        metavar: The value's name in the help.
        const: The value if the flag is given without one.
        positional: Whether the argument is positional.
        read: Converts the argument's text to the value, if the field's type does not suffice.
        hidden: Whether the flag is left out of the help; for flags that only programs use.
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
    """The part of the annotation of a nested configuration that concerns its flags.

    Attributes:
        title: The heading of its flags in the help.
        without: Names of its fields that are not flags of this command.
    """

    title: str
    without: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FlagField:
    """A field with its flag.

    Attributes:
        owner: The configuration class that has the field.
        field: The field.
        kind: Its type, without ``None`` if it is optional.
        limit: Its range or choices, if it has them.
        flag: Its flag.
        title: The heading of its group in the help.
    """

    owner: type[Any]
    field: dataclasses.Field[Any]
    kind: Any
    limit: Range | Choice | None
    flag: Flag
    title: str

    @property
    def name(self) -> str:
        """The flag's name without dashes, also its name in the parser's namespace."""
        return self.flag.name or self.field.name

    @property
    def names(self) -> tuple[str, ...]:
        """All names as typed on the command line, its own name last."""
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
    """Yield the flags of ``cls`` and of its nested configurations, in the order of the fields."""
    for field, kind, marks in _fields(cls, group):
        flag, limit = _find_annotation(Flag, marks), _find_annotation((Range, Choice), marks)
        if flag is not None:
            yield FlagField(cls, field, kind, limit, flag, group.title)
        elif _is_configuration(kind):
            yield from flags_of(kind, _find_annotation(Group, marks) or Group(""))


def _fields(
    cls: type[Any], group: Group
) -> Iterator[tuple[dataclasses.Field[Any], Any, list[Any]]]:
    """Yield each field with its type and its other annotations."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if field.name not in group.without:
            yield field, *_unwrap(hints[field.name])


def _is_configuration(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) and isinstance(kind, type)


def _find_annotation(kind: Any, marks: list[Any]) -> Any:
    return next((mark for mark in marks if isinstance(mark, kind)), None)


def _unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """Return the type, without ``None``, and the annotations beside it."""
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
    """Add every flag of ``cls`` to ``cli``; a flag that is not given is absent in the namespace.

    Raises:
        TypeError: A field's type cannot be a flag's, or a number has no range.
    """
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
    """Return the keyword arguments of ``add_argument`` that follow from the field's type."""
    kind, flag = one.kind, one.flag
    if kind is bool:
        return {"action": "store_true"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        item, marks = _unwrap(arguments[0])
        limit = _find_annotation(Range, marks)
        count = "+" if arguments[1:] == (Ellipsis,) else len(arguments)
        # A flag that takes any number of values may also be repeated.
        action = {"action": "extend"} if count == "+" else {}
        return {"nargs": count, "type": flag.read or _reader(one, item, limit), **action}
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
    """Build a configuration from parsed flags.

    Args:
        cls: The configuration class.
        given: The namespace of a parser with the flags of ``cls``.
        base: Provides the values that are not given. None: the defaults.
        known: Values of fields, by name; in a nested configuration, flags override them.

    Raises:
        ValueError: Two flags exclude each other, or a value is invalid.
    """
    return typing.cast("T", _from_flags(cls, vars(given), base, known, Group("")))


def _from_flags(
    cls: type[Any], given: Mapping[str, Any], base: Any, known: Mapping[str, Any], group: Group
) -> Any:
    values = dict(known)
    own = {one.field.name: one for one in flags_of(cls, group) if one.owner is cls}
    for field, kind, marks in _fields(cls, group):
        if (one := own.get(field.name)) is not None:
            # An empty text leaves a field at its default of None.
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
    """Return the value of one field's flag, or the field's default if it is not given."""
    one = next(flag for flag in flags_of(cls) if flag.owner is cls and flag.field.name == field)
    return getattr(given, one.name, one.field.default)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return (field.default, field.default_factory) == (dataclasses.MISSING,) * 2
