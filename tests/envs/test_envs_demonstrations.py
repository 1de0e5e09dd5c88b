"""Recorded demonstrations: ACT's layout, replayable, the same however many workers made them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from envs.aloha_physics import AlohaSim
from envs.demonstration_files import DatasetFolder, EpisodeRows, write_spool
from envs.demonstrations import FIRST_SEED, Demonstration, main, record, record_episode
from envs.errors import EnvError
from envs.scripted_expert import EPISODE_TICKS
from runtime.datasets.dataset_reader import DatasetReader

h5py = pytest.importorskip("h5py")

SMALL = (24, 32)


def contents(path: Path) -> dict[str, np.ndarray]:
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update(
                {name: item[()]} if isinstance(item, h5py.Dataset) else {}
            )
        )
        found.update({f"@{name}": np.asarray(value) for name, value in file.attrs.items()})
    return found


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demonstrations") / "one_worker"
    recording = Demonstration("sim_transfer_cube", folder, image_hw=SMALL)
    outcomes = list(record(recording, num=2, workers=1))
    kept = [outcome.path for outcome in outcomes if outcome.path is not None]
    assert kept == [folder / "episode_0.hdf5", folder / "episode_1.hdf5"]
    assert sorted(folder.iterdir()) == kept
    return folder


def test_the_layout_is_acts(recorded: Path) -> None:
    found = contents(recorded / "episode_0.hdf5")
    assert {
        name: (value.shape, value.dtype) for name, value in found.items() if name[0] != "@"
    } == {
        "observations/qpos": ((EPISODE_TICKS, 14), np.float32),
        "observations/qvel": ((EPISODE_TICKS, 14), np.float32),
        "observations/images/top": ((EPISODE_TICKS, *SMALL, 3), np.uint8),
        "action": ((EPISODE_TICKS, 14), np.float32),
        "metronome/object_qpos": ((EPISODE_TICKS, 7), np.float32),
        "metronome/reward": ((EPISODE_TICKS,), np.float32),
    }
    assert bool(found["@sim"])
    assert int(found["@seed"]) == FIRST_SEED


def test_replaying_the_actions_gives_what_was_recorded(recorded: Path) -> None:
    found = contents(recorded / "episode_1.hdf5")
    with AlohaSim("sim_transfer_cube", max_hw=SMALL, shadows=False, msaa=0) as sim:
        sim.reset(int(found["@seed"]))
        for tick, action in enumerate(found["action"]):
            np.testing.assert_array_equal(
                sim.agent_pos.astype(np.float32), found["observations/qpos"][tick]
            )
            if tick % 100 == 0:
                np.testing.assert_array_equal(
                    sim.render_camera("top", hw=SMALL), found["observations/images/top"][tick]
                )
            reward = sim.step(action)
    assert reward == 4


@pytest.mark.long
def test_the_number_of_workers_changes_nothing(recorded: Path, tmp_path: Path) -> None:
    recording = Demonstration("sim_transfer_cube", tmp_path / "two_workers", image_hw=SMALL)
    list(record(recording, num=2, workers=2))
    for name in ("episode_0.hdf5", "episode_1.hdf5"):
        one, two = contents(recorded / name), contents(recording.folder / name)
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])


def made_up(seed: int) -> EpisodeRows:
    rng = np.random.default_rng(seed)
    ticks = 3 + seed
    return EpisodeRows(
        *rng.normal(size=(3, ticks, 14)).astype(np.float32),
        object_qpos=rng.normal(size=(ticks, 7)).astype(np.float32),
        rewards=np.array([0] * ticks + [4], np.float32),
        pictures={"top": rng.integers(0, 256, (ticks, *SMALL, 3), dtype=np.uint8)},
    )


def test_a_dataset_has_the_rows_in_the_order_in_which_they_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "set"
    spools = [write_spool(root, f"seed_{seed}", made_up(seed), "cube") for seed in range(3)]
    options = {"task": "sim_transfer_cube", "cameras": {"top": SMALL}, "lossless": True}
    with DatasetFolder(root, **options) as folder:
        assert [folder.keep(spool) for spool in (spools[2], spools[0])] == [root, root]
    assert not (root / ".recording").exists()
    reader = DatasetReader(root)
    assert (len(reader), reader.fps, reader.tasks) == (2, 50, ["cube"])
    for index, rows in enumerate((made_up(2), made_up(0))):
        read = reader.columns(index)
        np.testing.assert_array_equal(read["observation.state"], rows.qpos)
        np.testing.assert_array_equal(read["action"], rows.actions)
        np.testing.assert_array_equal(read["observation.environment_state"], rows.object_qpos)
        np.testing.assert_array_equal(read["next.reward"], rows.rewards[1:])
        assert list(np.flatnonzero(read["next.success"])) == [len(rows.qpos) - 1]
        np.testing.assert_array_equal(list(reader.pictures(index, "top")), rows.pictures["top"])
    with pytest.raises(EnvError, match="got a folder with episodes, expected a new one"):
        DatasetFolder(root, **options)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(EnvError, match="expected a new one or a LeRobotDataset"):
        DatasetFolder(tmp_path, **options)


@pytest.mark.long
def test_both_formats_have_the_same_episodes(recorded: Path, tmp_path: Path) -> None:
    argv = ["--task", "sim_transfer_cube", "--num", "2", "--workers", "2", "--format", "lerobot"]
    argv += ["--height", str(SMALL[0]), "--width", str(SMALL[1]), "--lossless"]
    assert main([*argv, "--out", str(tmp_path / "set")]) == 0
    assert {path.name for path in (tmp_path / "set").iterdir()} == {"data", "meta"}
    reader = DatasetReader(tmp_path / "set")
    assert len(reader) == 2
    for index in range(2):
        expected, read = contents(recorded / f"episode_{index}.hdf5"), reader.columns(index)
        np.testing.assert_array_equal(read["observation.state"], expected["observations/qpos"])
        np.testing.assert_array_equal(read["action"], expected["action"])
        np.testing.assert_array_equal(
            read["observation.environment_state"], expected["metronome/object_qpos"]
        )
        np.testing.assert_array_equal(read["next.reward"][:-1], expected["metronome/reward"][1:])
        np.testing.assert_array_equal(
            list(reader.pictures(index, "top")), expected["observations/images/top"]
        )


def test_an_episode_that_does_not_end_in_success_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "envs.demonstrations.plan_episode",
        lambda sim: np.tile(sim.agent_pos.astype(np.float32), (EPISODE_TICKS, 1)),
    )
    outcome = record_episode(Demonstration("sim_transfer_cube", tmp_path, image_hw=(6, 8)), 1)
    assert (outcome.last_reward, outcome.path) == (0, None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_episodes_is_refused(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EnvError, match="got a folder with episodes, expected a new one"):
        next(record(Demonstration("sim_transfer_cube", recorded), num=1))
    status = main(["--task", "sim_transfer_cube", "--num", "1", "--out", str(recorded)])
    assert status == 2
    assert "expected a new one" in capsys.readouterr().err
