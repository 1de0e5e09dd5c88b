"""An OpenGL context without a screen: EGL, then OSMesa.

``import mujoco`` picks a context class from ``MUJOCO_GL`` once and for all, PyOpenGL a platform
from ``PYOPENGL_PLATFORM`` likewise, and either dies with an unrelated exception where the library
is missing. So the libraries are probed first, through ctypes, and the class is imported directly.
A user's own ``MUJOCO_GL`` is obeyed: then only that one is tried. Environment variables are not
written, except for ``PYOPENGL_PLATFORM`` by mujoco itself.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable
from typing import Any, Protocol

from envs.errors import RenderingUnavailable

EGL_PLATFORM_DEVICE_EXT = 0x313F
MAX_EGL_DEVICES = 10


class GLContext(Protocol):
    """What mujoco's context classes have in common."""

    def make_current(self) -> None: ...
    def free(self) -> None: ...


def make_context(width: int, height: int) -> tuple[str, GLContext]:
    """The name of the backend (``"egl"``, ``"osmesa"``, ``"glfw"``) and a context of it.

    Raises:
        RenderingUnavailable: None works here.
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    if chosen in ("disable", "disabled", "off", "false", "0"):
        raise RenderingUnavailable(f"rendering is switched off: MUJOCO_GL={chosen}")
    names = [chosen] if chosen in ("egl", "osmesa", "glfw") else ["egl", "osmesa"]
    platform = os.environ.get("PYOPENGL_PLATFORM", "").strip().lower()
    reasons = []
    for name in names:
        if platform and name not in ("glfw", platform):
            reasons.append(f"{name}: excluded by PYOPENGL_PLATFORM={platform}")
            continue
        reason = _PROBES[name]()
        if reason is None:
            try:
                module: Any = importlib.import_module(f"mujoco.{name}")
                context: GLContext = module.GLContext(width, height)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                return name, context
        reasons.append(f"{name}: {reason}")
    raise RenderingUnavailable(
        "nothing to render with (" + "; ".join(reasons) + "). Install a software renderer: "
        "apt-get install libegl1 libgl1-mesa-dri libopengl0, or apt-get install libosmesa6"
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
    for device in devices[: count.value]:
        display = get_display(EGL_PLATFORM_DEVICE_EXT, device, None)
        if display and egl.eglInitialize(display, None, None):
            return None
    return f"none of {count.value} EGL devices can be initialized"


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


_PROBES: dict[str, Callable[[], str | None]] = {
    "egl": _probe_egl,
    "osmesa": _probe_osmesa,
    "glfw": lambda: None,
}
