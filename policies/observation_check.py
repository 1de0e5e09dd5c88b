"""Checks an observation against a policy's contract, before it is computed."""

from __future__ import annotations

import numpy as np

from policies.errors import ContractMismatch, ObservationError
from policies.types import MetaObs, PolicyContract


def check_observation(obs: MetaObs, contract: PolicyContract) -> None:
    """Check the cameras' names and the state; ``policies.image_resize`` checks the images.

    Raises:
        ContractMismatch: A camera is missing or too many, or the state is not float32 (S,).
        ObservationError: The state has a NaN or infinity.
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
    state, expected = obs.state, f"float32 ({contract.state_dim},)"
    if not isinstance(state, np.ndarray):
        raise ContractMismatch("state", type(state).__name__, expected)
    if state.shape != (contract.state_dim,) or state.dtype != np.float32:
        raise ContractMismatch("state", f"{state.dtype} {state.shape}", expected)
    bad = np.flatnonzero(~np.isfinite(state))
    if bad.size:
        raise ObservationError(
            f"state: got {state[bad]} in dimensions {bad.tolist()}, expected finite numbers"
        )
