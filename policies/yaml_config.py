"""Reads frozen dataclasses from YAML, with overrides from a command line.

A configuration is a dataclass; its annotations are the schema. Supported: ``bool``, ``int``,
``float``, ``str``, ``Path``, ``Literal``, ``X | None`` and other unions, ``tuple``, ``dict`` and
``Mapping`` with string keys, nested dataclasses, ``Any``. An unknown key and a value of the wrong
type are errors that name the file and the key path. A number's range and a word's choices are part
of the annotation: ``Annotated[int, Range(1, 8)]`` (``policies.number_ranges``).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml

from policies.errors import PolicyError
from policies.number_ranges import Choice, Range

T = TypeVar("T")

INSTALLED_CONFIGS = Path(__file__).resolve().parent.parent / "configs"
"""``configs/`` beside the packages, both in a checkout and in site-packages."""


class InvalidConfig(Exception):
    """A configuration that cannot be used; the message names the file and the key path."""


@dataclass(frozen=True, slots=True)
class _Override:
    """A value from the command line: YAML text, or the string itself for a ``str`` field."""

    text: str


class _Loader(yaml.SafeLoader):
    """A YAML loader that rejects duplicate keys, which YAML would silently replace."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise InvalidConfig(f"key {key!r} is given twice in the mapping at line {line}")
        return super().construct_mapping(node, deep=deep)


_NOT_YAML = (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError, InvalidConfig)
"""Errors of reading YAML: a bad date is a ``ValueError``, deep nesting a ``RecursionError``."""


def _problem(error: Exception) -> str:
    """Return one line of text: the problem and its line and column."""
    if isinstance(error, RecursionError):
        return "got too many levels of nesting"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    text = ": ".join(part for part in (getattr(error, "context", None), problem) if part)
    return f"{' '.join(text.split())} (line {mark.line + 1}, column {mark.column + 1})"


def load_config(
    cls: type[T], name: str, *, kind: str, overrides: Mapping[str, str] | None = None
) -> T:
    """Read the configuration ``name`` as a ``cls``.

    Args:
        cls: A dataclass.
        name: A path to a YAML file, or the name of one (without ``.yaml``) in ``./configs/<kind>``
            or among the installed ones, tried in this order.
        kind: The folder under ``configs``, e.g. ``"env"``.
        overrides: Dotted key to YAML text, e.g. ``{"camera_map.primary": "angle"}``.

    Raises:
        InvalidConfig: No such configuration, invalid YAML, an unknown or missing key, a value of
            the wrong type or out of range.
    """
    path = find_config(name, kind=kind)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except _NOT_YAML as error:
        raise InvalidConfig(f"{path}: {_problem(error)}") from error
    return parse_config(cls, {} if raw is None else raw, source=str(path), overrides=overrides)


def parse_config(
    cls: type[T], raw: object, *, source: str, overrides: Mapping[str, str] | None = None
) -> T:
    """Convert parsed YAML to a ``cls``, as ``load_config``; ``source`` names it in errors."""
    if not isinstance(raw, dict):
        raise InvalidConfig(f"{source}: got {_show(raw)}, expected a mapping of keys to values")
    merged = dict(raw)
    for key, text in (overrides or {}).items():
        _put(merged, key, text, source)
    return typing.cast("T", _convert(cls, merged, source, ""))


def find_config(name: str, *, kind: str) -> Path:
    """Return the YAML file that ``name`` means; see ``load_config``.

    Raises:
        InvalidConfig: No such file; the message lists the folders and the names in them.
    """
    try:
        as_path = Path(name).expanduser()
        if as_path.is_file():
            return as_path
    except (OSError, RuntimeError) as error:  # the name is too long, or ``~user`` does not exist
        raise InvalidConfig(f"{kind} configuration {name!r:.80}: {error}") from error
    folders = (Path("configs") / kind, INSTALLED_CONFIGS / kind)
    if as_path.name == name:
        for folder in folders:
            for candidate in (folder / f"{name}.yaml", folder / name):
                if candidate.is_file():
                    return candidate
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    raise InvalidConfig(
        f"{kind} configuration {name!r}: neither a file nor a name among {known} "
        f"(looked in {' and '.join(str(folder) for folder in folders)})"
    )


def as_plain(value: Any) -> Any:
    """Convert a configuration to data for JSON and YAML; ``parse_config`` restores an equal one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _put(raw: dict[str, Any], dotted: str, text: str, source: str) -> None:
    """Set the key ``dotted`` in ``raw``; mappings on its path are copied."""
    *parents, last = dotted.split(".")
    for key in parents:
        inner = raw.get(key)
        if isinstance(inner, _Override):
            inner = _parse(inner, source, dotted)
        raw[key] = dict(inner) if isinstance(inner, dict) else {}
        raw = raw[key]
    raw[last] = _Override(text)


def _parse(override: _Override, source: str, path: str) -> Any:
    try:
        return yaml.load(override.text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except _NOT_YAML as error:
        raise InvalidConfig(f"{source}: {path}: {_problem(error)}") from error


def _resolve(value: Any, source: str, path: str) -> Any:
    """Return ``value`` with its overrides parsed; they are only inside mappings (``_put``)."""
    if isinstance(value, _Override):
        return _parse(value, source, path)
    if isinstance(value, dict):
        return {k: _resolve(v, source, _join(path, str(k))) for k, v in value.items()}
    return value


def _convert(hint: Any, value: Any, source: str, path: str) -> Any:
    """Convert ``value`` to the type ``hint``, or raise ``InvalidConfig`` at ``source: path``."""
    if isinstance(value, _Override):
        if hint is str:
            return value.text
        value = _parse(value, source, path)
    if hint is Any:
        return _resolve(value, source, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _convert_dataclass(hint, value, source, path)
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _convert_annotated(typing.get_args(hint), value, source, path)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, source, path)
    if origin is Literal:
        choices = typing.get_args(hint)
        # ``True == 1``: a literal must match in type as well.
        if any(value == choice and type(value) is type(choice) for choice in choices):
            return value
        raise _wrong(value, f"one of {list(choices)}", source, path)
    if origin is tuple or hint is tuple:
        return _convert_tuple(typing.get_args(hint), value, source, path)
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, dict):
            raise _wrong(value, "a mapping", source, path)
        item_hint = typing.get_args(hint)[1]
        _check_keys(value, source, path)
        return {k: _convert(item_hint, v, source, _join(path, k)) for k, v in value.items()}
    return _convert_scalar(hint, value, source, path)


def _convert_annotated(hints: tuple[Any, ...], value: Any, source: str, path: str) -> Any:
    converted = _convert(hints[0], value, source, path)
    for mark in hints[1:]:
        if isinstance(mark, Range | Choice) and converted is not None:
            try:
                mark.require(path, converted)
            except ValueError as error:
                raise InvalidConfig(f"{source}: {error}") from error
    return converted


def _convert_dataclass(cls: type[Any], value: Any, source: str, path: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(value, "a mapping of keys to values", source, path)
    _check_keys(value, source, path)
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InvalidConfig(
                f"{source}: {_join(path, key)}: unknown key, expected one of {list(fields)}{hint}"
            )
    for name, field in fields.items():
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if name not in value and not optional:
            raise InvalidConfig(f"{source}: {_join(path, name)}: missing")
    given = {k: _convert(hints[k], v, source, _join(path, k)) for k, v in value.items()}
    try:
        return cls(**given)
    except (ValueError, PolicyError) as error:
        raise InvalidConfig(f"{source}: {f'{path}: ' if path else ''}{error}") from error


def _convert_union(hints: tuple[Any, ...], value: Any, source: str, path: str) -> Any:
    if value is None and type(None) in hints:
        return None
    errors = []
    for hint in (h for h in hints if h is not type(None)):
        try:
            return _convert(hint, value, source, path)
        except InvalidConfig as error:
            errors.append(error)
    # An error inside a list or mapping says more than the list of the possible types.
    inside = (f"{source}: {path}[", f"{source}: {path}.")
    specific = [error for error in errors if str(error).startswith(inside)] or errors
    if len(specific) == 1:
        raise specific[0]
    raise _wrong(value, " or ".join(_name(hint) for hint in hints), source, path)


def _convert_tuple(hints: tuple[Any, ...], value: Any, source: str, path: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong(value, "a list", source, path)
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    elif not hints:
        hints = (Any,) * len(value)
    if len(hints) != len(value):
        raise _wrong(value, f"a list of {len(hints)}", source, path)
    pairs = zip(hints, value, strict=True)
    return tuple(_convert(h, v, source, f"{path}[{i}]") for i, (h, v) in enumerate(pairs))


def _convert_scalar(hint: Any, value: Any, source: str, path: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float and not isinstance(value, bool):
        # YAML 1.1 reads 3e-4 as a string; here it is a number.
        try:
            number = float(value) if isinstance(value, int | float | str) else math.nan
        except (ValueError, OverflowError):
            number = math.nan
        if not math.isnan(number):
            return number
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str):
        return Path(value)
    raise _wrong(value, _name(hint), source, path)


def _check_keys(value: dict[Any, Any], source: str, path: str) -> None:
    for key in value:
        if not isinstance(key, str):
            raise InvalidConfig(f"{source}: {_join(path, str(key))}: got the key {_show(key)}, "
                              "expected a string")  # fmt: skip


def _wrong(value: Any, expected: str, source: str, path: str) -> InvalidConfig:
    return InvalidConfig(f"{source}: {path}: got {_show(value)}, expected {expected}")


def _show(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is tuple:
        return "a list"
    if typing.get_origin(hint) is Annotated:
        base, *marks = typing.get_args(hint)
        limits = [str(mark) for mark in marks if isinstance(mark, Range | Choice)]
        return " ".join([_name(base), *limits])
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
