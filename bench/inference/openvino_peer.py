"""OpenVINO's own conversion of the plain module: what anyone gets by converting ACT.

At its best for latency: one stream, static shapes, compiled once and cached.
"""

from __future__ import annotations

import warnings

import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray

from bench.inference.contestants import Absent, Run, Setting
from policies.act.weights import ActWeights


def fp32(weights: ActWeights, setting: Setting) -> Run:
    return _runner(weights, setting, "f32")


def bf16(weights: ActWeights, setting: Setting) -> Run:
    """Raises:
    Absent: The CPU would only emulate it.
    """
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in capabilities:
        raise Absent(f"no bfloat16 units here: OpenVINO names {', '.join(capabilities)}")
    return _runner(weights, setting, "bf16")


def _runner(weights: ActWeights, setting: Setting, precision: str) -> Run:
    config, denormalize = weights.config, weights.action_normalizer.denormalize
    core = ov.Core()
    hints = {
        "CACHE_DIR": str(setting.cache),
        "INFERENCE_NUM_THREADS": setting.threads,
        "INFERENCE_PRECISION_HINT": precision,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    saved = setting.cache / "plain.xml"
    if not saved.exists():
        images = torch.zeros((1, config.n_cameras, *config.image_hw, 3), dtype=torch.uint8)
        example = images, torch.zeros(1, config.state_dim)
        shapes = [list(each.shape) for each in example]
        with torch.inference_mode(), warnings.catch_warnings():
            # That shapes are traced as constants, which is what is wanted.
            warnings.simplefilter("ignore", torch.jit._trace.TracerWarning)
            model = ov.convert_model(weights.inference_model(), example_input=example, input=shapes)
        ov.save_model(model, saved, compress_to_fp16=False)
    compiled = core.compile_model(saved, "CPU", hints)
    request = compiled.create_infer_request()

    def run(images: NDArray[np.uint8], state: NDArray[np.float32]) -> NDArray[np.float32]:
        request.infer([images[None], state[None]], share_inputs=True)
        return denormalize(request.get_output_tensor(0).data[0])

    return run
