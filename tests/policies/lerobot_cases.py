"""Tiny ACT policies that LeRobot itself writes and computes, to be compared with.

    PYTHON_WITH_LEROBOT tests/policies/lerobot_cases.py tests/policies/lerobot.tar.xz

makes or replaces this version's part of the archive that ``test_policies_lerobot.py`` reads: by
``VERSION/CASE``, the files as LeRobot saves them, without the weights, and what LeRobot makes of a
fixed observation. The weights are random numbers of a known seed, so that the test can make them
again. Of this project it needs nothing.
"""

from __future__ import annotations

import io
import json
import lzma
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

IMAGE, STATE, ACTION = "observation.images.", "observation.state", "action"
HW = (64, 96)
TINY = {
    "chunk_size": 6,
    "n_action_steps": 6,
    "dim_model": 32,
    "n_heads": 4,
    "dim_feedforward": 24,
    "n_encoder_layers": 2,
    "n_vae_encoder_layers": 1,
    "latent_dim": 8,
}
MODES = ("VISUAL", "STATE", "ACTION")


def modes(*each: str) -> dict[str, Any]:
    return {"normalization_mapping": dict(zip(MODES, each, strict=True))}


def case(**keys: Any) -> dict[str, Any]:
    """
    Keys:
        config: Of ``ACTConfig``, over ``TINY``.
        images, hw, state, action: The features; ``more`` are other ones.
        still: Dimensions of state and action that never moved.
        stats: Edits the statistics of the data.
        steps: Edits the two pipelines' steps before they are saved.
        since: The first version that can do it.
    """
    return {
        "config": {}, "images": ("front", "wrist"), "hw": HW, "state": 6, "action": 6, "more": {},
        "still": (), "stats": None, "steps": None, "since": "0.4", "black": (), **keys,
    }  # fmt: skip


def step_of(steps: Any, name: str) -> Any:
    return next(s for s in steps if type(s).__name__ == name)


def rename(**names: str) -> Any:
    def edit(pre: Any, post: Any) -> None:
        step_of(pre, "RenameObservationsProcessorStep").rename_map = {
            IMAGE + robots: IMAGE + policys for robots, policys in names.items()
        }

    return edit


def eps(value: float) -> Any:
    def edit(pre: Any, post: Any) -> None:
        step_of(pre, "NormalizerProcessorStep").eps = value
        step_of(post, "UnnormalizerProcessorStep").eps = value

    return edit


def only(*keys: str) -> Any:
    def edit(pre: Any, post: Any) -> None:
        step_of(pre, "NormalizerProcessorStep").normalize_observation_keys = set(keys)

    return edit


def float32(pre: Any, post: Any) -> None:
    steps = [step_of(s, "DeviceProcessorStep") for s in (pre, post)]
    for step in steps:
        step.float_dtype = "float32"
        step.__post_init__()


def no_operations(pre: Any, post: Any) -> None:
    from lerobot.processor.pipeline import IdentityProcessorStep
    from lerobot.processor.relative_action_processor import (
        AbsoluteActionsProcessorStep,
        RelativeActionsProcessorStep,
    )

    names = [f"joint_{i}" for i in range(6)]
    pre.insert(1, IdentityProcessorStep())
    pre.insert(0, RelativeActionsProcessorStep(exclude_joints=["joint_5"], action_names=names))
    post.append(AbsoluteActionsProcessorStep())


def nan_where_unused(stats: dict[str, Any]) -> None:
    nan = np.full(6, np.nan, np.float32)
    for feature in (STATE, ACTION):
        stats[feature].update(min=nan, max=nan[:2], q01=nan[None, None])
    stats["observation.effort"] = {"mean": nan, "std": nan}
    stats["index"] = {"mean": np.float32([np.inf])}


def without_unused(stats: dict[str, Any]) -> None:
    for feature in list(stats):
        stats[feature] = {k: stats[feature][k] for k in ("mean", "std")}


def flat_pictures(stats: dict[str, Any]) -> None:
    for feature in (f"{IMAGE}front", f"{IMAGE}wrist"):
        stats[feature] = {name: values.reshape(3) for name, values in stats[feature].items()}


def one_number_for_all(stats: dict[str, Any]) -> None:
    stats[STATE] = {name: values[:1] for name, values in stats[STATE].items()}
    stats[f"{IMAGE}front"] = {n: v[:1] for n, v in stats[f"{IMAGE}front"].items()}


def black_wrist(stats: dict[str, Any]) -> None:
    wrist = stats[f"{IMAGE}wrist"]
    for name in wrist:
        wrist[name] = np.zeros_like(wrist[name])


def no_statistics(stats: dict[str, Any]) -> None:
    stats.clear()


OTHER = {"observation.effort": ("STATE", (6,)), "observation.velocity": ("STATE", (6,))}
CASES: dict[str, dict[str, Any]] = {
    "as by default": case(),
    "one camera, 14 joints": case(images=("top",), state=14, action=14),
    "three cameras": case(images=("wrist", "front", "above")),
    "a camera without a name": case(images=("",)),
    "tall pictures": case(hw=(96, 64)),
    "names with dashes": case(images=("cam-high", "cam_Low")),
    "one dimension": case(state=1, action=1),
    "more actions than states": case(state=4, action=9),
    "other states": case(more=OTHER),
    "no variational encoder": case(config={"use_vae": False}),
    "gelu": case(config={"feedforward_activation": "gelu"}),
    "three decoder layers": case(config={"n_decoder_layers": 3}),
    "one encoder layer": case(config={"n_encoder_layers": 1, "n_vae_encoder_layers": 2}),
    "another width": case(config={"dim_model": 48, "n_heads": 8, "dim_feedforward": 40}),
    "another latent": case(config={"latent_dim": 3}),
    "resnet34": case(config={"vision_backbone": "resnet34"}, images=("top",)),
    "two of a chunk": case(config={"n_action_steps": 2}),
    "an ensemble": case(config={"n_action_steps": 1, "temporal_ensemble_coeff": 0.01}),
    "training and publishing": case(
        config={
            "kl_weight": 3.0, "dropout": 0.3, "optimizer_lr": 1e-4, "repo_id": "somebody/act",
            "tags": ["a"], "license": "mit", "private": True,
        }
    ),
    "min and max": case(config=modes("MEAN_STD", "MIN_MAX", "MIN_MAX")),
    "min and max of pictures": case(config=modes("MIN_MAX", "MIN_MAX", "MEAN_STD")),
    "quantiles": case(config=modes("MEAN_STD", "QUANTILES", "QUANTILES")),
    "quantiles of pictures": case(config=modes("QUANTILES", "MEAN_STD", "QUANTILES")),
    "tenth quantiles": case(config=modes("QUANTILE10", "QUANTILE10", "QUANTILE10")),
    "identity": case(config=modes("IDENTITY", "IDENTITY", "IDENTITY")),
    "identity without statistics": case(
        config=modes("IDENTITY", "IDENTITY", "IDENTITY"), stats=no_statistics
    ),
    "pictures as they are": case(config=modes("IDENTITY", "MEAN_STD", "MIN_MAX")),
    "no mode for actions": case(
        config={"normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX"}}
    ),
    "still": case(still=(1, 4)),
    "still, min and max": case(still=(1, 4), config=modes("MEAN_STD", "MIN_MAX", "MIN_MAX")),
    "still, quantiles": case(still=(0, 5), config=modes("MEAN_STD", "QUANTILES", "QUANTILES")),
    "still, tenth quantiles": case(still=(2,), config=modes("MEAN_STD", "MEAN_STD", "QUANTILE10")),
    "a black camera": case(stats=black_wrist, black=("wrist",)),
    "a large eps": case(steps=eps(0.05)),
    "a large eps, still, min and max": case(
        still=(1, 4), steps=eps(0.05), config=modes("MIN_MAX", "MIN_MAX", "MIN_MAX")
    ),
    "some observations": case(steps=only(STATE, f"{IMAGE}front")),
    "no observation": case(steps=only()),
    "a renamed camera": case(steps=rename(cam_high="front")),
    "two cameras for each other": case(steps=rename(front="wrist", wrist="front")),
    "a renamed camera nobody needs": case(steps=rename(cam_high="other")),
    "float32": case(steps=float32),
    "steps without effect": case(steps=no_operations, since="0.5"),
    "nan where unused": case(stats=nan_where_unused),
    "missing where unused": case(stats=without_unused),
    "flat statistics of pictures": case(stats=flat_pictures, since="0.6"),
    "one number for all dimensions": case(stats=one_number_for_all),
}  # fmt: skip


def feature_name(camera: str) -> str:
    return IMAGE + camera if camera else "observation.image"


def fill(shapes: dict[str, list[int]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights, of which every one counts; the same everywhere."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        rng = np.random.default_rng((seed, i))
        noise = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("running_var"):
            noise = np.exp(0.3 * noise)
        elif len(shape) > 1:
            noise *= np.float32((2 / np.prod(shape[1:])) ** 0.5)
        elif ".bn" in name and name.endswith("bn2.weight"):
            noise = 0.3 + 0.05 * noise
        elif "norm" in name or ".bn" in name or ".downsample.1" in name:
            noise = (name.endswith("weight") + 0.1 * noise).astype(np.float32)
        else:
            noise *= np.float32(0.1)
        weights[name] = noise.astype(np.float32)
    return weights


def statistics(name: str, given: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(len(name))
    stats: dict[str, dict[str, np.ndarray]] = {}

    def table(mean: np.ndarray, std: np.ndarray) -> dict[str, np.ndarray]:
        spread = {"min": -3, "max": 2.5, "q01": -2, "q10": -1.2, "q90": 1.3, "q99": 2.1}
        values = {"mean": mean, "std": std, **{k: mean + v * std for k, v in spread.items()}}
        return {k: v.astype(np.float32) for k, v in values.items()}

    for feature, dim in ((STATE, given["state"]), (ACTION, given["action"])):
        mean, std = rng.normal(0, 20, dim), rng.uniform(2, 30, dim)
        std[[i for i in given["still"] if i < dim]] = 0
        mean[list(given["still"])] = 0.5
        stats[feature] = table(mean, std)
        stats[feature]["count"] = np.int64([100])
    for camera in given["images"]:
        mean, std = rng.uniform(0.3, 0.6, (3, 1, 1)), rng.uniform(0.05, 0.12, (3, 1, 1))
        stats[feature_name(camera)] = table(mean, std)
    if given["stats"] is not None:
        given["stats"](stats)
    return stats


def observation(name: str, given: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(H, W, 3) uint8 pictures by the policy's names, and the state."""
    rng = np.random.default_rng(1000 + len(name))
    pictures = {
        camera: rng.integers(0, 256, (*given["hw"], 3), dtype=np.uint8)
        for camera in given["images"]
    }
    for camera in given["black"]:
        pictures[camera][:] = 0
    state = rng.normal(0, 20, given["state"]).astype(np.float32)
    # As near to what never moved as float32 allows: 12 deviations off.
    state[list(given["still"])] = np.nextafter(np.float32(0.5), np.float32(1)) + np.float32(6e-8)
    return pictures, state


def renamed(pre: Any, camera: str) -> str:
    """The robot's feature for the policy's ``camera``."""
    wanted = feature_name(camera)
    table = getattr(step_of(pre, "RenameObservationsProcessorStep"), "rename_map", {})
    return next((robots for robots, policys in table.items() if policys == wanted), wanted)


def write(name: str, given: dict[str, Any], folder: Path) -> dict[str, np.ndarray]:
    """LeRobot's files for a case, and what it computes."""
    import torch
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    inputs = {feature_name(c): ("VISUAL", (3, *given["hw"])) for c in given["images"]}
    inputs |= {STATE: ("STATE", (given["state"],)), **given["more"]}
    keys = {**TINY, **given["config"]}
    if "normalization_mapping" in keys:
        keys["normalization_mapping"] = {
            group: NormalizationMode(mode) for group, mode in keys["normalization_mapping"].items()
        }
    config = ACTConfig(
        device="cpu",
        pretrained_backbone_weights=None,
        input_features={k: PolicyFeature(FeatureType(t), s) for k, (t, s) in inputs.items()},
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (given["action"],))},
        **keys,
    )
    stats = {
        feature: {k: torch.from_numpy(v) for k, v in table.items()}
        for feature, table in statistics(name, given).items()
    }
    buffers = installed() < (0, 4)
    policy = ACTPolicy(config, **({"dataset_stats": stats} if buffers else {}))
    model = policy.model.state_dict(prefix="model.")
    shapes = {k: list(v.shape) for k, v in model.items()}
    filled = {k: torch.from_numpy(v) for k, v in fill(shapes).items()}
    policy.load_state_dict(filled, strict=not buffers)
    (folder / "shapes.json").parent.mkdir()
    (folder / "shapes.json").write_text(json.dumps(shapes))
    compute = compute_with_buffers if buffers else compute_with_processors
    try:
        return compute(name, given, folder, policy, stats)
    finally:
        (folder / "model.safetensors").unlink()


def compute_with_processors(
    name: str, given: dict[str, Any], folder: Path, policy: Any, stats: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Of 0.4 and later: the statistics are in files of their own."""
    import torch
    from lerobot.policies.factory import make_pre_post_processors

    config, kind = policy.config, type(policy)
    pre, post = make_pre_post_processors(config, dataset_stats=stats)
    if given["steps"] is not None:
        given["steps"](pre.steps, post.steps)
    policy.save_pretrained(folder)
    pre.save_pretrained(folder)
    post.save_pretrained(folder)

    policy = kind.from_pretrained(folder)
    pre, post = make_pre_post_processors(policy.config, pretrained_path=str(folder))
    pictures, state = observation(name, given)
    seen = {
        renamed(pre.steps, c): torch.from_numpy(p).permute(2, 0, 1).float() / 255
        for c, p in pictures.items()
    }
    seen |= {feature: torch.zeros(shape) for feature, (_, shape) in given["more"].items()}
    batch = pre({**seen, STATE: torch.from_numpy(state)})
    chunk = policy.predict_action_chunk(batch)
    return {
        "state": batch[STATE][0].numpy(),
        # A few pixels say how a picture is normalized.
        "pixels": np.stack(
            [batch[feature_name(c)][0, :, ::31, ::37].numpy() for c in given["images"]]
        ),
        "chunk": chunk[0].numpy(),
        "actions": post(chunk)[0].numpy(),
        "first": post(policy.select_action(batch))[0].numpy(),
    }


def compute_with_buffers(
    name: str, given: dict[str, Any], folder: Path, policy: Any, stats: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Up to 0.3: the statistics are among the weights."""
    import torch
    from safetensors.torch import load_file, save_file

    policy.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in saved.items() if not k.startswith("model.")},
        folder / "buffers.safetensors",
    )
    policy = type(policy).from_pretrained(folder)
    pictures, state = observation(name, given)
    seen = {
        feature_name(c): torch.from_numpy(p).permute(2, 0, 1).float()[None] / 255
        for c, p in pictures.items()
    }
    seen[STATE] = torch.from_numpy(state)[None]
    batch = policy.normalize_inputs(seen)
    with torch.no_grad():
        chunk = policy.model(
            {**batch, "observation.images": [batch[k] for k in pictures_of(policy)]}
        )
    return {
        "state": batch[STATE][0].numpy(),
        "pixels": np.stack([batch[k][0, :, ::31, ::37].numpy() for k in pictures_of(policy)]),
        "chunk": chunk[0][0].numpy(),
        "actions": policy.predict_action_chunk(seen)[0].numpy(),
        "first": policy.select_action(seen)[0].numpy(),
    }


def pictures_of(policy: Any) -> list[str]:
    return list(policy.config.image_features)


def installed() -> tuple[int, ...]:
    from importlib.metadata import version

    return tuple(map(int, version("lerobot").split(".")[:2]))


def possible(given: dict[str, Any]) -> bool:
    """Whether the version that is installed can do it."""
    if installed() >= (0, 4):
        return tuple(map(int, given["since"].split("."))) <= installed()
    known = {"MEAN_STD", "MIN_MAX", "IDENTITY"}
    asked = set(given["config"].get("normalization_mapping", {}).values())
    plain = given["steps"] is None and not given["more"]
    return plain and asked <= known and given["stats"] in (None, no_statistics, black_wrist)


def pack(out: Path, files: dict[str, bytes]) -> None:
    """By kind of file, then by case: the versions' files are nearly the same, and pack as one."""
    numbers = {
        "id": lzma.FILTER_LZMA2,
        "preset": 9 | lzma.PRESET_EXTREME,
        "lc": 0,
        "lp": 2,
        "pb": 0,
    }
    with (
        lzma.open(out, "wb", filters=[numbers]) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name in sorted(files, key=lambda name: name.split("/")[::-1]):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))


def unpacked(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar}  # type: ignore[union-attr]


def main(out: str) -> None:
    from importlib.metadata import version

    path, ours = Path(out), version("lerobot")
    before = unpacked(path) if path.exists() else {}
    files = {name: each for name, each in before.items() if name.split("/")[0] != ours}
    with tempfile.TemporaryDirectory() as scratch:
        for name, given in CASES.items():
            if not possible(given):
                continue
            folder = Path(scratch) / name
            expected = write(name, given, folder)
            np.savez(folder / "expected.npz", **expected)
            for each in folder.iterdir():
                if each.suffix in (".json", ".safetensors", ".npz"):
                    files[f"{ours}/{name}/{each.name}"] = each.read_bytes()
    pack(path, files)


if __name__ == "__main__":
    main(sys.argv[1])
