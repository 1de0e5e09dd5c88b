"""Creates an OpenGL context without a screen: EGL, else OSMesa, else a hidden GLFW window.

``import mujoco`` picks its context class from ``MUJOCO_GL`` once per process, and PyOpenGL its
platform from ``PYOPENGL_PLATFORM``. Both fail with an unrelated exception where the library is
missing or the value is unknown to them. So this module probes the libraries first, through ctypes,
and imports the context class directly. If the user set ``MUJOCO_GL``, only that backend is tried.

``choose_backend`` writes its choice into both variables, so that other packages' environments
(dm_control, gymnasium's own) and child processes use the same backend, in any order of imports.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from envs.errors import EnvError, RenderingUnavailable

EGL_PLATFORM_DEVICE_EXT = 0x313F
MAX_EGL_DEVICES = 10
BACKENDS = ("egl", "osmesa", "glfw")
AUTO_VALUES = ("", "on", "enable", "enabled", "true", "1")
"""Values of ``MUJOCO_GL`` that name no backend. MuJoCo uses GLFW for them; this module uses the
first backend that works.
"""
DISABLED_VALUES = ("disable", "disabled", "off", "false", "0")
"""Values of ``MUJOCO_GL`` that switch rendering off."""
INSTALL = (
    "Install a software renderer: "
    "apt-get install libegl1 libgl1-mesa-dri libopengl0, or apt-get install libosmesa6"
)


_chosen: set[str] = set()
"""Backends that were chosen in this process."""
_unavailable: list[str] = []
"""At most one text: why no backend works, once ``why_not`` found that out."""


class GLContext(Protocol):
    """The interface that mujoco's context classes share."""

    def make_current(self) -> None:
        """Make this the calling thread's current context."""
        ...

    def free(self) -> None:
        """Destroy the context."""
        ...


def make_context(width: int, height: int) -> tuple[str, GLContext]:
    """Create a context for images of up to ``width`` times ``height`` pixels.

    Returns:
        The backend, one of ``BACKENDS``, and the context.

    Raises:
        RenderingUnavailable: No backend works here.
    """
    name = choose_backend()
    try:
        with _glfw_errors() as messages:
            import_mujoco()
            module: Any = importlib.import_module(f"mujoco.{name}")
            context: GLContext = module.GLContext(width, height)
            context.make_current()
            if name == "glfw" and getattr(context, "_context", None) is None:
                raise RenderingUnavailable("; ".join(messages) or "no window could be created")
    except Exception as error:  # a driver may raise anything
        raise RenderingUnavailable(broken(name, error)) from error
    return name, context


def choose_backend() -> str:
    """Choose one of ``BACKENDS`` for this process and its future child processes.

    Writes ``MUJOCO_GL`` and ``PYOPENGL_PLATFORM``; leaves both unchanged where it raises.

    Raises:
        RenderingUnavailable: None works here; says what was tried, and what to install or unset.
    """
    if _unavailable:
        raise RenderingUnavailable(_unavailable[0])
    requested = os.environ.get("MUJOCO_GL", "")
    chosen = requested.strip().lower()
    chosen = "glfw" if chosen == "glx" else chosen
    platform = os.environ.get("PYOPENGL_PLATFORM", "").strip().lower()
    if chosen in DISABLED_VALUES:
        raise RenderingUnavailable(
            f"rendering is switched off: MUJOCO_GL={chosen}; unset it to render"
        )
    if chosen not in (*BACKENDS, *AUTO_VALUES):
        raise RenderingUnavailable(
            f"MUJOCO_GL: got {requested!r}, expected one of {', '.join(BACKENDS)}; "
            "unset it to choose automatically"
        )
    reasons = []
    for name in (chosen,) if chosen in BACKENDS else BACKENDS:
        if platform and name not in ("glfw", platform):
            reason: str | None = f"excluded by PYOPENGL_PLATFORM={platform}"
        else:
            reason = _probe(name)
        if reason is None:
            os.environ["MUJOCO_GL"] = name
            if name != "glfw":
                os.environ["PYOPENGL_PLATFORM"] = name
            _chosen.add(name)
            return name
        reasons.append(f"{name}: {reason}")
    raise RenderingUnavailable(f"no rendering backend works ({'; '.join(reasons)}). {_remedy()}")


def _remedy() -> str:
    """Say which variables to unset if that helps, else what to install."""
    variables = [name for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM") if os.environ.get(name)]
    works = next((name for name in BACKENDS if variables and _probe(name) is None), None)
    return INSTALL if works is None else f"{works} works here: unset {' and '.join(variables)}"


def _probe(name: str) -> str | None:
    """Return why backend ``name`` cannot be used, or None if it can."""
    loaded = "" if name == "glfw" else _loaded_platform()
    if loaded not in ("", name):
        return (
            f"PyOpenGL was already imported for {loaded} in this process; "
            f"PYOPENGL_PLATFORM={name} would prevent that"
        )
    return _PROBES[name]()


def why_not() -> str:
    """Return why rendering is impossible, or "" if it is possible.

    As ``choose_backend``, for callers that may not need to render. Where rendering is impossible,
    this switches it off for the process. A library imported later then fails when it renders, not
    already when it is imported.
    """
    if _unavailable:
        return _unavailable[0]
    try:
        choose_backend()
    except RenderingUnavailable as error:
        _unavailable.append(str(error))
        os.environ["MUJOCO_GL"] = "disable"
        return str(error)
    return ""


def broken(name: str, error: Exception) -> str:
    """Return the error message for a backend that was found but does not work."""
    return (
        f"{name} was found and does not work ({one_line(error) or type(error).__name__}). "
        f"Set MUJOCO_GL to another one of {', '.join(BACKENDS)}. {INSTALL}"
    )


def one_line(error: object) -> str:
    """Return the text of ``error`` without its line breaks."""
    return " ".join(str(error).split())


def import_mujoco() -> Any:
    """Import the module mujoco, whatever ``MUJOCO_GL`` says.

    A plain import also imports the rendering backend, and fails where that is missing, even for
    callers that only need the physics.

    Raises:
        EnvError: mujoco is not installed.
    """
    requested = os.environ.get("MUJOCO_GL")
    if "mujoco" in sys.modules or requested is None or requested in _chosen:
        return _mujoco()
    del os.environ["MUJOCO_GL"]
    try:
        return _mujoco()
    finally:
        os.environ["MUJOCO_GL"] = requested


def _mujoco() -> Any:
    try:
        return importlib.import_module("mujoco")
    except ModuleNotFoundError as error:
        raise EnvError(f"{error.name} is not installed: pip install '.[sim]'") from error


def _loaded_platform() -> str:
    """Return the platform that PyOpenGL was already imported for; "" where it was not imported."""
    loaded: Any = sys.modules.get("OpenGL.platform")
    name = type(getattr(loaded, "PLATFORM", None)).__name__.removesuffix("Platform").lower()
    return "" if name == "nonetype" else name


@contextlib.contextmanager
def _glfw_errors() -> Iterator[list[str]]:
    """Collect what GLFW reports as text instead of as warnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield messages
        finally:
            messages += [one_line(w.message) for w in caught if "GLFW" in type(w.message).__name__]
    for warning in caught:
        if "GLFW" not in type(warning.message).__name__:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _probe_egl() -> str | None:
    """Return why EGL cannot be used, or None.

    Initializes a display as mujoco will. Does not terminate it: that would end every other EGL
    context in this process.
    """
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError as error:
        return str(error)
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglInitialize.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    query_address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_address = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query_address or not display_address:
        return "libEGL.so.1 has no device extensions"
    query_devices = ctypes.CFUNCTYPE(
        ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)
    )(query_address)
    get_display = ctypes.CFUNCTYPE(
        ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p
    )(display_address)
    devices = (ctypes.c_void_p * MAX_EGL_DEVICES)()
    count = ctypes.c_int(0)
    if not query_devices(MAX_EGL_DEVICES, devices, ctypes.byref(count)) or count.value == 0:
        return "libEGL.so.1 found no device (is a Mesa or vendor driver installed?)"
    candidates = list(devices[: count.value])
    number = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    if number is not None:
        if not number.isdecimal() or int(number) >= count.value:
            return (
                f"MUJOCO_EGL_DEVICE_ID: got {number!r}, expected 0 to {count.value - 1}, or unset"
            )
        candidates = [candidates[int(number)]]
    for device in candidates:
        display = get_display(EGL_PLATFORM_DEVICE_EXT, device, None)
        if display and egl.eglInitialize(display, None, None):
            return None
    return f"none of {len(candidates)} EGL devices can be initialized"


def _probe_osmesa() -> str | None:
    """Return why OSMesa cannot be loaded, or None."""
    reason = ""
    for library in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        try:
            ctypes.CDLL(library)
        except OSError as error:
            reason = reason or str(error)
        else:
            return None
    return reason


def _probe_glfw() -> str | None:
    """Return why no window can be created, or None. Initializes GLFW, as mujoco will."""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "no screen (DISPLAY is not set)"
    try:
        with _glfw_errors() as messages:
            import glfw

            if glfw.init():
                return None
    except Exception as error:  # a missing library shows as one of several exception types
        return f"{type(error).__name__}: {one_line(error)}"
    return "; ".join(messages) or "GLFW cannot be initialized"


_PROBES: dict[str, Callable[[], str | None]] = {
    "egl": _probe_egl,
    "osmesa": _probe_osmesa,
    "glfw": _probe_glfw,
}
