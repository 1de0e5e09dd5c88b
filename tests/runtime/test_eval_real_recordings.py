"""Recordings of an earlier version load, replay bit for bit, and are saved again unchanged.

The recordings were made by ``eval_real.py`` with the dummy robot (7 joints, 50 policy ticks per
second) and a policy of sines with noise, before the packages were reorganised:

* ``temporal_ensemble``: 100 commands per second, a new chunk every policy tick.
* ``align_fade_starved``: answers of 0.5 s, so that the robot came to rest and went on.
* ``crossfade_watchdog``: SIGKILL ended the control process; the last commands are the watchdog's.

They lie in one archive, which packs what they have in common; the arrays in them are unpacked.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from runtime.eval_real.control_enums import Signal
from runtime.eval_real.recording import Recording
from runtime.eval_real.replay import main, replay, weights

ARCHIVE = Path(__file__).with_name("recordings.tar.xz")
NAMES = ("align_fade_starved", "crossfade_watchdog", "temporal_ensemble")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recordings, unpacked."""
    made = tmp_path_factory.mktemp("recordings")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(made, filter="data")
    return made


@pytest.mark.parametrize("name", NAMES)
def test_an_earlier_recording_replays_bit_for_bit(name: str, folder: Path) -> None:
    recording = Recording.load(folder / name)
    replayed = replay(recording)
    assert replayed.gaps == 0
    np.testing.assert_array_equal(
        replayed.commands.view(np.uint32), recording.rows["command"].view(np.uint32)
    )


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_an_earlier_recording_are_computed_again(name: str, folder: Path) -> None:
    with np.load(folder / f"{name}.npz") as arrays:
        saved = arrays["weights"]
    np.testing.assert_array_equal(weights(Recording.load(folder / name)), saved)


@pytest.mark.parametrize("name", NAMES)
def test_an_earlier_recording_is_saved_with_the_same_keys_and_values(
    name: str, folder: Path, tmp_path: Path
) -> None:
    recording = Recording.load(folder / name)
    recording.save(tmp_path / name, weights(recording))
    before, after = (
        json.loads((where / f"{name}.json").read_text()) for where in (folder, tmp_path)
    )
    assert (before.pop("format"), after.pop("format")) == (3, 4)
    was, now = before.pop("mission"), after.pop("mission")
    assert after == before
    assert (was.pop("trace"), now["trace"]) == ("", None)
    assert {name: now[name] for name in was} == was  # format 4 has further keys
    with np.load(folder / f"{name}.npz") as old, np.load(tmp_path / f"{name}.npz") as new:
        assert list(new) == list(old)
        for column in old:
            assert new[column].dtype == old[column].dtype
            np.testing.assert_array_equal(new[column], old[column], err_msg=column)


def test_the_replay_command_finds_every_recording(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("commands, identical") for line in lines] == [True] * len(NAMES)


def test_the_recordings_hold_what_they_are_named_for(folder: Path) -> None:
    starved = Recording.load(folder / "align_fade_starved")
    still = (np.diff(starved.rows["command"], axis=0) == 0).all(axis=1)
    playing = starved.rows["played"][1:].astype(bool)
    assert (still & playing).sum() > 5
    watchdog = Recording.load(folder / "crossfade_watchdog").rows["signals"] & Signal.WATCHDOG
    assert watchdog.any() and watchdog[-1]
    ensemble = Recording.load(folder / "temporal_ensemble")
    assert ensemble.config.ratio == 2
    assert ensemble.config.action_manager == "temporal_ensemble"
