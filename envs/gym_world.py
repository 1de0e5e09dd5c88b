"""Makes any gymnasium environment a ``World``, by a mapping of its keys."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.config import EnvConfig
from envs.errors import EnvError
from envs.gl_context import one_line, why_not
from envs.world import Pictures, RecordedObservation, StepResult, check_action
from policies.types import MetaObs

logger = logging.getLogger(__name__)

RENDER = "render()"
DEFAULT_DT_S = 0.02
DEFAULT_MAX_TIMESTEPS = 1000


class GymWorld:
    """A gymnasium environment, with the id ``config.task`` and the keys ``config.gym``.

    A ``Box`` action space gets the action unchanged. ``Discrete(n)`` gets the index of the largest
    of n numbers. Images in observations are rendered by the environment itself; ``render()`` is
    called when the world is observed.

    Args:
        config: A configuration of kind ``gym``.
        camera_hw: Camera name to the (height, width) that the policy expects; None for any size.

    Raises:
        EnvError: No such environment, a missing key or camera, an action space that is not a
            vector, or an image of another size.
    """

    control = None
    object_pose_names = ()

    def __init__(self, config: EnvConfig, camera_hw: Mapping[str, tuple[int, int] | None]) -> None:
        self.task, self.language = config.task, ""
        self.max_timesteps = (
            DEFAULT_MAX_TIMESTEPS if config.max_timesteps is None else config.max_timesteps
        )
        self._keys = config.gym
        self._source_cameras = {name: config.camera_map.get(name, name) for name in camera_hw}
        missing = sorted(set(self._source_cameras.values()) - self._keys.images.keys())
        if missing:
            raise EnvError(
                f"cameras: got {missing}, expected some of {list(self._keys.images)}; "
                f"--env.gym.images '{{{missing[0]}: {RENDER}}}' takes what render() returns"
            )
        self.camera_names = tuple(camera_hw)
        self._success_reward = config.success_reward
        kwargs = dict(self._keys.kwargs)
        kwargs.setdefault("render_mode", "rgb_array")
        # Before the environment imports a renderer: a broken one could not be replaced later.
        self._no_renderer = why_not()
        with self._wrapping_errors("make()"):
            import gymnasium

            self._env: Any = gymnasium.make(config.task, **kwargs)
        space: Any = self._env.action_space
        self._discrete = isinstance(space, gymnasium.spaces.Discrete)
        if self._discrete:
            self.action_dim, self._action_dtype = int(space.n), np.dtype(np.float32)
        elif isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1:
            self.action_dim, self._action_dtype = space.shape[0], space.dtype
        else:
            raise EnvError(f"gym:{config.task}: got the action space {space}, expected a "
                           "one-dimensional Box or Discrete")  # fmt: skip
        fps = self._env.metadata.get("render_fps")
        self._assumed: list[str] = []
        if config.dt_s is not None:
            self.dt_s = config.dt_s
        elif fps:
            self.dt_s = 1.0 / fps
        else:
            self.dt_s = DEFAULT_DT_S
            self._assumed.append(
                f"rate of the world {1 / DEFAULT_DT_S:g} Hz: it has no render_fps; "
                "--env.dt_s sets it"
            )
        self.reset(0)
        self.state_dim = len(self._state())
        self.camera_hw: dict[str, tuple[int, int]] = {}
        for name, expected in camera_hw.items():
            height, width = self._image(name).shape[:2]
            self.camera_hw[name] = (height, width)
            if expected is not None and (height, width) != tuple(expected):
                key = self._keys.images[self._source_cameras[name]]
                raise EnvError(
                    f"images.{name}: got {(height, width)} from {key!r}, expected {tuple(expected)}"
                )

    def reset(self, seed: int) -> None:
        """Start an episode; ``seed`` is the environment's. Raises ``EnvError``."""
        with self._wrapping_errors("reset()"):
            self._observation, _ = self._env.reset(seed=seed)
        self._timestep, self._highest_reward = 0, -np.inf

    def observe(self, out: Pictures | None = None) -> MetaObs:
        """Return the observation, with images (H, W, 3) uint8 and the state (S,) float32.

        Args:
            out: Camera name to an array into which its image is copied.

        Raises:
            EnvError: A key is missing, or an image has another shape or dtype.
        """
        captured_ns = time.monotonic_ns()
        images = {}
        for name in self.camera_names:
            image = self._image(name)
            target = None if out is None else out.get(name)
            if target is None:
                images[name] = np.ascontiguousarray(image)
            else:
                np.copyto(target, image)
                images[name] = target
        return MetaObs(
            images=images,
            state=self._state(),
            timestep=self._timestep,
            t_capture_ns=captured_ns,
        )

    def step(self, action: NDArray[np.float32]) -> StepResult:
        """Step the environment with ``action``, (A,) float32.

        Raises:
            EnvError: The action's shape is wrong, the environment fails, or ``info`` lacks the
                success key.
        """
        check_action(action, self.action_dim)
        command = int(np.argmax(action)) if self._discrete else action.astype(self._action_dtype)
        with self._wrapping_errors("step()"):
            self._observation, reward, terminated, truncated, info = self._env.step(command)
        self._timestep += 1
        self._highest_reward = max(self._highest_reward, float(reward))
        if self._keys.success is not None:
            if self._keys.success not in info:
                raise EnvError(
                    f"gym.success: got {self._keys.success!r}, expected one of {sorted(info)}"
                )
            success = bool(info[self._keys.success])
        else:
            success = self._success_reward is not None and reward >= self._success_reward
        return StepResult(
            reward=float(reward),
            highest_reward=self._highest_reward,
            success=success,
            terminated=bool(terminated),
            truncated=bool(truncated) or self._timestep >= self.max_timesteps,
        )

    def snapshot(self) -> object:
        """Return the current video frame: the state of an unknown environment cannot be saved."""
        return self.frame()

    def frame(self, snapshot: object = None) -> NDArray[np.uint8]:
        """Return a video frame, (H, W, 3) uint8: ``snapshot``'s, or the current one."""
        if isinstance(snapshot, np.ndarray):
            return snapshot
        if self.camera_names:
            return np.array(self._image(self.camera_names[0]))
        return np.array(self._render())

    def observation_snapshot(self) -> object:
        """Return the observation itself: the state of an unknown environment cannot be saved."""
        return RecordedObservation(
            images={name: np.array(self._image(name)) for name in self.camera_names},
            state=self._state(),
            objects=np.empty(0, np.float32),
        )

    def observe_snapshot(self, snapshot: object) -> RecordedObservation:
        """Return ``snapshot``. Raises ``TypeError``: it is not from ``observation_snapshot``."""
        if not isinstance(snapshot, RecordedObservation):
            raise TypeError(f"snapshot: got {type(snapshot).__name__}, expected an observation")
        return snapshot

    def info(self) -> dict[str, Any]:
        """Return the world's entry in a result file: versions, cameras, rate and assumptions."""
        import gymnasium

        return {
            "world": "gym",
            "task": self.task,
            "gymnasium": gymnasium.__version__,
            "cameras": {name: {"hw": list(hw)} for name, hw in self.camera_hw.items()},
            "max_timesteps": self.max_timesteps,
            "dt_s": self.dt_s,
            "assumed": self._assumed,
        }

    def close(self) -> None:
        """Close the environment; an error is logged, not raised."""
        try:
            self._env.close()
        except Exception as error:
            logger.warning("gym:%s: close() failed: %s", self.task, one_line(error))

    def _state(self) -> NDArray[np.float32]:
        keys = self._keys.state
        values = [self._lookup(key) for key in keys] if keys else [self._observation]
        if not keys and isinstance(self._observation, Mapping):
            raise EnvError(
                f"gym.state: got no keys, expected some of {list(self._observation)}, "
                "since the observation is a dictionary"
            )
        return np.concatenate([np.ravel(np.asarray(v, np.float32)) for v in values])

    def _image(self, name: str) -> NDArray[np.uint8]:
        key = self._keys.images[self._source_cameras[name]]
        image = self._render() if key == RENDER else np.asarray(self._lookup(key))
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise EnvError(
                f"images.{name}: got {image.dtype} {image.shape} from {key!r}, "
                "expected uint8 (H, W, 3)"
            )
        return image

    def _render(self) -> NDArray[np.uint8]:
        with self._wrapping_errors(RENDER):
            image = self._env.render()
        if image is None:
            raise EnvError(f"gym:{self.task}: render() returned nothing; it needs a render_mode")
        return np.asarray(image)

    @contextlib.contextmanager
    def _wrapping_errors(self, call: str) -> Iterator[None]:
        """Convert any exception of the environment to ``EnvError``, with a hint on rendering."""
        try:
            yield
        except Exception as error:
            logger.debug("gym:%s: %s failed", self.task, call, exc_info=True)
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            hint = f"; rendering: {self._no_renderer}" if self._no_renderer else ""
            _clear_frames(error)
            raise EnvError(
                f"gym:{self.task}: {call} failed: {kind}{one_line(error)}{hint}"
            ) from error

    def _lookup(self, dotted: str) -> Any:
        value = self._observation
        for key in dotted.split("."):
            if not isinstance(value, Mapping) or key not in value:
                there = list(value) if isinstance(value, Mapping) else f"a {type(value).__name__}"
                raise EnvError(f"gym: got the key {dotted!r}, expected {key!r} to be in {there}")
            value = value[key]
        return value


def _clear_frames(error: BaseException | None) -> None:
    """Free the objects in the frames of ``error``, and log what their ``__del__`` raises.

    A half-created viewer raises in ``__del__``; Python would print that later, with a traceback.
    """
    before = sys.unraisablehook
    sys.unraisablehook = lambda raised: logger.debug("%s: %s", raised.object, raised.exc_value)
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
    finally:
        sys.unraisablehook = before
