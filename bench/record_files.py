"""What a run measured, as JSON that is small and can still be read and compared line by line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def as_text(record: Mapping[str, Any]) -> str:
    """JSON: an entry of ``record`` a line, and of one that is an object or a list of them, too."""
    lines = [f"{_packed(key)}:{_spread(value)}" for key, value in record.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(as_text(record), encoding="utf-8")


def _spread(value: object) -> str:
    if isinstance(value, dict) and value:
        lines = [f" {_packed(key)}:{_packed(each)}" for key, each in value.items()]
        return "{\n" + ",\n".join(lines) + "\n}"
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return "[\n" + ",\n".join(f" {_packed(each)}" for each in value) + "\n]"
    return _packed(value)


def _packed(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
