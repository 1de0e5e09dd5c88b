"""A camera may have any printable name, those of our own fields, files and folders included."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from policies.errors import ContractMismatch
from policies.types import ActionChunk, CameraContract, MetaObs, PolicyContract
from robots.base import CameraSample
from runtime.eval_real import video_recorder
from runtime.eval_real.shared_state import Dims, SharedStateLayout
from runtime.eval_real.video_recorder import VideoRecorder, file_name
from runtime.eval_sim.cli import main, read_config
from runtime.protocol import image_codec, messages
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CONTRACT, ToyPolicy

LAYOUT = SharedStateLayout(Dims(1, 1, 1))
OURS = {
    *(field.name for kind in (MetaObs, ActionChunk, PolicyContract) for field in fields(kind)),
    *(name for schema in LAYOUT.latest.values() for name in schema.specs),
    *(name for schema, _ in LAYOUT.queues.values() for name in schema.specs),
    *(
        *CameraSample._fields,
        *messages.reply_schema(CONTRACT).specs,
        image_codec.JPEG,
        image_codec.LENGTHS,
    ),
    *("used", "lengths", "joints", "number", "weights", "schema", "contract", "info"),
}
"""What we call our own fields."""
ODD = ("a/b", "/", "top/used", "used/", "/used", "images/top", "depth/top", "top.left", "..", " ",
       "a b", "a=b", "é☃", "%s{}", "C:\\x", "~", "*", "null", "1", "-n", "x" * 100)  # fmt: skip
NAMES = tuple(sorted({*OURS, *ODD}))
HW = (8, 16)


class Seeing(ToyPolicy):
    """Takes the cameras ``names``, and keeps what it saw last."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        cameras = tuple(CameraContract(name, HW, HW) for name in names)
        self.contract = dataclasses.replace(CONTRACT, cameras=cameras)
        self.shades: dict[str, int] = {}

    def infer(self, obs: MetaObs) -> ActionChunk:
        self.shades = {name: round(image.mean()) for name, image in obs.images.items()}
        actions = np.zeros((CONTRACT.chunk_size, CONTRACT.action_dim), np.float32)
        return ActionChunk(actions, obs.timestep, obs.t_capture_ns)

    def fork(self) -> Seeing:
        return self


def make_odd() -> Seeing:
    return Seeing(("used", "jpeg", "a/b", "state", "top.left"))


@pytest.mark.parametrize("start", range(0, len(NAMES), 32))
@pytest.mark.parametrize(
    ("transport", "options"),
    [("shm", {}), ("zmq", {}), ("zmq", {"jpeg_quality": 95}), ("shm", {"resize": True})],
)
def test_every_name_crosses(transport: str, options: dict[str, int], start: int) -> None:
    names = NAMES[start : start + 32]
    shades = {name: 7 * number for number, name in enumerate(names)}
    obs = MetaObs(
        images={name: np.full((*HW, 3), shade, np.uint8) for name, shade in shades.items()},
        state=np.zeros(CONTRACT.state_dim, np.float32),
        timestep=5,
    )
    policy = Seeing(names)
    with serving(policy) as server, connect(server, transport, **options) as client:
        for _ in range(2):
            assert client.infer(obs).obs_timestep == 5
        assert client.transport == transport
    assert policy.shades.keys() == shades.keys()
    assert all(abs(policy.shades[name] - shade) <= 1 for name, shade in shades.items())


def test_depth_of_such_cameras_crosses() -> None:
    obs = MetaObs(
        images={name: np.zeros((*HW, 3), np.uint8) for name in ("used", "a/b")},
        state=np.zeros(CONTRACT.state_dim, np.float32),
        depth={"used": np.full(HW, 7, np.uint16), "a/b": np.full(HW, 8, np.uint16)},
    )
    schema = messages.observation_schema(obs)
    views = schema.views(bytearray(schema.nbytes), writable=True)
    messages.write_observation(obs, views)
    read = messages.read_observation(views)
    assert {name: int(depth[0, 0]) for name, depth in read.depth.items()} == {"used": 7, "a/b": 8}


@pytest.mark.parametrize("name", ["", "a\nb", "\0", "x" * 101])
def test_a_name_that_is_none_is_refused_where_it_is_declared(name: str) -> None:
    with pytest.raises(ContractMismatch, match=r"cameras: got a name .*, expected 1 to 100 print"):
        CameraContract(name, HW, HW)


def test_a_whole_evaluation_with_such_cameras(tmp_path: Path) -> None:
    policy = "python:tests.runtime.test_runtime_camera_names:make_odd"
    flags = ["-m", policy, "-e", "fake", "-n", "1", "--videos", "1", "-o", str(tmp_path)]
    assert main([*flags, "--env.max_timesteps", "3"]) == 0
    result = json.loads(next(tmp_path.rglob("*.json")).read_text())
    assert list(result["world"]["cameras"]) == list(make_odd().contract.camera_names)


def test_a_camera_with_a_dot_can_be_mapped() -> None:
    flags = ["-m", "python:x:y", "-e", "aloha", "--camera_map", "top.left=top", "used=angle"]
    plan = read_config(flags)
    assert plan.env.camera_map.items() >= {"top.left": "top", "used": "angle"}.items()
    assert tuple(plan.camera_map) == ("top.left", "used")


@pytest.mark.parametrize("name", NAMES)
def test_a_video_of_every_camera_is_a_file_of_the_rollouts_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, object]] = []
    monkeypatch.setattr(video_recorder, "send_event", lambda event, **fields: said.append(fields))
    video = VideoRecorder(10.0)
    video.add({name: CameraSample(np.zeros((16, 16, 3), np.uint8), 1, 1)}, 1)
    video._write(tmp_path / "rollout_0")
    (path,) = tmp_path.iterdir()
    assert said == [{"paths": [str(path)], "problem": ""}]


def test_no_two_cameras_share_a_file() -> None:
    assert len({file_name(name) for name in NAMES}) == len(NAMES)
    assert (file_name("top.left"), file_name("a/b")) == ("top.left", "a%2Fb")
