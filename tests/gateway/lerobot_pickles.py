"""What LeRobot's clients send, without LeRobot: pickles of classes that have its names."""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

HELPERS = "lerobot.async_inference.helpers"
BEGIN, MIDDLE, END = 1, 2, 3
MOTORS = tuple(f"motor_{i}.pos" for i in range(14))


@dataclass
class TimedObservation:
    timestamp: Any
    timestep: Any
    observation: Any
    must_go: bool = False


@dataclass
class RemotePolicyConfig:
    policy_type: str
    pretrained_name_or_path: str
    lerobot_features: Any
    actions_per_chunk: int
    device: str = "cpu"
    rename_map: dict[str, str] = field(default_factory=dict)


class TimedAction:
    timestamp: float
    timestep: int
    action: np.ndarray


@contextmanager
def lerobot_names() -> Iterator[None]:
    """While open, the classes above are pickled under LeRobot's names."""
    module = types.ModuleType(HELPERS)
    for kind in (TimedObservation, RemotePolicyConfig):
        setattr(module, kind.__name__, kind)
        kind.__module__ = HELPERS
    names = {"lerobot": types.ModuleType("lerobot"), HELPERS: module}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def dumps(value: object, protocol: int = 4) -> bytes:
    with lerobot_names():
        return pickle.dumps(value, protocol)


def features(
    names: Iterable[str] = MOTORS, cameras: Iterable[str] = ("top",), hw: tuple[int, int] = (24, 32)
) -> dict[str, Any]:
    names = list(names)
    return {
        "observation.state": {"dtype": "float32", "shape": (len(names),), "names": names},
        **{
            f"observation.images.{name}": {
                "dtype": "image",
                "shape": (*hw, 3),
                "names": ["height", "width", "channels"],
            }
            for name in cameras
        },
    }


def instructions(**changes: Any) -> bytes:
    values = {
        "policy_type": "toy",
        "pretrained_name_or_path": "user/model",
        "lerobot_features": features(),
        "actions_per_chunk": 50,
        **changes,
    }
    return dumps(RemotePolicyConfig(**values))


def values(state: float = 0.0, *, shade: int = 100, task: str = "") -> dict[str, Any]:
    """What a robot measures, in an order that is not the state's."""
    measured = {name: state + i / 64 for i, name in enumerate(MOTORS)}
    picture = np.full((24, 32, 3), shade, np.uint8)
    return {"top": picture, **dict(reversed(measured.items())), "task": task}


def observation(state: float = 0.0, *, timestep: int = 0, **more: Any) -> bytes:
    return dumps(TimedObservation(1000.5, timestep, values(state, **more), must_go=True))


class _ActionReader(pickle.Unpickler):
    """Reads a reply as LeRobot's client does, with numpy's arrays for torch's tensors."""

    def find_class(self, module: str, name: str) -> Any:
        tensor = lambda numbers: np.array(numbers, np.float32)  # noqa: E731
        return {(HELPERS, "TimedAction"): TimedAction, ("torch", "tensor"): tensor}[module, name]


def read_actions(content: bytes) -> list[TimedAction]:
    actions: list[TimedAction] = _ActionReader(io.BytesIO(content)).load()
    return actions


def message(data: bytes, state: int | None = None) -> bytes:
    """``data`` as a message's only field, or as the second one after ``state``."""
    head = b"\x0a" if state is None else bytes((0x08, state, 0x12))
    size, more = len(data), bytearray()
    while size > 0x7F:
        more.append(size & 0x7F | 0x80)
        size >>= 7
    return head + bytes(more) + bytes((size,)) + data
