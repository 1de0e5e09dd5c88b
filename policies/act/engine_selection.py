"""Chooses the engine that runs the network: the fastest one of this machine that computes
correctly.

Every engine runs one probe before the first request, and its result is compared with float32 torch.
An engine that "auto" tries is skipped where it is missing, fails or has too large an error, and the
reason is logged. An engine or precision that the user names is used or refused, and its error is
logged.
"""

from __future__ import annotations

import logging

import torch

from policies.act import hardware
from policies.act.engine import Engine, EngineOptions, EngineUnavailable
from policies.act.engine_check import MAX_RELATIVE_ERROR
from policies.act.engine_factory import ENGINE_FACTORIES
from policies.act.weights import ActWeights
from policies.errors import ContractMismatch, DeviceLost, InferenceError

logger = logging.getLogger(__name__)

ENGINES_OF = {"cuda": ("cuda-graph", "torch"), "cpu": ("openvino", "torch")}
"""The engines of each kind of device, the fastest first."""
OVERFLOW = float("inf")
"""Error of an engine whose result is not finite."""


def make_engine(weights: ActWeights, options: EngineOptions | None = None) -> Engine:
    """Return the engine for ``weights`` after one run; log which one it is and its error.

    Raises:
        ContractMismatch: This machine does not have what the user named.
        DeviceLost: The device failed for good; the process has to end.
    """
    options = options or EngineOptions()
    threads = options.threads or hardware.default_threads()
    reasons: list[str] = []
    for device, name in _candidates(options):
        try:
            precisions, note = _precisions(options.precision, device)
        except ContractMismatch as mismatch:
            if not reasons:
                raise
            reasons.append(f"{name} on {device}: {mismatch}")
            continue
        for precision in precisions:
            try:
                engine, error = ENGINE_FACTORIES[name](
                    weights, device, precision, threads, options.chosen_graph_options
                )
            except DeviceLost:
                raise  # not even a CPU engine: a model that is served may use the device
            except (EngineUnavailable, InferenceError) as failure:
                reasons.append(f"{name} in {precision}: {failure}")
                logger.warning("engine skipped: %s", reasons[-1])
                continue
            limit = MAX_RELATIVE_ERROR[precision]
            too_large = error > limit
            if too_large and (options.precision == "auto" or not error < OVERFLOW):
                engine.close()
                reasons.append(f"{name} in {precision}: {_describe(error)}")
                logger.warning("engine skipped: %s", reasons[-1])
                continue
            line = f"inference by {engine.name} on {engine.device}, {precision}, {_describe(error)}"
            if too_large:
                logger.warning("%s: more than %.0e, used because it was requested", line, limit)
            else:
                logger.info("%s%s", line, note)
            return engine
    field = "engine" if options.engine != "auto" else "precision"
    raise ContractMismatch(
        field, repr(getattr(options, field)), f"one that works here ({'; '.join(reasons)})"
    )


def _describe(error: float) -> str:
    if not error < OVERFLOW:
        return "NaN or infinity on the first probe: an overflow"
    return f"error against float32 torch {error:.1e}"


def _candidates(options: EngineOptions) -> list[tuple[torch.device, str]]:
    """Return the devices and engines to try, in this order.

    Device "auto" is a GPU where there is one, and then the CPU.
    """
    device = hardware.choose_device(options.device)
    devices = [device]
    if options.device == "auto" and device.type == "cuda":
        devices.append(torch.device("cpu"))
    known = [(device, name) for device in devices for name in ENGINES_OF[device.type]]
    chosen = [(device, name) for device, name in known if options.engine in {"auto", name}]
    if not chosen:
        names = ("auto", *dict.fromkeys(name for _, name in known))
        raise ContractMismatch(
            "engine", repr(options.engine), f"one of {names} on device {str(device)!r}"
        )
    return chosen


def _precisions(name: str, device: torch.device) -> tuple[tuple[str, ...], str]:
    """Return the precisions to try, in this order, and a note for the log."""
    supported = hardware.precisions(device)
    if name == "auto":
        if "bf16" in supported:
            return ("bf16", "fp32"), " (auto: bf16 first, fp32 if its error is too large)"
        return ("fp32",), f" (auto: this {device.type} has no bfloat16 units)"
    if name not in supported:
        raise ContractMismatch(
            "precision",
            repr(name),
            f"one of {('auto', *supported)}: this {device.type} has no units for it",
        )
    return (name,), ""
