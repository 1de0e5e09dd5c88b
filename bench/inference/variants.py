"""Variants of the engine of CUDA graphs, in turns in one process: what each of its options gives.

What this file needs of the engine beyond its interface is in ``make_variant``,
``registered_frames`` and ``replay_of``, and nowhere else in the benchmark.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.inference.nets import checkpoint_of, load, observations
from bench.inference.steps import SUSPECT, Record, Say, StepFailed, StepFunction, main, shorten
from policies.act.engine import Engine, EngineOptions, EngineUnavailable, Frames
from policies.act.engine_selection import make_engine
from policies.act.registered_memory import process_registry
from policies.act.weights import ActWeights
from policies.errors import PolicyError

BLOCK_CALLS, BLOCK_WARM = 20, 3
PERCENTILES = (50, 99)
POISON = 0xFF
"""Filled with this byte, a number is NaN in bf16, fp16 and fp32."""
MAKE_WITHIN_S = 150.0
"""The process ends when making one variant takes longer."""


@dataclass(frozen=True, slots=True)
class Variant:
    """An engine and how it is called.

    Attributes:
        options: Graph options, by the engine's names.
        registered: Whether pictures lie in memory that the device reads directly.
    """

    name: str
    options: tuple[str, ...]
    registered: bool = False

    @property
    def compiles(self) -> bool:
        """Whether making it takes a minute or more."""
        return "compiled" in self.options


_BASE = ("pinned_attention",)
_TUNED = ("autotune", *_BASE)
BASE = "base"
VARIANTS = (
    Variant(BASE, _BASE),
    Variant("autotuned", _TUNED),
    Variant("autotuned, attention by cuDNN", ("autotune",)),
    Variant("autotuned, fused convolutions", (*_TUNED, "fused_convolutions")),
    Variant("autotuned, registered memory", (*_TUNED, "direct_upload"), registered=True),
    Variant("autotuned, space-to-depth stem", (*_TUNED, "space_to_depth")),
    Variant("autotuned, compiled", (*_TUNED, "compiled")),
    Variant(
        "everything",
        (*_TUNED, "direct_upload", "fused_convolutions", "space_to_depth", "compiled"),
        registered=True,
    ),
)


# What is known of the engine


def make_variant(weights: ActWeights, variant: Variant, precision: str) -> Engine:
    """Make the engine of a variant.

    Raises:
        PolicyError: The options cannot be used here.
    """
    options = EngineOptions(
        device="cuda", engine="cuda-graph", precision=precision, graph_options=variant.options
    )
    return make_engine(weights, options)


def registered_frames(frames: Frames) -> Frames:
    """Return a copy whose pictures lie in registered memory, for as long as the process lives.

    Raises:
        EngineUnavailable: There is no such memory.
    """
    size = sum(image.nbytes for image in frames.images)
    memory = np.frombuffer(mmap.mmap(-1, size), np.uint8)
    registry = process_registry(torch.device("cuda", torch.cuda.current_device()))
    # A refusal stays the calling thread's last error, which its next kernel would report.
    with ThreadPoolExecutor(1) as other_thread:
        if not other_thread.submit(registry.register, memory).result():
            raise EngineUnavailable("the device refuses to register memory")
    images, start = [], 0
    for image in frames.images:
        copied = memory[start : start + image.nbytes].reshape(image.shape)
        np.copyto(copied, image)
        images.append(copied)
        start += image.nbytes
    return Frames(images, frames.state)


def replay_of(engine: Engine, size: int = 1) -> tuple[Callable[[], None], Any]:
    """Return what enqueues the graph for batches of ``size``, and the stream to call it on."""
    hidden: Any = engine
    return hidden._graphs[size], stream_of(hidden._api)


def stream_of(api: Any) -> Any:
    """Return the stream of a ``TorchCuda``."""
    return api._stream


# The step


class _Row:
    """One variant, ready."""

    def __init__(self, engine: Engine, frames: list[Frames]) -> None:
        self.engine, self._frames = engine, frames
        self.samples_s: list[float] = []
        self.facts: Record = {}

    def actions(self) -> NDArray[np.float32]:
        """Of all observations."""
        return np.concatenate([self.engine.run([each]).copy() for each in self._frames])

    def block(self) -> None:
        for number in range(-BLOCK_WARM, BLOCK_CALLS):
            frames = self._frames[number % len(self._frames)]
            began_s = time.perf_counter()
            self.engine.run([frames])
            if number >= 0:
                self.samples_s.append(time.perf_counter() - began_s)


def variants(say: Say, arguments: Sequence[str]) -> Mapping[str, Any]:
    """Arguments: network, precision, seconds of measuring, and variants to leave out."""
    net, precision, seconds, *left_out = arguments
    with checkpoint_of(net) as folder:
        weights = load(folder)
    given = [Frames(list(images), state) for images, state in observations(weights.config)]
    expected = _expected(weights)
    rows: dict[str, _Row] = {}
    absent: dict[str, str] = {}
    chosen = [variant for variant in VARIANTS if variant.name not in left_out]

    def make(variant: Variant) -> None:
        say({**_record(rows, absent), SUSPECT: variant.name})
        began_s = time.monotonic()
        try:
            frames = [registered_frames(each) for each in given] if variant.registered else given
            with _no_longer_than(MAKE_WITHIN_S, f"{variant.name}: making it"):
                row = _Row(make_variant(weights, variant, precision), frames)
                row.facts["made in s"] = round(time.monotonic() - began_s, 1)
                row.facts |= _checked(row, weights, expected)
        except (PolicyError, RuntimeError) as error:
            leave_out(variant.name, error)
        else:
            rows[variant.name] = row
            print(f"  {variant.name}: {row.facts}", flush=True)
        say(_record(rows, absent))

    def leave_out(name: str, error: Exception) -> None:
        rows.pop(name, None)
        absent[name] = shorten(f"{type(error).__name__}: {error}")
        print(f"  {name}: absent: {absent[name]}", flush=True)
        if not _device_works():
            say({**_record(rows, absent), SUSPECT: name})
            raise StepFailed(f"{name}: the device is lost: {error}") from error

    def take_turns(turns_s: float) -> None:
        for row in rows.values():
            row.samples_s.clear()
        order, ends_s = list(rows), time.monotonic() + turns_s
        while rows and time.monotonic() < ends_s:
            for name in order:
                try:
                    if name in rows:
                        rows[name].block()
                except (PolicyError, RuntimeError) as error:
                    leave_out(name, error)
            order = [*order[1:], *order[:1]]
            say(_record(rows, absent))

    # All that are there take turns, first without those that compile: that may take all the time.
    for compiling in (False, True):
        group = [variant for variant in chosen if variant.compiles == compiling]
        made = len(rows)
        for variant in group:
            make(variant)
        if len(rows) > made:
            take_turns(float(seconds) / 2)
    record = _record(rows, absent)
    for name, found in record["rows"].items():
        print(f"  {name:34}{_line(found)}", flush=True)
    return record


@contextmanager
def _no_longer_than(seconds: float, what: str) -> Iterator[None]:
    """End the process, with a line that says why, if the block takes longer."""

    def end() -> None:
        print(f"{what} took longer than {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _checked(row: _Row, weights: ActWeights, expected: NDArray[np.float64]) -> Record:
    """The error of its actions, and whether they change when unwritten memory is NaN."""
    before = row.actions()
    normalizer = weights.action_normalizer
    normalized = (before.astype(np.float64) - normalizer.shift) / normalizer.scale
    error = float(np.abs(normalized - expected).max() / np.abs(expected).max())
    poisoned = poison_graph_memory(_snapshot())
    after = row.actions()
    return {
        "error": error,
        "poisoned bytes": poisoned,
        "same bits after poisoning": before.tobytes() == after.tobytes(),
        "finite after poisoning": bool(np.isfinite(after).all()),
    }


def poison_graph_memory(
    segments: Sequence[Mapping[str, Any]],
    view: Callable[[int, int], torch.Tensor] | None = None,
) -> int:
    """Fill with NaN what graphs have for intermediate results; return the number of bytes.

    Between two replays nothing in there is of use: a graph that depends on it reads what it has not
    written.

    Args:
        segments: As ``torch.cuda.memory_snapshot`` has them. Blocks outside the pools of graphs,
            and those that a tensor still holds, are left alone.
        view: Returns the bytes at an address; on the device where None.
    """
    view = view or _device_bytes
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    poisoned = 0
    for segment in segments:
        if not any(segment.get("segment_pool_id", (0, 0))):
            continue
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                view(address, block["size"]).fill_(POISON)
                poisoned += block["size"]
            address += block["size"]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return poisoned


def _snapshot() -> Sequence[Mapping[str, Any]]:
    cuda: Any = torch.cuda  # hardly typed
    segments: Sequence[Mapping[str, Any]] = cuda.memory_snapshot()
    return segments


class _Bytes:
    """Device memory, as ``torch.as_tensor`` takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 2,
        }


def _device_bytes(address: int, size: int) -> torch.Tensor:
    return torch.as_tensor(_Bytes(address, size), device="cuda")


def _device_works() -> bool:
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(8, device="cuda") + 1).sum().item() == 16)
    except RuntimeError:
        return False


def _expected(weights: ActWeights) -> NDArray[np.float64]:
    """(observations, T, A) of the plain module on the CPU, in the network's units."""
    model = weights.inference_model()
    with torch.inference_mode():
        actions = [
            model(torch.from_numpy(images)[None], torch.from_numpy(state)[None])[0].numpy()
            for images, state in observations(weights.config)
        ]
    return np.stack(actions).astype(np.float64)


def _record(rows: Mapping[str, _Row], absent: Mapping[str, str]) -> Record:
    base = rows.get(BASE)
    base_s = float(np.median(base.samples_s)) if base and base.samples_s else None
    found: Record = {}
    for name, row in rows.items():
        figures: Record = dict(row.facts)
        if row.samples_s:
            p50, p99 = (float(np.percentile(row.samples_s, each)) for each in PERCENTILES)
            figures |= {"count": len(row.samples_s), "p50_s": p50, "p99_s": p99}
            figures |= {"p99 / p50": p99 / p50}
            figures |= {"p50 / base": p50 / base_s} if base_s else {}
        found[name] = figures
    return {"rows": found, "absent variants": dict(absent)}


def _line(figures: Mapping[str, Any]) -> str:
    if "p50_s" not in figures:
        return "made, not timed"
    by_base = f", / base {figures['p50 / base']:.3f}" if "p50 / base" in figures else ""
    return (
        f"p50 {1e3 * figures['p50_s']:.3f} ms, p99 {1e3 * figures['p99_s']:.3f}{by_base}, "
        f"error {figures['error']:.1e}, same bits after poisoning: "
        f"{figures['same bits after poisoning']}"
    )


STEPS: Mapping[str, StepFunction] = {"variants": variants}

if __name__ == "__main__":
    raise SystemExit(main(STEPS, sys.argv[1:]))
