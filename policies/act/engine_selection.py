"""Which engine runs the network: the fastest that this machine has and that is right.

Every engine answers one probe before anybody is served, and is compared with float32 torch. What
is chosen by itself makes way for the next where it is not there, fails or errs too much, with the
reason logged. What was asked for by name is used or refused; its measured error is told.
"""

from __future__ import annotations

import logging

import torch

from policies.act import hardware
from policies.act.engine import Engine, EngineOptions, EngineUnavailable
from policies.act.engine_check import LIMITS
from policies.act.engine_factory import MAKERS
from policies.act.weights import ActWeights
from policies.errors import ContractMismatch, InferenceError

logger = logging.getLogger(__name__)

OVERFLOW = float("inf")


def make_engine(weights: ActWeights, options: EngineOptions | None = None) -> Engine:
    """The engine for ``weights``, having run once; one log line says which and its error.

    Raises:
        ContractMismatch: What was asked for by name, this machine does not have.
    """
    options = options or EngineOptions()
    device = hardware.choose_device(options.device)
    threads = options.threads or hardware.default_threads()
    precisions, note = _precisions(options.precision, device)
    reasons: list[str] = []
    for name in _engines(options.engine, device):
        for precision in precisions:
            try:
                engine, error = MAKERS[name](weights, device, precision, threads)
            except (EngineUnavailable, InferenceError) as failure:
                reasons.append(f"{name} in {precision}: {failure}")
                logger.warning("passed over: %s", reasons[-1])
                continue
            too_much = error > LIMITS[precision]
            if too_much and (options.precision == "auto" or not error < OVERFLOW):
                engine.close()
                reasons.append(f"{name} in {precision}: {_told(error)}")
                logger.warning("passed over: %s", reasons[-1])
                continue
            line = f"inference by {engine.name} on {engine.device}, {precision}, {_told(error)}"
            if too_much:
                logger.warning("%s: more than %.0e, and used as asked for", line, LIMITS[precision])
            else:
                logger.info("%s%s", line, note)
            return engine
    field = "engine" if options.engine != "auto" else "precision"
    raise ContractMismatch(
        field, repr(getattr(options, field)), f"one that works here ({'; '.join(reasons)})"
    )


def _told(error: float) -> str:
    if not error < OVERFLOW:
        return "NaN or infinity on the first probe: an overflow"
    return f"error against float32 torch {error:.1e}"


def _engines(name: str, device: torch.device) -> tuple[str, ...]:
    """To be tried in this order."""
    known = ("cuda-graph", "torch") if device.type == "cuda" else ("openvino", "torch")
    if name == "auto":
        return known
    if name not in known:
        raise ContractMismatch(
            "engine", repr(name), f"one of {('auto', *known)} on device {str(device)!r}"
        )
    return (name,)


def _precisions(name: str, device: torch.device) -> tuple[tuple[str, ...], str]:
    """To be tried in this order, and what to add to the log."""
    has = hardware.precisions(device)
    if name == "auto":
        if "bf16" in has:
            return ("bf16", "fp32"), " (auto: bf16 first, fp32 where it errs too much)"
        return ("fp32",), f" (auto: this {device.type} has no bfloat16 units)"
    if name not in has:
        raise ContractMismatch(
            "precision",
            repr(name),
            f"one of {('auto', *has)}: this {device.type} has no units for it",
        )
    return (name,), ""
