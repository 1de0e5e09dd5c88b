"""What every ``RolloutPolicy`` does. A test module subclasses it and provides ``policy``."""

from __future__ import annotations

import numpy as np
import pytest

from policies.types import MetaObs, Policy, RolloutPolicy
from tests.runtime.toy_policy import CONTRACT, STATE_DIM, observation


class RolloutPolicyContract:
    """``policy``: a fixture giving a ``ToyPolicy``, wherever it runs; ``transport``: where."""

    transport = ""

    def test_it_is_a_policy_of_the_toys_contract(self, policy: RolloutPolicy) -> None:
        assert isinstance(policy, Policy)
        assert policy.contract == CONTRACT
        assert policy.info.checkpoint == "toy"

    def test_it_says_how_observations_reach_it(self, policy: RolloutPolicy) -> None:
        policy.infer(observation())
        assert policy.transport == self.transport
        assert policy.transport_reason
        assert policy.pictures == "as they are"
        assert policy.deterministic

    def test_pictures_in_loaned_arrays_are_the_ones_it_sees(self, policy: RolloutPolicy) -> None:
        policy.infer(observation())
        for shade in (10, 200):
            images = policy.loan_images() or {"top": np.empty((24, 32, 3), np.uint8)}
            images["top"][:] = shade
            chunk = policy.infer(MetaObs(images=images, state=np.zeros(STATE_DIM, np.float32)))
            assert chunk.actions[0, 1] == pytest.approx(shade / 1000)

    def test_a_chunk_says_its_tick_and_how_long_it_took(self, policy: RolloutPolicy) -> None:
        chunk = policy.infer(observation(timestep=7))
        assert (chunk.obs_timestep, chunk.t_capture_ns) == (7, 12352)
        stages = [chunk.stages_ns[name] for name in ("preprocess", "infer", "postprocess")]
        assert stages == [1, 2, 3]

    def test_a_reset_forgets_the_episode(self, policy: RolloutPolicy) -> None:
        asked = [policy.infer(observation()).actions[0, 0] for _ in range(2)]
        policy.reset()
        assert [*asked, policy.infer(observation()).actions[0, 0]] == [1, 2, 1]

    def test_a_fork_has_an_episode_of_its_own(self, policy: RolloutPolicy) -> None:
        policy.infer(observation())
        fork = policy.fork()
        assert fork.infer(observation()).actions[0, 0] == 1
        fork.close()
        assert policy.infer(observation()).actions[0, 0] == 2

    def test_it_can_be_closed_twice(self, policy: RolloutPolicy) -> None:
        policy.close()
        policy.close()
