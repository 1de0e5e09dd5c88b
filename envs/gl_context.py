"""An OpenGL context without a screen: EGL, then OSMesa, then a window that is never shown.

``import mujoco`` picks a context class from ``MUJOCO_GL`` once and for all, PyOpenGL a platform
from ``PYOPENGL_PLATFORM`` likewise, and either dies with an unrelated exception where the library
is missing or the value is not its own. So the libraries are probed first, through ctypes, and the
class is imported directly. A user's own ``MUJOCO_GL`` is obeyed: then only that one is tried.

``settle`` writes what was chosen into both variables: environments of other packages (dm_control,
gymnasium's own) and child processes then choose the same, whoever imports mujoco first.
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
CHOOSE = ("", "on", "enable", "enabled", "true", "1")
"""Values of ``MUJOCO_GL`` that name no backend; mujoco takes GLFW for them, we what works."""
SWITCHED_OFF = ("disable", "disabled", "off", "false", "0")
INSTALL = (
    "Install a software renderer: "
    "apt-get install libegl1 libgl1-mesa-dri libopengl0, or apt-get install libosmesa6"
)


_settled: set[str] = set()
"""Backends that were chosen in this process."""
_unsettled: list[str] = []
"""Why none was, once somebody asked who may not need one."""


class GLContext(Protocol):
    """What mujoco's context classes have in common."""

    def make_current(self) -> None: ...
    def free(self) -> None: ...


def make_context(width: int, height: int) -> tuple[str, GLContext]:
    """The name of the backend (one of ``BACKENDS``) and a context of it.

    Raises:
        RenderingUnavailable: None works here.
    """
    name = settle()
    try:
        with _glfw_errors() as said:
            import_mujoco()
            module: Any = importlib.import_module(f"mujoco.{name}")
            context: GLContext = module.GLContext(width, height)
            context.make_current()
            if name == "glfw" and getattr(context, "_context", None) is None:
                raise RenderingUnavailable("; ".join(said) or "no window could be made")
    except Exception as error:  # anybody's driver
        raise RenderingUnavailable(broken(name, error)) from error
    return name, context


def settle() -> str:
    """Choose one of ``BACKENDS`` for this process and all that it starts from now on.

    Writes ``MUJOCO_GL`` and ``PYOPENGL_PLATFORM``; leaves them alone where it raises.

    Raises:
        RenderingUnavailable: None works here; says what was tried, and what to install or unset.
    """
    if _unsettled:
        raise RenderingUnavailable(_unsettled[0])
    wish = os.environ.get("MUJOCO_GL", "")
    chosen = wish.strip().lower()
    chosen = "glfw" if chosen == "glx" else chosen
    platform = os.environ.get("PYOPENGL_PLATFORM", "").strip().lower()
    if chosen in SWITCHED_OFF:
        raise RenderingUnavailable(
            f"rendering is switched off: MUJOCO_GL={chosen}; unset it to render"
        )
    if chosen not in (*BACKENDS, *CHOOSE):
        raise RenderingUnavailable(
            f"MUJOCO_GL: got {wish!r}, expected one of {', '.join(BACKENDS)}; "
            "unset it to have one chosen"
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
            _settled.add(name)
            return name
        reasons.append(f"{name}: {reason}")
    raise RenderingUnavailable(f"nothing to render with ({'; '.join(reasons)}). {_remedy()}")


def _remedy() -> str:
    wishes = [name for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM") if os.environ.get(name)]
    works = next((name for name in BACKENDS if wishes and _probe(name) is None), None)
    return INSTALL if works is None else f"{works} works here: unset {' and '.join(wishes)}"


def _probe(name: str) -> str | None:
    loaded = "" if name == "glfw" else _loaded_platform()
    if loaded not in ("", name):
        return (
            f"PyOpenGL was already imported for {loaded} in this process; "
            f"PYOPENGL_PLATFORM={name} would prevent that"
        )
    return _PROBES[name]()


def why_not() -> str:
    """As ``settle``, for those who may not need to render: why that is impossible, or nothing.

    Then rendering is switched off for this process, so that nobody imports a library that fails
    where it is imported, not where it is needed.
    """
    if _unsettled:
        return _unsettled[0]
    try:
        settle()
    except RenderingUnavailable as error:
        _unsettled.append(str(error))
        os.environ["MUJOCO_GL"] = "disable"
        return str(error)
    return ""


def broken(name: str, error: Exception) -> str:
    """What to say of a backend that was found and does not work."""
    return (
        f"{name} was found and does not work ({one_line(error) or type(error).__name__}). "
        f"Set MUJOCO_GL to another one of {', '.join(BACKENDS)}. {INSTALL}"
    )


def one_line(error: object) -> str:
    """The text of ``error`` without its line breaks."""
    return " ".join(str(error).split())


def import_mujoco() -> Any:
    """The module mujoco, whatever ``MUJOCO_GL`` says: importing it imports a backend, and fails
    where that is missing, also for those who only want its physics.

    Raises:
        EnvError: It is not installed.
    """
    wish = os.environ.get("MUJOCO_GL")
    if "mujoco" in sys.modules or wish is None or wish in _settled:
        return _mujoco()
    del os.environ["MUJOCO_GL"]
    try:
        return _mujoco()
    finally:
        os.environ["MUJOCO_GL"] = wish


def _mujoco() -> Any:
    try:
        return importlib.import_module("mujoco")
    except ModuleNotFoundError as error:
        raise EnvError(f"{error.name} is not installed: pip install '.[sim]'") from error


def _loaded_platform() -> str:
    """For which platform PyOpenGL was imported already; empty where it was not."""
    loaded: Any = sys.modules.get("OpenGL.platform")
    name = type(getattr(loaded, "PLATFORM", None)).__name__.removesuffix("Platform").lower()
    return "" if name == "nonetype" else name


@contextlib.contextmanager
def _glfw_errors() -> Iterator[list[str]]:
    """What GLFW reports, as text, instead of warnings."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield said
        finally:
            said += [one_line(w.message) for w in caught if "GLFW" in type(w.message).__name__]
    for warning in caught:
        if "GLFW" not in type(warning.message).__name__:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def _probe_egl() -> str | None:
    """Why EGL cannot be used, or None. Initializes a display as mujoco will, and leaves it so.

    It is not terminated afterwards: that would end the contexts of anyone else in this process.
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
    """Why no window can be made. Initializes GLFW, as mujoco will, and leaves it so."""
    if not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return "no screen (DISPLAY is not set)"
    try:
        with _glfw_errors() as said:
            import glfw

            if glfw.init():
                return None
    except Exception as error:  # what is missing is a library, by whatever exception
        return f"{type(error).__name__}: {one_line(error)}"
    return "; ".join(said) or "GLFW cannot be initialized"


_PROBES: dict[str, Callable[[], str | None]] = {
    "egl": _probe_egl,
    "osmesa": _probe_osmesa,
    "glfw": _probe_glfw,
}
