"""As much of draccus as LeRobot's configuration needs here."""

from __future__ import annotations


def decode(kind: type, raw: dict) -> object:
    return kind(**raw)
