"""The training's command line."""

from __future__ import annotations

import pytest

from policies.yaml_config import InvalidConfig
from runtime.tools import train


def test_two_runs_do_not_write_one_folder(tmp_path):
    with (
        train.exclusive_output(tmp_path / "run"),
        pytest.raises(InvalidConfig, match=r"run: another run is writing there"),
        train.exclusive_output(tmp_path / "run"),
    ):
        pass
    with train.exclusive_output(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no_such_recipe"], "train configuration 'no_such_recipe'"),
        (["--config", "act_sim_transfer_cube", "--step", "3"], "did you mean 'steps'"),
        (
            ["--config", "act_sim_transfer_cube", "3"],
            "got '3', expected a flag of `metronome train --help`",
        ),
        (["--config", "act_sim_transfer_cube", "--demonstrations", "gone"], "gone: no *.hdf5"),
        (["--config", "act_sim_transfer_cube", "--data", "x" * 5000], "x: File name too long, exp"),
    ],
)
def test_bad_input_is_one_error_line_without_traceback(arguments, message, capsys):
    assert train.main(arguments) == 2
    assert message in capsys.readouterr().err
