"""The content of a checkpoint of any layout: sizes, weights under ``ActModel``'s names,
normalizers.

Loaders create it; engines and writers take it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from policies.act.backbone import fold_batch_norm
from policies.act.config import ActConfig
from policies.act.model import ActModel
from policies.execution import Assumption, Execution
from policies.normalizer import Normalizer, normalizer_hash
from policies.types import (
    UNSPECIFIED_DT_S,
    CameraContract,
    CtrlSpace,
    CtrlType,
    PolicyContract,
    Rendering,
)

RgbTriples = tuple[tuple[float, float, float], ...]
"""(r, g, b) for each camera."""


@dataclass(frozen=True, eq=False)
class ActWeights:
    """A loaded checkpoint. Its tensors do not change after ``digest`` was read.

    Attributes:
        config: Sizes.
        tensors: float32, by ``ActModel``'s names; also ``style.*`` where the checkpoint has the
            CVAE's encoder, which inference does not need.
        state_normalizer, action_normalizer: Maps between physical and the network's units.
        image_mean, image_std: (r, g, b) for each camera, of images scaled to [0, 1].
        cameras: In the order of the model's inputs.
        n_action_steps: Actions of a chunk to execute before the next.
        dt_s: Seconds per policy tick; None where the checkpoint does not say.
        ctrl_space, ctrl_type: Space and kind of the actions.
        dataset_id: Data set of these normalizers; ``dataset_ids``: all that the checkpoint has.
        rendering: How the training images were rendered, where the checkpoint says.
        trained: False for weights that were only initialized.
        state_names, action_names: Of the dimensions, in their order; empty where not specified.
        execution: How the checkpoint says to execute its chunks, if it does.
        assumed: What else it does not say.
    """

    config: ActConfig
    tensors: dict[str, Tensor]
    state_normalizer: Normalizer
    action_normalizer: Normalizer
    image_mean: RgbTriples
    image_std: RgbTriples
    cameras: tuple[CameraContract, ...]
    n_action_steps: int
    dt_s: float | None = None
    ctrl_space: CtrlSpace = "joint"
    ctrl_type: CtrlType = "abs"
    dataset_id: str = ""
    dataset_ids: tuple[str, ...] = field(default=())
    rendering: Rendering | None = None
    trained: bool = True
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    execution: Execution | None = None
    assumed: tuple[Assumption, ...] = ()

    def contract(self, chunk_size: int | None = None) -> PolicyContract:
        """Return the policy's contract, with chunks cut to ``chunk_size``."""
        chunk = self.config.chunk_size if chunk_size is None else chunk_size
        execution, steps = self.execution, self.n_action_steps
        if chunk_size is not None:  # no more steps than a cut chunk has
            steps = min(steps, chunk)
            if execution is not None and execution.n_action_steps is not None:
                execution_steps = min(execution.n_action_steps, chunk)
                execution = dataclasses.replace(execution, n_action_steps=execution_steps)
        return PolicyContract(
            policy_type="act",
            cameras=self.cameras,
            state_dim=self.config.state_dim,
            action_dim=self.config.action_dim,
            chunk_size=chunk,
            n_action_steps=steps,
            dt_s=UNSPECIFIED_DT_S if self.dt_s is None else self.dt_s,
            ctrl_space=self.ctrl_space,
            ctrl_type=self.ctrl_type,
            normalizer_hash=normalizer_hash(self.state_normalizer, self.action_normalizer),
            dataset_id=self.dataset_id,
            dataset_ids=self.dataset_ids,
            rendering=self.rendering,
            state_names=self.state_names,
            action_names=self.action_names,
            execution=execution,
            assumed=self.assumed,
        )

    @functools.cached_property
    def digest(self) -> bytes:
        """32 bytes that differ for other sizes, weights or normalizers; without the style encoder.

        The same in every layout and number format of the file that holds the same numbers.
        """
        state = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            if not name.startswith("style."):
                state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                state.update(tensor.contiguous().numpy().data)
        for value in (self.config, self.image_mean, self.image_std):
            state.update(f"{value!r}\n".encode())
        state.update(self.state_normalizer.digest() + self.action_normalizer.digest())
        return state.digest()

    def inference_model(self) -> ActModel:
        """Return the network for inference: batch-norm folded, no gradients, float32 on the CPU."""
        model = ActModel(
            self.config, image_mean=self.image_mean, image_std=self.image_std, folded=True
        )
        trunk = {k: v for k, v in self.tensors.items() if not k.startswith("style.")}
        model.load_state_dict(fold_batch_norm(trunk), strict=True)
        return model.eval().requires_grad_(False)


class _SkipRandomInit(TorchFunctionMode):
    """Skips random initialization.

    On the "meta" device torch would trace how it draws the numbers, and would load its compiler for
    that: two seconds of every start.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (
            Tensor.normal_,
            Tensor.uniform_,
        ):
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def parameter_shapes(config: ActConfig) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that inference needs, as ``ActModel`` has them.

    Allocates no memory for them.
    """
    with torch.device("meta"), _SkipRandomInit():
        model = ActModel(config)
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not name.endswith(".num_batches_tracked")
    }
