"""Renders the cameras of a MuJoCo model into the caller's arrays."""

from __future__ import annotations

import atexit
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from envs.errors import EnvError, RenderingUnavailable, UnknownCamera
from envs.gl_context import broken, import_mujoco, make_context

if TYPE_CHECKING:
    import mujoco

MAX_GEOMS = 1000
"""Capacity of a scene; the ALOHA scenes have fewer than 100 geoms."""


class OffscreenRenderer:
    """One GL context and one copy of the model's meshes, for all cameras and image sizes.

    An image is drawn into the corner of one framebuffer, so cameras of different sizes share it.
    Use it only in the thread that created it.

    Args:
        model: Its ``vis`` section is changed to these options.
        max_hw: The largest (height, width) that will be rendered, in pixels.
        shadows: Whether lights cast shadows.
        msaa: Samples per pixel, 0 for none.

    Attributes:
        name: The backend, e.g. ``"egl"``.

    Raises:
        RenderingUnavailable: No rendering backend works here.
    """

    def __init__(
        self, model: mujoco.MjModel, *, max_hw: tuple[int, int], shadows: bool, msaa: int
    ) -> None:
        mj = import_mujoco()
        self._mj: Any = mj
        self._model = model
        self._max_hw = max_hw
        # MjrContext reads these once, when it allocates its buffers.
        model.vis.global_.offheight, model.vis.global_.offwidth = max_hw
        model.vis.quality.offsamples = msaa
        shadow_size = model.vis.quality.shadowsize
        model.vis.quality.shadowsize = shadow_size if shadows else 0
        self._gl: Any = None
        self.name, self._gl = make_context(max_hw[1], max_hw[0])
        # mujoco terminates EGL at exit. Freeing a context after that raises where nothing can
        # catch it. This handler is registered later, so it runs before mujoco's.
        reference = weakref.ref(self)
        self._at_exit = lambda: _close(reference)
        atexit.register(self._at_exit)
        self._gl.make_current()
        self._context: Any = None
        try:
            self._context = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_150.value)
        except mj.FatalError as error:
            self.close()
            raise RenderingUnavailable(broken(self.name, error)) from error
        finally:
            model.vis.quality.shadowsize = shadow_size  # another renderer may render shadows
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._scene = mj.MjvScene(model, maxgeom=MAX_GEOMS)
        self._scene.flags[mj.mjtRndFlag.mjRND_SHADOW] = shadows
        self._options = mj.MjvOption()
        self._camera = mj.MjvCamera()
        self._camera.type = mj.mjtCamera.mjCAMERA_FIXED
        self._scratch = np.empty(max_hw[0] * max_hw[1] * 3, np.uint8)

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The model's fixed cameras."""
        return camera_names(self._model)

    def render(self, data: mujoco.MjData, camera: str, out: NDArray[np.uint8]) -> None:
        """Render ``camera`` into ``out``: (H, W, 3) uint8 RGB, C-contiguous or not.

        Raises:
            UnknownCamera: No such camera.
            EnvError: ``out`` is not such an array or is larger than ``max_hw``; or after ``close``.
        """
        if self._gl is None:
            raise EnvError("the renderer is closed")
        mj = self._mj
        camera_id = mj.mj_name2id(self._model, mj.mjtObj.mjOBJ_CAMERA, camera)
        if camera_id < 0:
            raise UnknownCamera(f"camera: got {camera!r}, expected one of {self.camera_names}")
        if out.ndim != 3 or out.shape[2] != 3 or out.dtype != np.uint8:
            raise EnvError(f"picture: got {out.dtype} {out.shape}, expected uint8 (H, W, 3)")
        height, width = out.shape[:2]
        if height > self._max_hw[0] or width > self._max_hw[1]:
            raise EnvError(f"picture: got {(height, width)}, expected at most {self._max_hw}")
        # Another context of this process may have become current since the last call.
        self._gl.make_current()
        self._camera.fixedcamid = camera_id
        mj.mjv_updateScene(
            self._model,
            data,
            self._options,
            None,
            self._camera,
            mj.mjtCatBit.mjCAT_ALL.value,
            self._scene,
        )
        viewport = mj.MjrRect(0, 0, width, height)
        mj.mjr_render(viewport, self._scene, self._context)
        pixels = self._scratch[: height * width * 3].reshape(height, width, 3)
        mj.mjr_readPixels(pixels, None, viewport, self._context)
        # OpenGL's row 0 is the bottom row.
        np.copyto(out, pixels[::-1])

    def close(self) -> None:
        """Release the GL context. Idempotent."""
        if self._gl is not None:
            atexit.unregister(self._at_exit)
            self._gl.make_current()
            if self._context is not None:
                self._context.free()
            self._gl.free()
            self._gl = None


def _close(reference: weakref.ref[OffscreenRenderer]) -> None:
    renderer = reference()
    if renderer is not None:
        renderer.close()


def camera_names(model: mujoco.MjModel) -> tuple[str, ...]:
    """Return the fixed cameras of ``model``, in its order."""
    return tuple(model.camera(i).name for i in range(model.ncam))
