"""Loads what ``-m`` names: a checkpoint, a factory's policy, or another system's server."""

from __future__ import annotations

from policies.types import Policy
from runtime.options.checkpoint import CheckpointOptions
from runtime.options.model_name import LocalModel, UpstreamModel
from runtime.options.upstream import UpstreamOptions


def load_model(
    model: LocalModel | UpstreamModel, checkpoint: CheckpointOptions, upstream: UpstreamOptions
) -> Policy:
    """Load the policy. Raises ``PolicyError``: as ``load_policy`` and ``load_upstream``."""
    if isinstance(model, LocalModel):
        return checkpoint.load(model.name)
    from runtime.upstream.load import load_upstream

    return load_upstream(model, upstream)


def model_flags(
    model: LocalModel | UpstreamModel, checkpoint: CheckpointOptions, upstream: UpstreamOptions
) -> list[str]:
    """Return the command line with which a server loads the same policy."""
    options = checkpoint if isinstance(model, LocalModel) else upstream
    return ["-m", model.name, *options.to_argv()]
