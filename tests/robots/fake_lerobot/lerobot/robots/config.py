"""The registry that configuration classes enter when they are imported."""

from __future__ import annotations

from typing import ClassVar


class RobotConfig:
    _choices: ClassVar[dict[str, type]] = {}

    @classmethod
    def register_subclass(cls, name: str):
        def register(kind: type) -> type:
            cls._choices[name] = kind
            return kind

        return register

    @classmethod
    def get_known_choices(cls) -> dict[str, type]:
        return cls._choices
