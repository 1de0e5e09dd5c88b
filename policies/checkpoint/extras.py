"""Reads ``metronome.yaml`` (or ``.json``) beside a checkpoint: what its own layout cannot express.

The file and every key in it are optional. The original's layout needs ``camera_names`` and
``n_heads`` from here or from the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from policies.errors import CheckpointError, PolicyError
from policies.execution import COEFFICIENT, Assumption, Execution, check_strategy
from policies.number_ranges import COUNT, LATENCY_MS, PERIOD_S, TICKS
from policies.types import CameraContract, Pixels, Rendering
from policies.yaml_config import InvalidConfig, load_config

FILE_NAMES = ("metronome.yaml", "metronome.json")

DEFAULT_IMAGE_HW = (480, 640)
"""(height, width) where nothing else says it. ACT is fully convolutional, and most layouts do not
say what size it was trained on.
"""


@dataclass(frozen=True, slots=True)
class ExecutionKeys:
    """The keys of ``execution:``, see ``policies.execution.Execution``.

    Raises:
        ValueError: An unknown strategy, or a coefficient that it does not take.
    """

    action_manager: str
    manager_coef: Annotated[float, COEFFICIENT] | None = None
    n_action_steps: Annotated[int, TICKS] | None = None
    max_latency_ms: Annotated[float, LATENCY_MS] | None = None

    def __post_init__(self) -> None:
        check_strategy(self.action_manager, self.manager_coef)


@dataclass(frozen=True, slots=True)
class Extras:
    """The content of ``metronome.yaml``.

    Attributes:
        camera_names: In the order of the model's inputs.
        n_heads: Heads of the transformer's attention.
        image_hw: (height, width) of every camera's images if they are neither cropped nor resized.
        cameras: Source size, crop and resize of each camera; excludes ``image_hw``.
        dt_s: Seconds per policy tick; None where it is not given.
        rendering: How the training images were rendered.
        n_action_steps: Actions of a chunk to execute before the next.
        execution: How to execute chunks: ``action_manager``; ``manager_coef`` and
            ``n_action_steps`` where they differ from the strategy's defaults; ``max_latency_ms``
            where it was measured.
        state_names, action_names: Of the dimensions, in the order of the training.
        trained: False for weights that were only initialized.
        action_statistics: Which statistics in ``dataset_stats.pkl`` normalize actions, where the
            original's layout leaves that open.
        training: Data, recipe and numbers for people; no code reads it.
    """

    camera_names: tuple[str, ...] | None = None
    n_heads: Annotated[int, COUNT] | None = None
    image_hw: tuple[Pixels, Pixels] | None = None
    cameras: tuple[CameraContract, ...] | None = None
    dt_s: Annotated[float, PERIOD_S] | None = None
    rendering: Rendering | None = None
    n_action_steps: Annotated[int, TICKS] | None = None
    execution: ExecutionKeys | None = None
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    trained: bool = True
    action_statistics: Literal["action", "qpos"] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def recommended(self) -> Execution | None:
        """Return how to execute chunks, if the file says it."""
        if self.execution is not None:
            steps = self.execution.n_action_steps
            return Execution(
                self.execution.action_manager,
                self.execution.manager_coef,
                self.n_action_steps if steps is None else steps,
                f"{FILE_NAMES[0]}: execution",
                self.execution.max_latency_ms,
            )
        if self.n_action_steps is not None:
            return Execution(
                "sequential",
                n_action_steps=self.n_action_steps,
                source=f"{FILE_NAMES[0]}: n_action_steps",
            )
        return None

    def assumed_sizes(self, image_hw: tuple[int, int] | None) -> tuple[Assumption, ...]:
        """What ``camera_contracts`` had to assume."""
        if image_hw is not None or self.image_hw is not None or self.cameras:
            return ()
        height, width = DEFAULT_IMAGE_HW
        return (Assumption("picture size", f"{height}x{width}", "--image_hw"),)

    def camera_contracts(
        self, names: tuple[str, ...], image_hw: tuple[int, int] | None, source: Path
    ) -> tuple[CameraContract, ...]:
        """Return a contract for each of ``names``; ``image_hw``, if given, wins over the file.

        Raises:
            CheckpointError: ``cameras`` has other names or several model sizes, or contradicts an
                ``image_hw`` of the argument or of the file.
        """
        if self.cameras is not None:
            by_name = {camera.name: camera for camera in self.cameras}
            if set(by_name) != set(names):
                raise CheckpointError(
                    f"{source}: cameras: got {sorted(by_name)}, expected {sorted(names)}"
                )
            cameras = tuple(by_name[name] for name in names)
            self._check_image_hw(image_hw, source)
            sizes = {camera.model_hw for camera in cameras}
            if len(sizes) > 1:
                raise CheckpointError(
                    f"{source}: cameras: got model sizes {sorted(sizes)}, expected one for all"
                )
            return cameras
        size = image_hw or self.image_hw or DEFAULT_IMAGE_HW
        return tuple(CameraContract(name, source_hw=size, model_hw=size) for name in names)

    def _check_image_hw(self, image_hw: tuple[int, int] | None, source: Path) -> None:
        """Raise ``CheckpointError`` where ``cameras`` and an ``image_hw`` contradict each other."""
        for text, size in (("--image_hw {} {}", image_hw), ("image_hw [{}, {}]", self.image_hw)):
            if size is None:
                continue
            for camera in self.cameras or ():
                if camera.crop is not None or not camera.source_hw == camera.model_hw == size:
                    raise CheckpointError(
                        f"{source}: got {text.format(*size)} beside cameras of {FILE_NAMES[0]}, of "
                        f"which {camera.name!r} has a crop or another size; expected one of them"
                    )


def read_extras(folder: Path, given: Path | None = None) -> Extras:
    """Return what the file in ``folder`` says, or the defaults if there is none.

    Args:
        folder: The folder that holds the weights.
        given: The folder that the user named, where ``folder`` is below it; searched too.

    Raises:
        CheckpointError: Two such files, a file of another name that begins with ``metronome.``, an
            unknown key, a value of the wrong type.
    """
    folders = dict.fromkeys((folder, given or folder))
    for path in (path for each in folders for path in sorted(each.glob("[mM]etronome.*"))):
        # Editors leave backup files like name.yaml~.
        if path.name not in FILE_NAMES and not path.name.endswith("~") and path.is_file():
            raise CheckpointError(f"{path}: got this name, expected one of {list(FILE_NAMES)}")
    found = [each / name for each in folders for name in FILE_NAMES if (each / name).is_file()]
    if not found:
        return Extras()
    if len(found) > 1:
        raise CheckpointError(f"got both {found[0]} and {found[1]}, expected one")
    try:
        return load_config(Extras, str(found[0]), kind="policy")
    except (InvalidConfig, PolicyError) as error:
        raise CheckpointError(f"{error}") from error
