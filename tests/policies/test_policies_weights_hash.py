"""Equal weights and normalizers have equal hashes; nobody waits for one who need not."""

from __future__ import annotations

import dataclasses
import threading

import pytest
from safetensors.torch import load_file, save_file
from tiny_act import TINY

from policies.act.policy import ActPolicy
from policies.checkpoint.load import load_policy
from policies.checkpoint.untrained import random_weights
from policies.types import PolicyInfo
from policies.weights_hash import HASH_CHARACTERS, BackgroundHash, info_with_hash


def hash_of(weights):
    policy = ActPolicy(weights, device="cpu", engine="torch", precision="fp32", threads=1)
    return policy.weights_hash()


def test_other_weights_or_normalizers_have_another_hash():
    weights = random_weights(TINY)
    tensors = {**weights.tensors, "action_head.bias": weights.tensors["action_head.bias"] + 1}
    others = (
        dataclasses.replace(weights, tensors=tensors),
        dataclasses.replace(weights, state_normalizer=weights.action_normalizer),
        dataclasses.replace(weights, action_normalizer=weights.state_normalizer),
        dataclasses.replace(weights, image_mean=((0.0, 0.0, 0.0),) * 2),
    )
    assert len({other.digest for other in (weights, *others)}) == 5
    assert hash_of(weights) == hash_of(random_weights(TINY)) == weights.digest.hex()[:16]


def test_a_hash_does_not_depend_on_how_the_file_holds_the_numbers(tiny):
    def load():
        policy = load_policy(str(tiny), device="cpu", precision="fp32", threads=1)
        assert policy.info.weights_hash == ""  # reading it waits for nothing
        return info_with_hash(policy).weights_hash

    before = load()
    path = tiny / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)
    assert load() == before
    assert len(before) == HASH_CHARACTERS


def test_a_hash_is_computed_by_a_thread():
    gate = threading.Event()
    computed = BackgroundHash(lambda: "0a" if gate.wait(10) else "")
    gate.set()
    assert computed.wait() == "0a"


def test_files_that_are_gone_have_no_hash(caplog):
    def fail():
        raise OSError("no such file")

    assert BackgroundHash(fail).wait() == ""
    assert "no hash of its weights: no such file" in caplog.text


@pytest.mark.parametrize("said", ["", "of my own"])
def test_a_users_policy_says_its_hash_itself(said):
    class Users:
        info = PolicyInfo("users", weights_hash=said)

    assert info_with_hash(Users()).weights_hash == said
