"""Rendering: where it writes, what its options do, and what it says where it cannot."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from envs import gl_context
from envs.aloha_physics import AlohaSim
from envs.errors import EnvError, RenderingUnavailable, UnknownCamera

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


@pytest.fixture
def unsettled(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing chosen yet; what is chosen in a test is forgotten after it."""
    monkeypatch.setattr(gl_context, "_chosen", set())
    monkeypatch.setattr(gl_context, "_unavailable", [])
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(gl_context, "_loaded_platform", lambda: "")
    return monkeypatch


def test_without_any_gl_the_error_names_the_packages(
    unsettled: pytest.MonkeyPatch,
) -> None:
    unsettled.setattr(
        gl_context,
        "_PROBES",
        {"egl": lambda: "no libEGL", "osmesa": lambda: "no mesa", "glfw": lambda: "no screen"},
    )
    with pytest.raises(
        RenderingUnavailable,
        match=r"egl: no libEGL; osmesa: no mesa.*apt-get install libegl1 .*libosmesa6",
    ):
        gl_context.make_context(10, 10)


def test_a_users_choice_is_the_only_one_tried(unsettled: pytest.MonkeyPatch) -> None:
    unsettled.setenv("MUJOCO_GL", "osmesa")
    unsettled.setattr(gl_context, "_PROBES", {"egl": lambda: None, "osmesa": lambda: "absent"})
    with pytest.raises(RenderingUnavailable, match=r"\(osmesa: absent\)"):
        gl_context.make_context(10, 10)
    unsettled.setenv("MUJOCO_GL", "off")
    with pytest.raises(RenderingUnavailable, match="switched off: MUJOCO_GL=off"):
        gl_context.make_context(10, 10)


def test_osmesa_renders_where_it_is_installed() -> None:
    try:
        ctypes.CDLL("libOSMesa.so.8")
    except OSError as error:
        pytest.skip(f"no OSMesa: {error}")
    code = (
        "from envs.aloha_physics import AlohaSim\n"
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
        "from envs.aloha_physics import AlohaSim\n"
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


@pytest.mark.parametrize(
    ("mujoco_gl", "platform", "working", "expected"),
    [
        (None, None, ("egl", "osmesa"), "egl"),
        ("", "", ("egl",), "egl"),
        ("on", None, ("osmesa",), "osmesa"),
        (" EGL ", None, ("egl", "osmesa"), "egl"),
        ("osmesa", None, ("egl", "osmesa"), "osmesa"),
        ("glx", "egl", ("glfw",), "glfw"),
        (None, "osmesa", ("egl", "osmesa"), "osmesa"),
        (None, "EGL", ("egl", "osmesa"), "egl"),
        (None, None, ("glfw",), "glfw"),
    ],
)
def test_what_was_chosen_is_everybodys_choice(
    unsettled: pytest.MonkeyPatch,
    mujoco_gl: str | None,
    platform: str | None,
    working: tuple[str, ...],
    expected: str,
) -> None:
    _set(unsettled, mujoco_gl, platform)
    unsettled.setattr(gl_context, "_PROBES", _probes(*working))
    assert gl_context.choose_backend() == expected
    assert os.environ["MUJOCO_GL"] == expected
    if expected != "glfw":
        assert os.environ["PYOPENGL_PLATFORM"] == expected
    assert gl_context.choose_backend() == expected


@pytest.mark.parametrize(
    ("mujoco_gl", "platform", "working", "message"),
    [
        ("nonsense", None, ("egl",), "MUJOCO_GL: got 'nonsense', expected one of egl, osmesa, "),
        ("osmesa", None, ("egl",), r"\(osmesa: broken\). egl works here: unset MUJOCO_GL$"),
        (None, "glx", ("egl",), r"egl: excluded by .*egl works here: unset PYOPENGL_PLATFORM$"),
        ("egl", "osmesa", ("egl",), "excluded by PYOPENGL_PLATFORM=osmesa.*unset MUJOCO_GL and P"),
        ("egl", None, (), r"\(egl: broken\). Install a software renderer: apt-get install"),
        ("OFF", None, ("egl",), "switched off: MUJOCO_GL=off; unset it to render"),
    ],
)
def test_without_a_renderer_one_line_says_what_was_tried_and_the_remedy(
    unsettled: pytest.MonkeyPatch,
    mujoco_gl: str | None,
    platform: str | None,
    working: tuple[str, ...],
    message: str,
) -> None:
    _set(unsettled, mujoco_gl, platform)
    unsettled.setattr(gl_context, "_PROBES", _probes(*working))
    with pytest.raises(RenderingUnavailable, match=message) as raised:
        gl_context.choose_backend()
    assert "\n" not in str(raised.value)
    assert os.environ.get("MUJOCO_GL") == mujoco_gl


def test_a_screen_that_is_not_there_is_no_screen(unsettled: pytest.MonkeyPatch) -> None:
    unsettled.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RenderingUnavailable, match=r"glfw: no screen \(DISPLAY is not set"):
        gl_context.make_context(8, 8)
    unsettled.setenv("DISPLAY", ":77")
    with pytest.raises(RenderingUnavailable, match=r"glfw: .*display :77"):
        gl_context.make_context(8, 8)


def test_a_device_number_that_is_none_is_named(unsettled: pytest.MonkeyPatch) -> None:
    unsettled.setenv("MUJOCO_GL", "egl")
    unsettled.setenv("MUJOCO_EGL_DEVICE_ID", "first")
    try:
        ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        pytest.skip(f"no EGL: {error}")
    with pytest.raises(RenderingUnavailable, match=r"MUJOCO_EGL_DEVICE_ID: got 'first', expected"):
        gl_context.make_context(8, 8)


def test_a_backend_that_breaks_when_used_is_named(unsettled: pytest.MonkeyPatch) -> None:
    class Broken(types.ModuleType):
        @staticmethod
        def GLContext(width: int, height: int) -> None:  # noqa: N802  mujoco's name
            raise RuntimeError("no\nluck")

    unsettled.setattr(gl_context, "_PROBES", _probes("osmesa"))
    unsettled.setitem(sys.modules, "mujoco.osmesa", Broken("mujoco.osmesa"))
    with pytest.raises(
        RenderingUnavailable, match=r"osmesa was found .*\(no luck\). Set MUJOCO_GL"
    ):
        gl_context.make_context(8, 8)


@pytest.mark.parametrize("value", ["nonsense", "osmesa", "glfw", "disable", ""])
def test_physics_needs_no_renderer(value: str) -> None:
    code = (
        "import os\n"
        "from envs.aloha_physics import AlohaSim\n"
        "sim = AlohaSim('sim_transfer_cube')\n"
        "sim.step(sim.agent_pos)\n"
        "print(repr(os.environ['MUJOCO_GL']))\n"
    )
    done = _python(code, MUJOCO_GL=value, PYOPENGL_PLATFORM=value)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, repr(value), "")


def test_environments_of_others_render_with_what_was_chosen() -> None:
    """Gymnasium's own would take GLFW, and die where there is no screen."""
    code = (
        "from envs.factory import load_env_config, make_world\n"
        "keys = {'gym.images': '{top: render()}'}\n"
        "world = make_world(load_env_config('gym:InvertedPendulum-v5', keys))\n"
        "print(world.observe().images['top'].std() > 1)\n"
        "world.close()\n"
    )
    done = _python(code, MUJOCO_GL="", PYOPENGL_PLATFORM="", DISPLAY=":77")
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
    assert "Traceback" not in done.stderr


def test_environments_of_others_that_cannot_render_say_why() -> None:
    code = (
        "from envs.errors import EnvError\n"
        "from envs.factory import load_env_config, make_world\n"
        "keys = {'gym.images': '{top: render()}'}\n"
        "try:\n"
        "    make_world(load_env_config('gym:InvertedPendulum-v5', keys))\n"
        "except EnvError as error:\n"
        "    print(error)\n"
    )
    done = _python(code, MUJOCO_GL="nonsense")
    (line,) = done.stdout.splitlines()
    assert line.startswith("gym:InvertedPendulum-v5: ")
    assert "rendering: MUJOCO_GL: got 'nonsense'" in line
    assert "Traceback" not in done.stderr


def test_environments_of_others_that_do_not_render_need_no_renderer() -> None:
    code = (
        "from envs.factory import load_env_config, make_world\n"
        "world = make_world(load_env_config('gym:InvertedPendulum-v5'))\n"
        "print(world.observe().state.shape)\n"
    )
    done = _python(code, MUJOCO_GL="nonsense")
    assert (done.stdout.strip(), done.returncode) == ("(4,)", 0), done.stderr


def _set(monkeypatch: pytest.MonkeyPatch, mujoco_gl: str | None, platform: str | None) -> None:
    for name, value in (("MUJOCO_GL", mujoco_gl), ("PYOPENGL_PLATFORM", platform)):
        if value is not None:
            monkeypatch.setenv(name, value)


def _probes(*working: str) -> dict[str, Callable[[], str | None]]:
    return {name: lambda n=name: None if n in working else "broken" for name in gl_context.BACKENDS}


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "DISPLAY", "WAYLAND_DISPLAY")
    inherited = {k: v for k, v in os.environ.items() if k not in names}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
