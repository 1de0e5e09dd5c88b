"""Training: what it learns from, that it learns, that it can be interrupted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from tiny_act import observation

from policies.checkpoint.load import load_policy
from policies.checkpoint.save import save_lerobot
from policies.errors import CheckpointError
from policies.training import trainer
from policies.training.cvae import ActCvae, checkpoint_tensors, kl_divergence
from policies.training.dataset import Demonstrations
from policies.training.hdf5_episodes import Hdf5Episodes
from policies.training.trainer import Progress, TrainConfig, Trainer
from policies.types import CameraContract
from policies.yaml_config import InvalidConfig, load_config

CAMERA = CameraContract("top", source_hw=(40, 64), crop=(4, 0, 32, 32), model_hw=(32, 32))


@pytest.fixture
def demonstrations(tmp_path):
    """Three episodes of 12, 13 and 14 ticks: the action is where a bright square lies."""
    folder = tmp_path / "demonstrations"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for episode in range(3):
        ticks = 12 + episode
        at = rng.uniform(0, 1, 2)
        frames = rng.integers(0, 60, (ticks, 40, 64, 3), dtype=np.uint8)
        y, x = (at * 24).astype(int)
        frames[:, 4 + y : 12 + y, x : x + 8] = 255
        state = np.linspace(0, 1, ticks)[:, None] * [1, 2, 3]
        with h5py.File(folder / f"episode_{episode}.hdf5", "w") as file:
            file["observations/images/top"] = frames
            file["observations/qpos"] = state.astype(np.float32)
            file["action"] = (state[:, :2] + at).astype(np.float32)
            pose = np.tile([*at, 0.1, 1, 0, 0, 0], (ticks, 1))
            file["metronome/object_qpos"] = pose.astype(np.float32)
    return folder


def load(folder, **changes):
    return Demonstrations(Hdf5Episodes(folder), [CAMERA], chunk_size=5, **changes)


def config(folder, output, **changes):
    defaults = TrainConfig(
        task="reach",
        demonstrations=folder,
        output=output,
        cameras=(CAMERA,),
        chunk_size=5,
        width=16,
        n_heads=2,
        feedforward=16,
        n_encoder_layers=1,
        n_style_layers=1,
        steps=4,
        batch_size=4,
        warmup_steps=2,
        shift_px=0,
        save_every=2,
        stored_as="fp32",
    )
    return dataclasses.replace(defaults, **changes)


def test_chunks_end_with_their_episode(demonstrations):
    data = load(demonstrations)
    assert (len(data), data.episodes, data.images.shape) == (39, 3, (39, 1, 32, 32, 3))
    batch = data.batch(np.random.default_rng(0), 200)
    ramp = data.stats["action"]["std"][0], data.stats["action"]["mean"][0]
    assert batch.padded.any()
    assert not batch.padded[:, 0].any()
    assert (np.diff(batch.padded.astype(int), axis=1) >= 0).all()
    assert (batch.actions[batch.padded] == 0).all()
    physical = batch.actions[..., 0] * ramp[0] + ramp[1]
    steps = np.diff(physical, axis=1)[~batch.padded[:, 1:]]
    # Within an episode the action rises by 1/11 to 1/13 a tick; between two it would jump.
    assert (steps > 1 / 13 - 1e-4).all()
    assert (steps < 1 / 11 + 1e-4).all()


def test_batches_repeat_with_their_seed(demonstrations):
    data = load(demonstrations)
    first, again = (
        data.batch(np.random.default_rng(3), 8, shift_px=2, brightness=0.2) for _ in range(2)
    )
    for field in dataclasses.fields(first):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))


def test_augmentation_moves_and_brightens(demonstrations):
    data = load(demonstrations)
    plain, moved, bright = (
        data.batch(np.random.default_rng(3), 8, **kinds).images
        for kinds in ({}, {"shift_px": 2}, {"brightness": 0.2})
    )
    ratio = bright[plain > 50] / plain[plain > 50].astype(float)
    assert 0.75 <= ratio.min() < ratio.max() <= 1.2
    for before, after in zip(plain[:, 0], moved[:, 0], strict=True):
        shifts = [
            np.array_equal(before[2 + y : 30 + y, 2 + x : 30 + x], after[2:30, 2:30])
            for y in range(-2, 3)
            for x in range(-2, 3)
        ]
        assert any(shifts)


def test_bad_demonstrations_are_named(demonstrations, tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*.hdf5 episodes"):
        load(tmp_path)
    with h5py.File(demonstrations / "episode_1.hdf5", "a") as file:
        del file["metronome/object_qpos"]
    with pytest.raises(CheckpointError, match=r"episode_1.hdf5.*object_qpos"):
        load(demonstrations)
    assert load(demonstrations, with_objects=False).objects.shape == (39, 0)
    with h5py.File(demonstrations / "episode_1.hdf5", "a") as file:
        del file["action"]
        file["action"] = np.zeros((3, 2), np.float32)
    with pytest.raises(CheckpointError, match=r"episode_1.hdf5: got \[3, 13\] rows"):
        load(demonstrations, with_objects=False)


def test_divergence_is_zero_only_at_the_prior():
    zero = torch.zeros(2, 3)
    assert kl_divergence(zero, zero) == 0
    assert kl_divergence(zero + 1, zero) == pytest.approx(1.5)
    assert kl_divergence(zero, zero + 0.5) > 0


def test_padded_actions_count_for_nothing(demonstrations):
    torch.manual_seed(0)
    data = load(demonstrations)
    sizes = config(demonstrations, demonstrations, dropout=0.0).act(3, 2)
    net = ActCvae(sizes, objects_dim=3).eval()
    batch = data.batch(np.random.default_rng(1), 16)
    tensors = [torch.from_numpy(a) for a in (batch.images, batch.state)]
    rest = [torch.from_numpy(a) for a in (batch.padded, batch.objects)]
    losses = []
    for filler in (0.0, 100.0):
        actions = torch.from_numpy(np.where(batch.padded[..., None], filler, batch.actions))
        torch.manual_seed(1)
        losses.append(net(*tensors, actions.float(), *rest))
    torch.testing.assert_close(losses[0].l1, losses[1].l1)
    torch.testing.assert_close(losses[0].kl, losses[1].kl)


def test_it_learns(demonstrations, tmp_path):
    settings = config(
        demonstrations,
        tmp_path / "run",
        steps=25,
        save_every=25,
        batch_size=8,
        learning_rate=2e-3,
        dropout=0.0,
        brightness=0.0,
        kl_weight=None,
    )
    trainer = Trainer(settings, load(demonstrations))
    trainer.run()
    first, last = (np.mean([p.l1 for p in part]) for part in (trainer.history[:5],
                                                              trainer.history[-5:]))  # fmt: skip
    assert last < 0.6 * first


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(demonstrations, tmp_path):
    data = load(demonstrations)
    whole = Trainer(config(demonstrations, tmp_path / "whole", save_every=4), data)
    whole.run()

    class Stop(Exception):
        pass

    def stop_after_three(progress):
        if progress.step == 3:
            raise Stop

    parts = config(demonstrations, tmp_path / "parts")
    with pytest.raises(Stop):
        Trainer(parts, data).run(stop_after_three)
    resumed = Trainer(parts, data)
    assert resumed.step == 2
    resumed.run()
    assert [p.l1 for p in resumed.history] == [p.l1 for p in whole.history]
    for name in ("whole", "parts"):
        assert (tmp_path / name / trainer.CURVE_FILE).stat().st_size > 1000
        assert len((tmp_path / name / trainer.LOSS_FILE).read_text().splitlines()) == 5
    one, two = ((tmp_path / n / "policy" / "model.safetensors") for n in ("whole", "parts"))
    assert one.read_bytes() == two.read_bytes()


def test_a_state_of_another_net_is_refused(demonstrations, tmp_path):
    data = load(demonstrations)
    Trainer(config(demonstrations, tmp_path / "run", steps=1), data).run()
    with pytest.raises(CheckpointError, match=r"state.pt: not a state of this configuration"):
        Trainer(config(demonstrations, tmp_path / "run", width=32), data)


def test_what_is_exported_is_what_was_trained(demonstrations, tmp_path):
    asked = []

    def evaluate(folder):
        asked.append(load_policy(str(folder), device="cpu", threads=1).contract.n_action_steps)
        return 0.5

    settings = config(
        demonstrations, tmp_path / "run", save_every=4, evaluate_every=3, n_action_steps=2
    )
    trainer = Trainer(settings, load(demonstrations), evaluate)
    reports: list[Progress] = []
    trainer.run(reports.append)
    assert asked == [2, 2]
    assert [p.success for p in reports] == [None, None, 0.5, 0.5]
    policy = load_policy(
        str(tmp_path / "run" / "policy"), device="cpu", threads=1, precision="fp32"
    )
    assert policy.info.trained
    assert policy.contract.cameras == (CAMERA,)
    obs = observation(policy.contract)
    chunk = policy.infer(obs).actions

    net = ActCvae(trainer.act_config, objects_dim=3).eval()
    net.load_state_dict(trainer._average)
    image = torch.from_numpy(obs.images["top"][None, None, 4:36, :32].copy())
    data = trainer.data
    stats = {k: {n: np.array(v) for n, v in t.items()} for k, t in data.stats.items()}
    state = (obs.state - stats["state"]["mean"]) / stats["state"]["std"]
    with torch.no_grad():
        raw = net.model(image, torch.from_numpy(state.astype(np.float32))[None])[0].numpy()
    expected = raw * stats["action"]["std"] + stats["action"]["mean"]
    np.testing.assert_allclose(chunk, expected, atol=2e-5)

    save_lerobot(tmp_path / "lerobot", trainer.saved())
    other = load_policy(str(tmp_path / "lerobot"), device="cpu", threads=1, precision="fp32")
    np.testing.assert_allclose(other.infer(obs).actions, chunk, atol=2e-5)
    assert not any(key.startswith("aux") for key in checkpoint_tensors(net.state_dict()))


@pytest.mark.parametrize("task", ["sim_transfer_cube", "sim_insertion"])
def test_the_shipped_recipes_are_readable(task):
    settings = load_config(TrainConfig, f"act_{task}", kind="train")
    assert settings.task == task
    with pytest.raises(ValueError, match="steps: got 0, expected 1 to 1000000000"):
        dataclasses.replace(settings, steps=0)
    with pytest.raises(ValueError, match="cameras: expected at least one"):
        dataclasses.replace(settings, cameras=())


def test_a_backbone_for_each_camera_cannot_be_trained(tmp_path):
    """The checkpoint's layout has one backbone, so the recipe has no key for it."""
    recipe = Path("configs/train/act_sim_transfer_cube.yaml").resolve()
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.read_text() + "\nbackbone_per_camera: true\n")
    with pytest.raises(InvalidConfig, match="backbone_per_camera: unknown key, expected one of"):
        load_config(TrainConfig, str(path), kind="train")
