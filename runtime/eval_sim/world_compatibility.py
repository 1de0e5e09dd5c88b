"""Checks that a policy fits a simulated world."""

from __future__ import annotations

import math

from envs.world import World
from policies.types import Policy, PolicyContract
from runtime.control.observation_history import stack_ticks
from runtime.errors import RuntimeFault
from runtime.protocol import messages


def check_world(world: World, policy: Policy, contract: PolicyContract) -> None:
    """Check observations, actions and rate of ``world`` against ``contract``.

    A server checks the observations at the handshake, and does not know the world's actions and
    rate. The last step is one uncounted inference, which opens the session and warms up.

    Args:
        contract: The policy's contract at the rate used.

    Raises:
        ContractMismatch: Cameras, image sizes, dtypes or state length differ.
        RuntimeFault: The world's rate or actions differ from the policy's; the message has both.
        PolicyError, ServerLost, RequestTimeout: The inference failed.
    """
    world.reset(0)
    obs = stack_ticks([world.observe()] * contract.n_obs_steps)
    messages.check_observation_schema(messages.observation_schema(obs), contract)
    if world.action_dim != contract.action_dim:
        raise RuntimeFault(
            f"action_dim: the world has {world.action_dim}, the policy was trained with "
            f"{contract.action_dim}"
        )
    control = (contract.ctrl_space, contract.ctrl_type)
    if world.control is not None and control != world.control:
        raise RuntimeFault(
            f"control: the policy commands {control}, the world takes {world.control}"
        )
    if contract.first_action_offset:
        raise RuntimeFault(
            f"first_action_offset: got {contract.first_action_offset}, expected 0: a simulated "
            "episode starts with the first observation's own tick"
        )
    policy_hz, world_hz = 1 / contract.dt_s, 1 / world.dt_s
    if not math.isclose(policy_hz, world_hz, rel_tol=1e-6):
        raise RuntimeFault(
            f"control rate: the policy's actions are 1/{policy_hz:g} s apart, the world runs at "
            f"{world_hz:g} Hz; expected the same (--fps overrides the policy's)"
        )
    policy.infer(obs)
