"""Whether a policy can be played in a simulated world."""

from __future__ import annotations

import math

from envs.world import World
from policies.types import Policy, PolicyContract
from runtime.errors import RuntimeFault
from runtime.protocol import messages


def check_world(world: World, policy: Policy, contract: PolicyContract) -> None:
    """Check what a server checks at the handshake, and what it cannot see.

    Ends with one request that nobody counts: it opens the session and warms everything up.

    Args:
        contract: The policy's, with the rate that the user gave where it does not say its own.

    Raises:
        ContractMismatch: Cameras, sizes, dtypes or state length.
        RuntimeFault: The world's tick or action is not the policy's; names both.
        PolicyError, ServerLost, RequestTimeout: From the request.
    """
    world.reset(0)
    obs = world.observe()
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
