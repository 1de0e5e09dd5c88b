"""Rendering: where it writes, what its options do, and what it says where it cannot."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from envs import gl
from envs.errors import EnvError, RenderingUnavailable, UnknownCamera
from envs.physics import AlohaSim

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sim():
    with AlohaSim("sim_transfer_cube", max_hw=(120, 160), shadows=False, msaa=0) as simulation:
        yield simulation


def test_out_is_written_whether_or_not_it_is_contiguous(sim: AlohaSim) -> None:
    expected = sim.render_camera("top", hw=(60, 80))
    wide = np.zeros((60, 160, 3), np.uint8)
    sim.render_camera("top", out=wide[:, ::2])
    np.testing.assert_array_equal(wide[:, ::2], expected)
    assert not wide[:, 1::2].any()


def test_sizes_share_one_context_without_disturbing_each_other(sim: AlohaSim) -> None:
    large = sim.render_camera("top", hw=(120, 160))
    small = sim.render_camera("top", hw=(30, 40))
    np.testing.assert_array_equal(sim.render_camera("top", hw=(120, 160)), large)
    # The same view: averaging the large one gives nearly the small one.
    averaged = large.reshape(30, 4, 40, 4, 3).mean(axis=(1, 3))
    assert np.abs(averaged - small).mean() < 10


def test_two_simulations_render_in_turns(sim: AlohaSim) -> None:
    expected = sim.render_camera("top", hw=(60, 80))
    with AlohaSim("sim_insertion", max_hw=(60, 80)) as other:
        first = other.render_camera("top", hw=(60, 80))
        np.testing.assert_array_equal(sim.render_camera("top", hw=(60, 80)), expected)
        np.testing.assert_array_equal(other.render_camera("top", hw=(60, 80)), first)
    np.testing.assert_array_equal(sim.render_camera("top", hw=(60, 80)), expected)
    assert not np.array_equal(first, expected)


def test_shadows_and_multisampling_change_the_picture(sim: AlohaSim) -> None:
    plain = sim.render_camera("angle", hw=(120, 160))
    for options in ({"shadows": True, "msaa": 0}, {"shadows": False, "msaa": 4}):
        with AlohaSim("sim_transfer_cube", max_hw=(120, 160), **options) as other:
            assert not np.array_equal(other.render_camera("angle", hw=(120, 160)), plain)


def test_errors_say_got_and_expected(sim: AlohaSim) -> None:
    with pytest.raises(UnknownCamera, match=r"got 'up', expected one of \('left_pillar'.*'top'"):
        sim.render_camera("up", hw=(10, 10))
    with pytest.raises(EnvError, match=r"got \(121, 160\), expected at most \(120, 160\)"):
        sim.render_camera("top", hw=(121, 160))
    with pytest.raises(EnvError, match=r"got float32 \(10, 10, 3\), expected uint8 \(H, W, 3\)"):
        sim.render_camera("top", out=np.zeros((10, 10, 3), np.float32))


def test_rendering_after_close_is_an_error() -> None:
    simulation = AlohaSim("sim_transfer_cube", max_hw=(10, 10))
    simulation.close()
    with pytest.raises(EnvError, match="closed"):
        simulation.render_camera("top", hw=(10, 10))


def test_without_any_gl_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(gl, "_PROBES", {"egl": lambda: "no libEGL", "osmesa": lambda: "no mesa"})
    with pytest.raises(
        RenderingUnavailable,
        match=r"egl: no libEGL; osmesa: no mesa.*apt-get install libegl1 .*libosmesa6",
    ):
        gl.make_context(10, 10)


def test_a_users_choice_is_the_only_one_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.delenv("PYOPENGL_PLATFORM", raising=False)
    monkeypatch.setattr(gl, "_PROBES", {"egl": lambda: None, "osmesa": lambda: "absent"})
    with pytest.raises(RenderingUnavailable, match=r"\(osmesa: absent\)"):
        gl.make_context(10, 10)
    monkeypatch.setenv("MUJOCO_GL", "off")
    with pytest.raises(RenderingUnavailable, match="switched off: MUJOCO_GL=off"):
        gl.make_context(10, 10)


def test_osmesa_renders_where_it_is_installed() -> None:
    try:
        ctypes.CDLL("libOSMesa.so.8")
    except OSError as error:
        pytest.skip(f"no OSMesa: {error}")
    code = (
        "from envs.physics import AlohaSim\n"
        "with AlohaSim('sim_insertion', max_hw=(24, 32)) as sim:\n"
        "    picture = sim.render_camera('top', hw=(24, 32))\n"
        "    print(sim.renderer.name, picture.std() > 5)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYOPENGL_PLATFORM"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**environment, "MUJOCO_GL": "osmesa", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["osmesa", "True"], done.stderr
    assert done.stderr == ""


def test_a_simulation_that_is_never_closed_exits_in_silence() -> None:
    code = (
        "from envs.physics import AlohaSim\n"
        "sim = AlohaSim('sim_transfer_cube', max_hw=(24, 32))\n"
        "sim.render_camera('top', hw=(24, 32))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
