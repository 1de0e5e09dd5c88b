"""Completes a checkpoint whose weights are folded as far as inference allows.

What reaches no action may be missing, and what is constant may be folded into its neighbour:

* ``latent_proj.weight``, where there is no style encoder: the latent is zero.
* ``CONSTANT_SELF_ATTENTION``: the first decoder layer attends to zeros, so its output is one
  vector, which the bias of the output projection can hold.
* Query rows of ``CROSS_ATTENTION``, where there is one decoder layer: its queries are the same for
  every observation, so ``query_pos`` can hold them. ``in_proj_weight`` and ``in_proj_bias`` have
  2D rows then, keys and values.
* A backbone's batch-norm: ``scale`` and ``shift``, y = scale * x + shift, instead of its four
  tensors. These names are its own, so that statistics that were lost are not taken for folded ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from policies.act.backbone import BATCH_NORM_EPS, BATCH_NORM_KEYS
from policies.act.config import ActConfig

CONSTANT_SELF_ATTENTION = tuple(
    f"decoder.0.self_attn.{name}" for name in ("in_proj_weight", "out_proj.weight", "in_proj_bias")
)
"""Each may be missing where those before it are: without the first the values are their bias, and
without the second that bias reaches nothing.
"""
CROSS_ATTENTION = "decoder.0.multihead_attn"


def complete(
    tensors: Mapping[str, Tensor], keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]], config: ActConfig,
) -> dict[str, Tensor]:  # fmt: skip
    """Return ``tensors`` with all that may be missing or folded; the others are not changed.

    Args:
        tensors: By foreign names.
        keys: Foreign names to ``ActModel``'s.
        shapes: Of ``ActModel``'s tensors.
        config: Sizes.
    """
    completed = dict(tensors)
    foreign_names = {internal: foreign for foreign, internal in keys.items()}
    for internal in _may_be_missing({keys[key] for key in tensors.keys() & keys.keys()}):
        completed.setdefault(foreign_names[internal], torch.zeros(shapes[internal]))
    if config.n_decoder_layers == 1:
        for part in ("in_proj_weight", "in_proj_bias"):
            _complete_queries(completed, foreign_names[f"{CROSS_ATTENTION}.{part}"], config.width)
    for foreign in keys:
        if foreign.endswith(".running_mean"):
            _complete_batch_norm(completed, foreign.removesuffix(".running_mean"))
    return completed


def _may_be_missing(stored: set[str]) -> list[str]:
    names = []
    for name in CONSTANT_SELF_ATTENTION:
        if name in stored:
            break
        names.append(name)
    if not any(name.startswith("style.") for name in stored):
        names.append("latent_proj.weight")
    return names


def _complete_queries(tensors: dict[str, Tensor], name: str, width: int) -> None:
    """Project the queries by the identity, without a bias."""
    stored = tensors.get(name)
    if stored is not None and stored.shape in ((2 * width, width), (2 * width,)):
        queries = torch.eye(width) if stored.ndim == 2 else torch.zeros(width)
        tensors[name] = torch.cat((queries, stored))


def _complete_batch_norm(tensors: dict[str, Tensor], name: str) -> None:
    """Give a scale and a shift the statistics of numbers that need no normalization."""
    folded, whole = (f"{name}.scale", f"{name}.shift"), [f"{name}.{k}" for k in BATCH_NORM_KEYS]
    if any(key not in tensors for key in folded) or any(key in tensors for key in whole):
        return
    scale, shift = (tensors.pop(key) for key in folded)
    mean, var = torch.zeros_like(scale), torch.full_like(scale, 1 - BATCH_NORM_EPS)
    tensors.update(zip(whole, (scale, shift, mean, var), strict=True))
