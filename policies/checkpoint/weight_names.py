"""Maps other layouts' weight names to ``ActModel``'s.

``model.encoder.*`` is the CVAE's style encoder in the original's layout (and ILStudio's) but the
main encoder in LeRobot's, with the same shapes. So each layout has its own complete table, built
from the checkpoint's sizes. A name that is in neither of a layout's two lists is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from policies.act.backbone import BATCH_NORM_KEYS
from policies.act.config import BLOCKS, ActConfig
from policies.act.weights import parameter_shapes
from policies.checkpoint.folded_weights import complete
from policies.errors import CheckpointError

ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
"""Tensors of an attention module."""
LINEAR = ("weight", "bias")
"""Tensors of a linear module or a norm."""


def detr_keys(config: ActConfig) -> dict[str, str]:
    """Return foreign names to ``ActModel``'s, for the original's layout and ILStudio's."""
    keys = {
        "model.input_proj": "image_proj",
        "model.input_proj_robot_state": "state_proj",
        "model.latent_out_proj": "latent_proj",
        "model.additional_pos_embed": "token_pos",
        "model.query_embed": "query_pos",
        "model.action_head": "action_head",
        "model.transformer.decoder.norm": "decoder_norm",
        "model.cls_embed": "style.cls",
        "model.encoder_action_proj": "style.action_proj",
        "model.encoder_joint_proj": "style.state_proj",
        "model.latent_proj": "style.out_proj",
    }
    return {
        **_modules(keys),
        **{
            foreign: internal
            for camera, name in enumerate(config.backbone_names)
            for foreign, internal in _backbone(
                f"model.backbones.{camera}.0.body", name, config
            ).items()
        },
        **_encoder("model.transformer.encoder.layers", "encoder", config.n_encoder_layers),
        **_decoder("model.transformer.decoder.layers", config.n_decoder_layers),
        **_encoder("model.encoder.layers", "style.layers", config.n_style_layers),
    }


def detr_unused_keys(decoder_layers: int) -> set[str]:
    """Return foreign names that affect no action: only the first decoder layer's output is used."""
    unused = {"model.is_pad_head.weight", "model.is_pad_head.bias", "model.pos_table"}
    for layer in range(1, decoder_layers):
        unused |= {
            f"model.transformer.decoder.layers.{layer}.{name}" for name in _decoder_layer_names()
        }
    return unused


def lerobot_keys(config: ActConfig) -> dict[str, str]:
    """Return foreign names to ``ActModel``'s, for LeRobot's layout."""
    keys = {
        "model.encoder_img_feat_input_proj": "image_proj",
        "model.encoder_robot_state_input_proj": "state_proj",
        "model.encoder_latent_input_proj": "latent_proj",
        "model.encoder_1d_feature_pos_embed": "token_pos",
        "model.decoder_pos_embed": "query_pos",
        "model.action_head": "action_head",
        "model.decoder.norm": "decoder_norm",
        "model.vae_encoder_cls_embed": "style.cls",
        "model.vae_encoder_action_input_proj": "style.action_proj",
        "model.vae_encoder_robot_state_input_proj": "style.state_proj",
        "model.vae_encoder_latent_output_proj": "style.out_proj",
    }
    return {
        **_modules(keys),
        **_backbone("model.backbone", "backbone", config),
        **_encoder("model.encoder.layers", "encoder", config.n_encoder_layers),
        **_decoder("model.decoder.layers", config.n_decoder_layers),
        **_encoder("model.vae_encoder.layers", "style.layers", config.n_style_layers),
    }


LEROBOT_UNUSED_KEYS = frozenset({"model.vae_encoder_pos_enc"})
"""LeRobot's names that affect no action."""
LEROBOT_RENAMED_KEYS = {
    "model.encoder_robot_and_latent_pos_embed.weight": "model.encoder_1d_feature_pos_embed.weight"
}
"""Names of LeRobot's first versions to today's; the rows are in the same order."""


def translate(
    tensors: Mapping[str, Tensor], keys: Mapping[str, str], ignored: Iterable[str],
    config: ActConfig, path: Path,
) -> dict[str, Tensor]:  # fmt: skip
    """Return ``tensors`` under ``ActModel``'s names.

    The style encoder, which only training needs, may be missing as a whole. What else may be, see
    ``policies.checkpoint.folded_weights``.

    Args:
        tensors: By foreign names.
        keys: Foreign names to ``ActModel``'s.
        ignored: Foreign names to ignore.
        config: Sizes.
        path: The file, for errors.

    Raises:
        CheckpointError: An unknown or missing name, or a tensor of another shape.
    """
    shapes = parameter_shapes(config)
    tensors = complete(tensors, keys, shapes, config)
    unknown = sorted(tensors.keys() - keys.keys() - set(ignored))
    unknown = [key for key in unknown if not key.endswith(".num_batches_tracked")]
    per_camera = [key for key in unknown if key.startswith("model.backbones.")]
    per_camera = [key for key in per_camera if not key.startswith("model.backbones.0.")]
    if per_camera:
        raise CheckpointError(
            f"{path}: {per_camera[0]}: a backbone for each camera is not supported in this layout, "
            "expected model.backbones.0 only"
        )
    if unknown:
        raise CheckpointError(f"{path}: {len(unknown)} unknown keys, the first {unknown[0]!r}")
    has_style = any(keys[key].startswith("style.") for key in tensors.keys() & keys.keys())
    translated = {}
    for foreign, internal in keys.items():
        if internal.startswith("style.") and not has_style:
            continue
        if foreign not in tensors:
            raise CheckpointError(f"{path}: key {foreign!r} is missing")
        tensor = tensors[foreign]
        if internal in shapes and tuple(tensor.shape) != shapes[internal]:
            raise CheckpointError(
                f"{path}: {foreign}: got shape {tuple(tensor.shape)}, expected {shapes[internal]}"
            )
        translated[internal] = tensor.contiguous()
    return translated


def style_names() -> list[str]:
    """Return the original layout's names of the style encoder, without those of its layers."""
    names = ["model.cls_embed.weight"]
    for module in ("encoder_action_proj", "encoder_joint_proj", "latent_proj"):
        names.extend(f"model.{module}.{part}" for part in LINEAR)
    return names


def transformer_names(prefix: str, tensors: Iterable[str]) -> set[str]:
    """Return the names of a whole transformer below ``prefix``, with the layers that ``tensors``
    has.
    """
    names = {f"{prefix}.decoder.norm.{part}" for part in LINEAR}
    kinds = (("encoder", _encoder_layer_names()), ("decoder", _decoder_layer_names()))
    for key in tensors:
        for kind, parts in kinds:
            layers = f"{prefix}.{kind}.layers."
            if key.startswith(layers):
                number = key.removeprefix(layers).split(".")[0]
                names |= {f"{layers}{number}.{part}" for part in parts}
    return names


def _modules(names: Mapping[str, str]) -> dict[str, str]:
    """Return the weights' and biases' names of single modules; embeddings have no bias."""
    embeddings = {"token_pos", "query_pos", "style.cls"}
    return {
        f"{foreign}.{part}": f"{internal}.{part}"
        for foreign, internal in names.items()
        for part in (("weight",) if internal in embeddings else LINEAR)
    }


def _backbone(foreign: str, internal: str, config: ActConfig) -> dict[str, str]:
    names = ["conv1.weight", *(f"bn1.{k}" for k in BATCH_NORM_KEYS)]
    for stage, blocks in enumerate(BLOCKS[config.backbone], start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            for i in (1, 2):
                names.append(f"{at}.conv{i}.weight")
                names.extend(f"{at}.bn{i}.{k}" for k in BATCH_NORM_KEYS)
            if stage > 1 and block == 0:
                names.append(f"{at}.downsample.0.weight")
                names.extend(f"{at}.downsample.1.{k}" for k in BATCH_NORM_KEYS)
    return {f"{foreign}.{name}": f"{internal}.{name}" for name in names}


def _encoder_layer_names() -> list[str]:
    names = [f"self_attn.{part}" for part in ATTENTION]
    for module in ("linear1", "linear2", "norm1", "norm2"):
        names.extend(f"{module}.{part}" for part in LINEAR)
    return names


def _decoder_layer_names() -> list[str]:
    cross = [f"multihead_attn.{part}" for part in ATTENTION]
    return [*_encoder_layer_names(), *cross, "norm3.weight", "norm3.bias"]


def _encoder(foreign: str, internal: str, layers: int) -> dict[str, str]:
    return {
        f"{foreign}.{i}.{name}": f"{internal}.{i}.{name}"
        for i in range(layers)
        for name in _encoder_layer_names()
    }


def _decoder(foreign: str, layers: int) -> dict[str, str]:
    return {
        f"{foreign}.{i}.{name}": f"decoder.{i}.{name}"
        for i in range(layers)
        for name in _decoder_layer_names()
    }
