"""ILStudio's own client, unmodified, against our client.

Needs a copy of ILStudio: set METRONOME_ILSTUDIO to its folder and METRONOME_ILSTUDIO_PYTHON to a
Python with numpy<2 and torch. METRONOME_ILSTUDIO_SEEDS sets the number of episodes.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from envs.factory import load_env_config, make_world
from policies.types import MetaObs
from runtime.client import PolicyClient
from runtime.server.server_process import ServerProcess
from tests.gateway.gateways import ilstudio_gateway
from tests.gateway.ilstudio_peer import FOLDER, PYTHON, Peer, available
from tests.runtime.serving import connect, serving
from tests.runtime.toy_policy import CONTRACT, STATE_DIM, ToyPolicy

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not available(), reason=f"{FOLDER} and {PYTHON} are not set"),
]
CHECKPOINT = Path(__file__).parents[2] / "ckpt" / "act_sim_transfer_cube_scripted_zscore_example"
SEEDS = range(1000, 1000 + int(os.environ.get("METRONOME_ILSTUDIO_SEEDS", "20")))


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


def test_it_gets_the_actions_that_our_client_gets(peer: Peer) -> None:
    draw = np.random.default_rng(0)
    equal = 0
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(ToyPolicy()))
        address = f"{server.host}:{server.port}"
        gateway = stack.enter_context(ilstudio_gateway(address, CONTRACT))
        ours = stack.enter_context(connect(server))
        peer.connect("theirs", gateway.port)
        for t in range(100):
            image = draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            state = draw.normal(size=STATE_DIM).astype(np.float32)
            wanted = ours.infer(MetaObs({"top": image}, state, timestep=t)).actions
            got = peer.chunk("theirs", t, state[None], image.transpose(2, 0, 1)[None, None])
            assert got.dtype == np.float32
            equal += np.array_equal(got[:, 0], wanted)
    assert equal == 100


def test_its_batches_are_sessions_of_their_own(peer: Peer) -> None:
    with serving(ToyPolicy()) as server:
        address = f"{server.host}:{server.port}"
        with ilstudio_gateway(address, CONTRACT) as gateway:
            peer.connect("theirs", gateway.port)
            state = np.arange(3 * STATE_DIM, dtype=np.float32).reshape(3, -1)
            image = np.zeros((3, 1, 3, 24, 32), np.uint8)
            for t, asked in ((0, 1), (10, 2), (0, 1)):
                got = peer.chunk("theirs", t, state, image)
                assert got.shape == (10, 3, STATE_DIM)
                assert (got[:, :, 0] == asked).all()
                assert np.array_equal(got[0, :, 1:], state[:, 1:])


def test_it_raises_for_an_error(peer: Peer) -> None:
    with serving(ToyPolicy()) as server:
        address = f"{server.host}:{server.port}"
        with ilstudio_gateway(address, CONTRACT) as gateway:
            peer.connect("theirs", gateway.port)
            state, image = np.zeros((1, STATE_DIM), np.float32), np.zeros((1, 1, 3, 24, 32), "u1")
            with pytest.raises(RuntimeError, match="Server returned empty action list"):
                peer.select_action("theirs", 0, state[:, 1:], image)
            assert peer.select_action("theirs", 0, state, image).shape == (1, STATE_DIM)


def test_it_drives_our_world_as_our_client_does(peer: Peer) -> None:
    """By its own protocol: a queue, a new chunk when it is empty, a reset between episodes."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(ServerProcess(["-m", str(CHECKPOINT)]))
        ours = stack.enter_context(PolicyClient(server.address, timeout_s=30))
        contract = ours.contract
        gateway = stack.enter_context(ilstudio_gateway(server.address, contract))
        config = load_env_config("aloha")
        world = stack.enter_context(
            contextlib.closing(
                make_world(config, cameras=contract.cameras, rendering=contract.rendering)
            )
        )
        peer.connect("theirs", gateway.port, contract.chunk_size)
        actions: list[np.ndarray] = []

        def by_theirs(t: int) -> np.ndarray:
            # It needs no picture while its queue has actions, but takes one at every tick.
            obs = world.observe() if t % contract.chunk_size == 0 else None
            if obs is None:
                return peer.select_action("theirs", t, np.zeros((1, 1)), np.zeros((1, 1)))[0]
            image = np.stack([obs.images[name].transpose(2, 0, 1) for name in obs.images])
            return peer.select_action("theirs", t, obs.state[None], image[None])[0]

        def by_ours(t: int) -> np.ndarray:
            if t % contract.chunk_size == 0:
                obs = world.observe()
                obs.timestep = t
                actions[:] = ours.infer(obs).actions
            return actions.pop(0)

        def episode(seed: int, select: Callable[[int], np.ndarray]) -> tuple[bool, int, float]:
            world.reset(seed)
            for t in range(world.max_timesteps):
                step = world.step(select(t))
                if step.success or step.terminated:
                    break
            return step.success, t, step.highest_reward

        outcomes = []
        for seed in SEEDS:
            theirs = episode(seed, by_theirs)
            peer.reset("theirs")
            actions.clear()
            ours.reset()
            outcomes.append((seed, theirs, episode(seed, by_ours)))
            logging.getLogger(__name__).info("seed %d: theirs %s, ours %s", *outcomes[-1])
    assert [theirs for _, theirs, _ in outcomes] == [ours for _, _, ours in outcomes]
