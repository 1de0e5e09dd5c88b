"""A policy is played alike in process and served: ``RolloutPolicyContract`` for each."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from contracts.rollout_policy import RolloutPolicyContract

from policies.types import PolicyInfo, RolloutPolicy
from runtime.eval_sim.in_process_policy import InProcessPolicy
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import ToyPolicy


class TestInProcess(RolloutPolicyContract):
    transport = "in process"

    @pytest.fixture
    def policy(self) -> RolloutPolicy:
        return InProcessPolicy(ToyPolicy())


class TestOverSharedMemory(RolloutPolicyContract):
    transport = "shm"

    @pytest.fixture
    def policy(self) -> Iterator[RolloutPolicy]:
        with serving(ToyPolicy()) as server, connect(server, self.transport) as client:
            yield client


class TestOverZmq(TestOverSharedMemory):
    transport = "zmq"


def test_closing_it_closes_the_policy_it_wraps() -> None:
    closed: list[bool] = []

    class Closing(ToyPolicy):
        def close(self) -> None:
            closed.append(True)

    InProcessPolicy(Closing()).close()
    assert closed == [True]


def test_a_policy_on_a_gpu_is_not_said_to_be_deterministic() -> None:
    policy = ToyPolicy()
    policy.info = PolicyInfo("toy", device="cuda:0")
    assert not InProcessPolicy(policy).deterministic
