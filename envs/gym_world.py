"""Any gymnasium environment as a ``World``, by a mapping of its keys."""

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
from envs.world import Pictures, StepResult, check_action
from policies.types import MetaObs

logger = logging.getLogger(__name__)

RENDER = "render()"
DEFAULT_DT_S = 0.02
DEFAULT_MAX_TIMESTEPS = 1000


class GymWorld:
    """``config.task`` is the environment's id, ``config.gym`` the mapping.

    A ``Box`` action space takes the action as it is; ``Discrete(n)`` takes n numbers and plays the
    largest's index. The environment renders when it likes; a key that says ``render()`` is
    rendered when observed.

    Args:
        config: Of kind ``gym``.
        camera_hw: The policy's camera names to the (height, width) it expects; None for any.

    Raises:
        EnvError: No such environment, a key or camera that is not there, an action space that a
            vector cannot stand for, a picture of another size.
    """

    control = None

    def __init__(self, config: EnvConfig, camera_hw: Mapping[str, tuple[int, int] | None]) -> None:
        self.task, self.language = config.task, ""
        self.max_timesteps = (
            DEFAULT_MAX_TIMESTEPS if config.max_timesteps is None else config.max_timesteps
        )
        self._keys = config.gym
        self._pictures = {name: config.camera_map.get(name, name) for name in camera_hw}
        missing = sorted(set(self._pictures.values()) - self._keys.images.keys())
        if missing:
            raise EnvError(
                f"cameras: got {missing}, expected some of {list(self._keys.images)}; "
                f"--env.gym.images '{{{missing[0]}: {RENDER}}}' takes what render() returns"
            )
        self.camera_names = tuple(camera_hw)
        self._success_reward = config.success_reward
        kwargs = dict(self._keys.kwargs)
        kwargs.setdefault("render_mode", "rgb_array")
        # Before the environment's own code imports a renderer, and chooses a broken one for good.
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
                "--env.dt_s says it"
            )
        self.reset(0)
        self.state_dim = len(self._state())
        self.camera_hw: dict[str, tuple[int, int]] = {}
        for name, expected in camera_hw.items():
            height, width = self._picture(name).shape[:2]
            self.camera_hw[name] = (height, width)
            if expected is not None and (height, width) != tuple(expected):
                key = self._keys.images[self._pictures[name]]
                raise EnvError(
                    f"images.{name}: got {(height, width)} from {key!r}, expected {tuple(expected)}"
                )

    def reset(self, seed: int) -> None:
        with self._wrapping_errors("reset()"):
            self._observation, _ = self._env.reset(seed=seed)
        self._timestep, self._highest_reward = 0, -np.inf

    def observe(self, out: Pictures | None = None) -> MetaObs:
        captured_ns = time.monotonic_ns()
        images = {}
        for name in self.camera_names:
            picture = self._picture(name)
            target = None if out is None else out.get(name)
            if target is None:
                images[name] = np.ascontiguousarray(picture)
            else:
                np.copyto(target, picture)
                images[name] = target
        return MetaObs(
            images=images,
            state=self._state(),
            timestep=self._timestep,
            t_capture_ns=captured_ns,
        )

    def step(self, action: NDArray[np.float32]) -> StepResult:
        check_action(action, self.action_dim)
        played = int(np.argmax(action)) if self._discrete else action.astype(self._action_dtype)
        with self._wrapping_errors("step()"):
            self._observation, reward, terminated, truncated, info = self._env.step(played)
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
        return self.frame()  # an environment of unknown kind cannot be put back to this moment

    def frame(self, snapshot: object = None) -> NDArray[np.uint8]:
        if isinstance(snapshot, np.ndarray):
            return snapshot
        if self.camera_names:
            return np.array(self._picture(self.camera_names[0]))
        return np.array(self._rendered())

    def info(self) -> dict[str, Any]:
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

    def _picture(self, name: str) -> NDArray[np.uint8]:
        key = self._keys.images[self._pictures[name]]
        picture = self._rendered() if key == RENDER else np.asarray(self._lookup(key))
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise EnvError(
                f"images.{name}: got {picture.dtype} {picture.shape} from {key!r}, "
                "expected uint8 (H, W, 3)"
            )
        return picture

    def _rendered(self) -> NDArray[np.uint8]:
        with self._wrapping_errors(RENDER):
            picture = self._env.render()
        if picture is None:
            raise EnvError(f"gym:{self.task}: render() returned nothing; it needs a render_mode")
        return np.asarray(picture)

    @contextlib.contextmanager
    def _wrapping_errors(self, call: str) -> Iterator[None]:
        """Anyone's environment may raise anything; often its renderer is not there."""
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
    """Free what the frames of ``error`` hold: a viewer that was half made raises in ``__del__``,
    and Python would print that, with a traceback, whenever it came to it."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda raised: logger.debug("%s: %s", raised.object, raised.exc_value)
    try:
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
    finally:
        sys.unraisablehook = before
