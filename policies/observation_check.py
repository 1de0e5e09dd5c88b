"""Checks an observation against a policy's contract."""

from __future__ import annotations

import numpy as np

from policies.errors import ContractMismatch, ObservationError
from policies.types import MetaObs, PolicyContract


def check_observation(obs: MetaObs, contract: PolicyContract) -> None:
    """Check the cameras' names and the state of ``obs``; not the images.

    Raises:
        ContractMismatch: A camera is missing or unknown, or the state has another shape or dtype.
        ObservationError: NaN or infinity in the state.
    """
    names = contract.camera_names
    for name in names:
        if name not in obs.images:
            raise ContractMismatch(
                f"images.{name}", f"no such camera among {sorted(obs.images)}", f"{names}"
            )
    if len(obs.images) != len(names):
        extra = sorted(obs.images.keys() - set(names))[0]
        raise ContractMismatch(f"images.{extra}", "a picture", f"only {names}")
    shape = (*contract.obs_axes, contract.state_dim)
    state, expected = obs.state, f"float32 {shape}"
    if not isinstance(state, np.ndarray):
        raise ContractMismatch("state", type(state).__name__, expected)
    if state.shape != shape or state.dtype != np.float32:
        raise ContractMismatch("state", f"{state.dtype} {state.shape}", expected)
    if not np.isfinite(state).all():
        bad = np.flatnonzero(~np.isfinite(state.reshape(-1, shape[-1])).all(axis=0))
        raise ObservationError(
            f"state: got {state[..., bad]} in dimensions {bad.tolist()}, expected finite numbers"
        )
