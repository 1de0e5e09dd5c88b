"""``metronome train --data lerobot:DIR``: it learns the same as from the same data in HDF5."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from policies.errors import CheckpointError
from policies.training.dataset import Demonstrations
from policies.training.episode_source import DatasetColumns
from policies.training.hdf5_episodes import Hdf5Episodes
from policies.training.trainer import TrainConfig
from policies.types import CameraContract
from runtime.datasets.dataset_reader import DatasetReader
from runtime.datasets.dataset_writer import DatasetWriter
from runtime.datasets.errors import DatasetError
from runtime.datasets.features import DatasetFeatures
from runtime.datasets.pictures import decode_video, encode_video
from runtime.datasets.training_episodes import LeRobotEpisodes
from runtime.tools import train
from tests.datasets.episodes import add, assert_holds, episode, features

POSES = tuple(f"cube.{part}" for part in ("x", "y", "z", "qw", "qx", "qy", "qz"))
CAMERAS = {"top": (36, 40), "wrist/left": (15, 24)}
TOP = CameraContract("top", source_hw=(36, 40), crop=(0, 0, 32, 32), model_hw=(32, 32))
RECIPE = """
task: toy
demonstrations: nowhere
output: {output}
cameras: [{{name: top, source_hw: [36, 40], crop: [0, 0, 32, 32], model_hw: [32, 32]}}]
chunk_size: 3
width: 16
n_heads: 2
feedforward: 16
n_encoder_layers: 1
n_style_layers: 1
steps: 2
batch_size: 2
threads: 1
evaluate_episodes: 0
"""


def both(tmp_path: Path, count: int = 3, **changes: Any) -> tuple[Path, Path, DatasetFeatures]:
    """The same episodes as HDF5 and as a dataset."""
    made = features(**{"lossless": True, "environment_names": POSES, "cameras": CAMERAS} | changes)
    folder, root = tmp_path / "hdf5", tmp_path / "set"
    folder.mkdir()
    with DatasetWriter(root, made) as writer:
        for seed in range(count):
            columns, pictures = episode(made, seed)
            poses = np.tile(columns["action"][:, :1], 7)
            columns["observation.environment_state"] = poses
            writer.add(columns, {name: all_of.__iter__ for name, all_of in pictures.items()}, "")
            with h5py.File(folder / f"episode_{seed}.hdf5", "w") as file:
                for name, all_of in pictures.items():
                    file[f"observations/images/{name}"] = all_of
                file["observations/qpos"] = columns["observation.state"]
                file["action"], file["metronome/object_qpos"] = columns["action"], poses
    return folder, root, made


def training(tmp_path: Path, name: str, *flags: str) -> tuple[int, Path]:
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(RECIPE.format(output=tmp_path / name))
    return train.main(["--config", str(recipe), *flags]), tmp_path / name / "loss.csv"


def test_losses_are_those_of_hdf5(tmp_path: Path) -> None:
    folder, root, _ = both(tmp_path)
    losses = []
    for name, data in (("hdf5", str(folder)), ("lerobot", f"lerobot:{root}")):
        status, path = training(tmp_path, f"from_{name}", "--data", data)
        assert status == 0
        losses.append(list(csv.DictReader(path.read_text().splitlines())))
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    assert float(losses[0][-1]["aux"]) > 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_shipped_recipe_has_the_losses_of_hdf5(tmp_path: Path) -> None:
    from envs import demonstrations

    shared = ["--task", "sim_transfer_cube", "--num", "2", "--workers", "2"]
    losses = []
    for name, flags in (("hdf5", []), ("lerobot", ["--format", "lerobot", "--lossless"])):
        data = str(tmp_path / name)
        assert demonstrations.main([*shared, *flags, "--out", data]) == 0
        output = tmp_path / f"run_{name}"
        argv = ["--config", "act_sim_transfer_cube", "--steps", "3", "--no_evaluate"]
        argv += ["--data", f"lerobot:{data}" if name == "lerobot" else data]
        assert train.main([*argv, "--output", str(output)]) == 0
        losses.append((output / "loss.csv").read_text())
    assert losses[0] == losses[1]
    assert len(losses[0].splitlines()) == 4


def test_cameras_and_vectors_can_have_other_columns(tmp_path: Path) -> None:
    _, root, made = both(tmp_path)
    columns = DatasetColumns(
        state="action", action="observation.state", cameras={"top": "observation.images.wrist_left"}
    )
    camera = CameraContract("top", source_hw=(15, 24), model_hw=(15, 24))
    source = LeRobotEpisodes(root, [camera], columns)
    data = Demonstrations(source, [camera], chunk_size=2, with_objects=False)
    written = [episode(made, seed) for seed in range(3)]
    np.testing.assert_array_equal(data.state, np.concatenate([c["action"] for c, _ in written]))
    np.testing.assert_array_equal(
        data.images[:, 0], np.concatenate([pictures["wrist/left"] for _, pictures in written])
    )
    assert source.dt_s == 0.02
    assert data.stats["action"]["mean"] == pytest.approx(
        np.concatenate([c["observation.state"] for c, _ in written]).mean(0), abs=1e-6
    )


def test_one_number_per_row_is_a_vector_of_one(tmp_path: Path) -> None:
    _, root, _ = both(tmp_path, state_names=("only",))
    state, action = LeRobotEpisodes(root, [TOP], DatasetColumns()).columns(0)
    assert (state.shape, action.shape) == ((4, 1), (4, 3))


@pytest.mark.parametrize("lossless", [False, True])
def test_files_with_several_episodes_are_read(tmp_path: Path, lossless: bool) -> None:
    """As LeRobot writes them: all rows in one file, videos one after another in one."""
    made = features(lossless=lossless, cameras={"top": (16, 24)})
    with DatasetWriter(tmp_path, made) as writer:
        for seed in range(3):
            add(writer, made, seed)
    join_files(tmp_path, made, 3)
    assert_holds(tmp_path, made, 3)
    assert len(list(tmp_path.glob("data/*/*.parquet"))) == 1


def join_files(root: Path, made: DatasetFeatures, count: int) -> None:
    reader = DatasetReader(root)
    files = sorted(root.glob("data/*/*.parquet"))
    entries = reader.episodes
    if not made.lossless:
        videos = sorted(root.glob("videos/*/*/*.mp4"))
        frames = [picture for seed in range(count) for picture in episode(made, seed)[1]["top"]]
        encode_video(videos[0], frames, Fraction(50))
        key, start = "videos/observation.images.top", 0
        for entry, path in zip(entries, videos, strict=True):
            entry[f"{key}/file_index"], entry[f"{key}/from_timestamp"] = 0, start / 50
            start += entry["length"]
            if path != videos[0]:
                path.unlink()
    table = pa.concat_tables([parquet.read_table(path) for path in files])
    parquet.write_table(table, files[0], row_group_size=5)
    for path in files[1:]:
        path.unlink()
    entry_files = sorted(root.glob("meta/episodes/*/*.parquet"))
    for entry in entries:
        entry["data/file_index"] = 0
    parquet.write_table(pa.Table.from_pylist(entries), entry_files[0])
    for path in entry_files[1:]:
        path.unlink()


def test_the_size_of_pictures_may_follow_the_channels(tmp_path: Path) -> None:
    _, root, _ = both(tmp_path, count=1)
    info = root / "meta/info.json"
    content = json.loads(info.read_text())
    top = content["features"]["observation.images.top"]
    top["shape"], top["names"] = [3, 36, 40], ["channels", "height", "width"]
    info.write_text(json.dumps(content))
    assert DatasetReader(root).cameras == {"top": (36, 40), "wrist_left": (15, 24)}


def test_decoding_may_begin_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    pictures = [np.full((16, 16, 3), 2 * k, np.uint8) for k in range(100)]
    encode_video(path, pictures, Fraction(20))
    whole = list(decode_video(path))
    assert [time_s for time_s, _ in whole] == pytest.approx(np.arange(100) / 20)
    for first in (1, 19, 21, 40, 99):
        part = list(decode_video(path, (first - 0.5) / 20))
        assert [time_s for time_s, _ in part] == [time_s for time_s, _ in whole[first:]]
        np.testing.assert_array_equal(part[0][1], whole[first][1])


CONFIG = TrainConfig("toy", Path("in"), Path("out"), (TOP,))


def test_the_rate_is_the_datas(tmp_path: Path) -> None:
    folder, root, _ = both(tmp_path, fps=30.0)
    source = LeRobotEpisodes(root, [TOP], DatasetColumns())
    assert CONFIG.at_rate_of(source).dt_s == 1 / 30
    assert dataclasses.replace(CONFIG, dt_s=0.0333).at_rate_of(source).dt_s == 0.0333
    with pytest.raises(
        ValueError, match=r"dt_s: got 0.02, expected 0.0333333 \(30 fps\), the rate"
    ):
        dataclasses.replace(CONFIG, dt_s=0.02).at_rate_of(source)
    hdf5 = Hdf5Episodes(folder)
    assert CONFIG.at_rate_of(hdf5).dt_s == 0.02
    assert dataclasses.replace(CONFIG, dt_s=0.1).at_rate_of(hdf5).dt_s == 0.1


def test_a_map_of_unknown_cameras_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"dataset_columns.cameras: got \['up'\], expected some of"
    ):
        dataclasses.replace(CONFIG, dataset_columns=DatasetColumns(cameras={"up": "x"}))


def test_images_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder, _, _ = both(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"got 0.00 GB \(15 frames.*\(max_images_gb\); use fewer"
    ):
        Demonstrations(Hdf5Episodes(folder), [TOP], chunk_size=2, max_images_gb=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_images_gb", "1e-6"], "expected at most 0.00 GB"),
        (["--dt_s", "0.05"], "dt_s: got 0.05, expected 0.02 (50 fps)"),
        (["--dataset_columns.state", "qpos"], "got no column of numbers 'qpos', expected one of ["),
        (["--dataset_columns.action", "observation.images.top"], "got no column of numbers 'obse"),
        (["--dataset_columns.cameras.top", "up"], "camera 'top': got no pictures 'up', expected o"),
        (
            ["--dataset_columns.cameras.top", "observation.images.wrist_left"],
            "camera 'top': got pictures of (15, 24), expected (36, 40) or (32, 32)",
        ),
        (
            ["--dataset_columns.objects", "observation.state"],
            "objects: got the shape (4, 2), expected 7 numbers for each object; aux_weight: 0",
        ),
        (["--dataset_columns.objects", "box"], "got no column 'box', expected the objects' poses"),
        (["--demonstrations", "x"], "got --data and --demonstrations, expected one of them"),
    ],
)
def test_flags_that_do_not_fit_the_data_are_one_line(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, root, _ = both(tmp_path, count=1)
    status, _ = training(tmp_path, "run", "--data", f"lerobot:{root}", *flags)
    refused(status, message, capsys)


def refused(status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2
    assert len(lines) == 1
    assert message in lines[0]


def damage(root: Path, what: str) -> None:
    info = root / "meta/info.json"
    content = json.loads(info.read_text())
    rows = next(root.glob("data/**/*.parquet"))
    if what == "version":
        content["codebase_version"] = "v2.1"
    elif what == "empty":
        content["total_episodes"] = 0
        (root / "meta/tasks.parquet").unlink()
    elif what == "no rate":
        content["fps"] = 0
    elif what == "width":
        content["features"]["action"]["shape"] = [4]
    elif what == "nan":
        table = parquet.read_table(rows)
        column = pa.FixedSizeListArray.from_arrays(np.full(12, np.nan, np.float32), 3)
        index = table.column_names.index("action")
        parquet.write_table(table.set_column(index, "action", column), rows)
    elif what == "not a video":
        for path in root.glob("videos/**/*.mp4"):
            path.write_bytes(b"not a video" * 100)
    elif what == "short video":
        for path in root.glob("videos/**/*.mp4"):
            pictures = [picture for _, picture in decode_video(path)]
            encode_video(path, pictures[:-1], Fraction(50))
    info.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("version", "got 'v2.1', expected 'v3.0'; convert it with LeRobot: python -m lerobot."),
        ("empty", "got no episodes, expected at least one"),
        ("no rate", "fps: got 0.0, expected more than 0"),
        ("width", "action: got 12 numbers in 4 rows, expected 16"),
        ("nan", "action: got [nan nan nan] in row 0, expected finite numbers"),
        ("not a video", "file-000.mp4: cannot be read"),
        ("short video", "episode 0: got 3 frames from 0 s on at 50 fps, expected 4"),
    ],
)
def test_damaged_data_are_one_line(
    tmp_path: Path, what: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, root, _ = both(tmp_path, count=1, lossless=False)
    damage(root, what)
    status, _ = training(tmp_path, "run", "--data", f"lerobot:{root}")
    refused(status, message, capsys)


def test_no_dataset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data, message in (
        (tmp_path / "gone", "gone: no such folder, expected a LeRobotDataset"),
        (tmp_path, "got no meta/info.json, expected a LeRobotDataset"),
        ("x" * 5000, "meta/info.json: cannot be read: OSError(36"),
    ):
        status, _ = training(tmp_path, "run", "--data", f"lerobot:{data}")
        refused(status, message, capsys)


def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, root, _ = both(tmp_path, count=1)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _ = training(tmp_path, "run", "--data", f"lerobot:{root}")
    refused(status, "pip install '.[dataset]' brings it", capsys)


def test_a_picture_that_is_no_png_is_named(tmp_path: Path) -> None:
    _, root, _ = both(tmp_path, count=1)
    path = next(root.glob("data/**/*.parquet"))
    table = parquet.read_table(path)
    key = "observation.images.top"
    cells = pa.array([{"bytes": None, "path": "lost.png"}] * 4, table.schema.field(key).type)
    parquet.write_table(table.set_column(table.column_names.index(key), key, cells), path)
    with pytest.raises(DatasetError, match=r"file-000.parquet: cannot be read"):
        list(DatasetReader(root).pictures(0, "top"))
