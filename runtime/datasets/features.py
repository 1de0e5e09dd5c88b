"""The columns of a dataset, as its ``meta/info.json`` describes them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from runtime.datasets.errors import DatasetError

STATE, ACTION = "observation.state", "action"
ENVIRONMENT = "observation.environment_state"
IMAGES = "observation.images."
REWARD, DONE, SUCCESS = "next.reward", "next.done", "next.success"
TIME, LATENESS = "metronome.time_s", "metronome.lateness_s"
ACTION_AGE, SOURCE = "metronome.action_age_s", "metronome.source_frame"
"""Columns of this project. Their names must not begin with ``action``: LeRobot would learn them."""
UNKNOWN = -1
"""The age or the source of a command that no observation is known for."""
TIMESTAMP, FRAME, EPISODE, INDEX, TASK = (
    "timestamp",
    "frame_index",
    "episode_index",
    "index",
    "task_index",
)
GIVEN = {
    REWARD: "float32",
    DONE: "bool",
    SUCCESS: "bool",
    TIME: "float64",
    LATENESS: "float64",
    ACTION_AGE: "float64",
    SOURCE: "int64",
}
"""Columns of one number that a recording gives, and their types."""
COUNTED = {
    TIMESTAMP: "float32",
    FRAME: "int64",
    EPISODE: "int64",
    INDEX: "int64",
    TASK: "int64",
}
"""Columns of one number that the writer counts itself."""
PIXEL_FORMAT = "yuv444p"
"""Of videos. Colours at half the size would save nothing measurable, and cost 1.5 dB in a rendered
picture from above, 10 dB in one with small coloured things; browsers would play them."""
MOST_DENOMINATOR = 10_000
"""Of the frame rate of a video, as a fraction."""


@dataclass(frozen=True, slots=True)
class DatasetFeatures:
    """What every episode of a dataset has in common.

    Attributes:
        fps: Frames per second, the policy's rate.
        robot_type: The robot's or the simulated world's name.
        state_names, action_names: S and A names, in the order of the numbers.
        cameras: Camera name to (height, width) in pixels.
        environment_names: Names of the poses of the simulation's objects; empty without them.
        lossless: Whether pictures are stored bit for bit, as PNG beside the numbers. Otherwise
            they are H.264 videos.

    Raises:
        DatasetError: Two cameras get the same column.
    """

    fps: float
    robot_type: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    cameras: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    environment_names: tuple[str, ...] = ()
    lossless: bool = False

    def __post_init__(self) -> None:
        keys = [picture_key(name) for name in self.cameras]
        if len(set(keys)) != len(keys):
            raise DatasetError(
                f"cameras: got {list(self.cameras)} with the columns {keys}, expected different "
                "ones"
            )

    @property
    def picture_keys(self) -> dict[str, str]:
        """The column of each camera, by the camera's name."""
        return {name: picture_key(name) for name in self.cameras}

    @property
    def vectors(self) -> dict[str, tuple[str, ...]]:
        """The columns of several float32 numbers, and the names of these."""
        vectors = {STATE: self.state_names, ACTION: self.action_names}
        if self.environment_names:
            vectors[ENVIRONMENT] = self.environment_names
        return vectors

    @property
    def frame_rate(self) -> Fraction:
        """``fps`` as the fraction that a video is written with."""
        return Fraction(self.fps).limit_denominator(MOST_DENOMINATOR)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return ``features`` of ``info.json``."""
        described: dict[str, dict[str, Any]] = {
            key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
            for key, names in self.vectors.items()
        }
        for name, (height, width) in self.cameras.items():
            picture: dict[str, Any] = {
                "dtype": "image" if self.lossless else "video",
                "shape": [height, width, 3],
                "names": ["height", "width", "channels"],
            }
            if not self.lossless:
                picture["info"] = self._describe_video(height, width)
            described[picture_key(name)] = picture
        for key, dtype in (GIVEN | COUNTED).items():
            described[key] = {"dtype": dtype, "shape": [1], "names": None}
        return described

    def _describe_video(self, height: int, width: int) -> dict[str, Any]:
        return {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": PIXEL_FORMAT,
            "video.is_depth_map": False,
            "video.fps": plain_rate(self.fps),
            "video.channels": 3,
            "has_audio": False,
        }

    def to_json(self) -> str:
        """Return the features as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DatasetFeatures:
        """Read what ``to_json`` returned."""
        raw = json.loads(text)
        cameras = {name: (int(h), int(w)) for name, (h, w) in raw.pop("cameras").items()}
        for key in ("state_names", "action_names", "environment_names"):
            raw[key] = tuple(raw[key])
        return cls(cameras=cameras, **raw)


def picture_key(camera: str) -> str:
    """Return the column of ``camera``. LeRobot takes no ``/`` in a column's name."""
    return IMAGES + camera.removeprefix(IMAGES).replace("/", "_")


def names_or_numbers(names: Sequence[str], what: str, dim: int) -> tuple[str, ...]:
    """Return ``names``, or ``what_0``, ``what_1``, … for ``dim`` numbers without names."""
    return tuple(names) or tuple(f"{what}_{index}" for index in range(dim))


def plain_rate(fps: float) -> int | float:
    """Return ``fps`` as LeRobot writes it: an int where it is a whole number."""
    nearest = round(fps)
    return nearest if abs(fps - nearest) < 1e-6 else fps


def check_same(root: object, info: Mapping[str, Any], features: DatasetFeatures) -> None:
    """Check that a dataset with ``info`` can be continued with ``features``.

    Raises:
        DatasetError: It has other columns, another rate or another robot.
    """
    got_rate, rate = info.get("fps"), plain_rate(features.fps)
    if got_rate != rate:
        raise DatasetError(f"{root}: fps: got {rate}, expected {got_rate}, the dataset's own")
    there, new = _comparable(info.get("features", {})), _comparable(features.describe())
    for key in (*there, *new):
        if there.get(key) != new.get(key):
            raise DatasetError(
                f"{root}: {key}: got {_shown(new.get(key))}, expected {_shown(there.get(key))}, "
                "the dataset's own"
            )
    if info.get("robot_type") != features.robot_type:
        raise DatasetError(
            f"{root}: robot_type: got {features.robot_type!r}, expected "
            f"{info.get('robot_type')!r}, the dataset's own"
        )


def _comparable(described: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        key: {"dtype": one["dtype"], "shape": list(one["shape"]), "names": one.get("names")}
        for key, one in described.items()
    }


def _shown(one: Mapping[str, Any] | None) -> str:
    return "no such column" if one is None else f"{one['dtype']} {one['shape']} {one['names']}"
