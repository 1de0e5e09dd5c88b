"""A policy that loses its device for good when it is asked to: ``python:bench.lost_device:cuda``.

Everything else it does is the shipped checkpoint's.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from policies.checkpoint.load import load_policy
from policies.errors import DeviceLost
from policies.types import ActionChunk, MetaObs, Policy, PolicyContract, PolicyInfo

SHIPPED = Path(__file__).parents[1] / "ckpt" / "act_sim_transfer_cube_scripted_zscore_example"
TRIGGER = 12345.0
"""A state of this value is the last one that is computed."""


class LosesDevice:
    """Args:
    policy: Computes until then.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    @property
    def contract(self) -> PolicyContract:
        return self._policy.contract

    @property
    def info(self) -> PolicyInfo:
        return self._policy.info

    def infer(self, obs: MetaObs) -> ActionChunk:
        """Raises:
        DeviceLost: At ``TRIGGER``: on a GPU the engine itself finds the device lost.
        """
        if obs.state[0] == TRIGGER:
            self._lose()
        return self._policy.infer(obs)

    def reset(self) -> None:
        self._policy.reset()

    def fork(self) -> Policy:
        return self

    def close(self) -> None:
        self._policy.close()

    def _lose(self) -> None:
        if not self.info.device.startswith("cuda"):
            raise DeviceLost("the device is lost, as asked")
        import torch

        # An index out of range: the kernel's assertion ends the context. It is the engine that is
        # to find that out.
        values = torch.zeros(2, device=self.info.device)
        index = torch.full((1,), 10**6, device=self.info.device)
        with contextlib.suppress(RuntimeError):
            values[index].sum().item()


def cpu() -> Policy:
    return LosesDevice(load_policy(str(SHIPPED), device="cpu"))


def cuda() -> Policy:
    return LosesDevice(load_policy(str(SHIPPED), device="cuda"))
