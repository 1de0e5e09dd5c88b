"""Steps that say whether the CUDA path works on a GPU, and what one replay of a graph consists of.

Run by ``bench.inference.gpu`` as part ``check``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.inference.contestants import CUDA_COPY_BYTES, CUDA_GEMM_SIDE, Setting
from bench.inference.gpu_replay import replay, times_s
from bench.inference.steps import (
    ROOT,
    Record,
    Say,
    StepFailed,
    StepFunction,
    die_with_parent,
    main,
    shorten,
)
from bench.inference.variants import stream_of

TEST_FILES = {
    "cuda": re.compile(r"test_policies_.*(cuda|registered)"),
    "others": re.compile(r"test_policies_(?!.*(cuda|registered)).*(fused|engine|graph)"),
}
TEST_PROCESSES = 4
KEPT_LINES = 30
PICTURE_BYTES = 480 * 640 * 3
PACKAGES = ("torch", "triton", "numpy", "lerobot", "pyzmq", "posix_ipc", "pytest", "hypothesis")
HOST_REGISTER_READ_ONLY_SUPPORTED = 113
"""``CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED``."""
REGISTER_FLAGS = {"default": 0, "portable": 1, "read-only": 8}
"""``cudaHostRegisterDefault`` and so on."""


def facts(_say: Say, _arguments: Sequence[str]) -> Mapping[str, Any]:
    """Versions, driver, device.

    Raises:
        StepFailed: torch sees no GPU.
    """
    if not torch.cuda.is_available():
        raise StepFailed(f"torch {torch.__version__} sees no GPU")
    device = torch.cuda.get_device_properties(0)
    cudnn: Any = torch.backends.cudnn  # hardly typed
    found = {
        "gpu": torch.cuda.get_device_name(0),
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "driver": _ask_driver(),
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version(),
        "python": platform.python_version(),
        "packages": _packages(),
        "compilers": {name: bool(shutil.which(name)) for name in ("gcc", "g++", "nvcc")},
        "cores": len(os.sched_getaffinity(0)),
    }
    print("  " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def ceilings(say: Say, _arguments: Sequence[str]) -> Mapping[str, Any]:
    """The most that a copy and a product reach, and copies of a picture to the device."""
    from bench.inference import limits

    nothing = np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.float32)
    setting = Setting(threads=1, cache=Path(), device="cuda")
    found: Record = {}
    for name, build, work in (
        ("product_flops_per_s", limits.cuda_matrix_product, 2.0 * CUDA_GEMM_SIDE**3),
        ("copy_bytes_per_s", limits.cuda_copy, 2.0 * CUDA_COPY_BYTES),
    ):
        run = build(setting)
        found[name] = work / min(times_s(partial(run, *nothing), 30))
        say(found)
        del run
        torch.cuda.empty_cache()
    target = torch.empty(PICTURE_BYTES, dtype=torch.uint8, device="cuda")
    for name, pinned in (("pinned", True), ("pageable", False)):
        source = torch.zeros(PICTURE_BYTES, dtype=torch.uint8, pin_memory=pinned)
        copy = partial(_copy_and_wait, target, source)
        found[f"picture_from_{name}_s"] = float(np.median(times_s(copy, 200)))
    print(f"  {found}", flush=True)
    return found


def tests(say: Say, arguments: Sequence[str]) -> Mapping[str, Any]:
    """Tests of the policies: argument ``cuda`` for those of the CUDA engine, of which some need a
    GPU; ``others`` for those of the fused network, its options and the engines.
    """
    [which] = arguments
    files = test_files(which)
    # With other versions than the pinned ones a warning is not a failure, and a missing plug-in
    # leaves a mark unknown.
    flags = ["-q", "-p", "no:cacheprovider", "-W", "default", "-o", "addopts=-ra", "--durations=5"]
    flags += ["--continue-on-collection-errors"]
    if which == "others" and find_spec("xdist"):
        flags += ["-n", str(TEST_PROCESSES)]
    command = [sys.executable, "-m", "pytest", *flags, *files]
    last: deque[str] = deque(maxlen=KEPT_LINES)
    summary = ""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509 (this process has no other thread)
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"  {line}", end="", flush=True)
            last.append(line.rstrip())
            if re.search(r"\d+ (passed|failed|skipped|error)", line):
                summary = line.strip(" =\n")
            say({"files": files, "last lines": list(last)})
    status = process.returncode
    record = {"files": files, "summary": summary, "status": status, "ok_so_far": status == 0}
    return record if status == 0 else {**record, "last lines": list(last)}


def test_files(which: str) -> list[str]:
    """The files of a key of ``TEST_FILES``."""
    return sorted(
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests" / "policies").glob("test_*.py")
        if TEST_FILES[which].match(path.name)
    )


def registration(say: Say, _arguments: Sequence[str]) -> Mapping[str, Any]:
    """``cudaHostRegister`` on a read-only and on a read-write mapping of one memory file."""
    torch.zeros(1, device="cuda")
    found: Record = {"read-only supported, says the device": _device_attribute()}
    picture = np.random.default_rng(0).integers(0, 256, PICTURE_BYTES, dtype=np.uint8)
    size = -(-PICTURE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
    file = os.memfd_create("metronome-registration")
    os.ftruncate(file, size)
    os.pwrite(file, picture.tobytes(), 0)
    for mapping, protection in (
        ("read-write", mmap.PROT_READ | mmap.PROT_WRITE),
        ("read-only", mmap.PROT_READ),
    ):
        for flag_name, flags in REGISTER_FLAGS.items():
            mapped = np.frombuffer(mmap.mmap(file, size, prot=protection), np.uint8)
            name = f"{mapping} mapping, {flag_name}"
            try:
                found[name] = _register(mapped, flags, picture)
            except RuntimeError as error:
                found[name] = {"failed": shorten(str(error))}
            print(f"  {name}: {found[name]}", flush=True)
            say(found)
    os.close(file)
    return found


def _register(mapped: NDArray[np.uint8], flags: int, picture: NDArray[np.uint8]) -> Record:
    cuda: Any = torch.cuda  # hardly typed
    cudart = cuda.cudart()
    address, size = mapped.ctypes.data, mapped.nbytes
    began_s = time.perf_counter()
    error = int(cudart.cudaHostRegister(address, size, flags))
    record: Record = {"error": error, "took_s": time.perf_counter() - began_s}
    if error:
        # A refusal may stay the thread's last error, which the next kernel's launch then reports.
        record["next kernels"] = [_attempt(_launch) for _ in range(2)]
        return record
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the array cannot be written to
            source = torch.from_numpy(mapped)[: picture.size]
        target = torch.empty(picture.size, dtype=torch.uint8, device="cuda")
        record["pinned, says torch"] = _attempt(source.is_pinned)
        _copy_and_wait(target, source)
        record["copied right"] = bool((target.cpu().numpy() == picture).all())
        record["copy_s"] = float(np.median(times_s(lambda: _copy_and_wait(target, source), 200)))
    finally:
        torch.cuda.synchronize()
        record["unregister error"] = int(cudart.cudaHostUnregister(address))
    return record


def failed_capture(say: Say, _arguments: Sequence[str]) -> Mapping[str, Any]:
    """A capture that fails, and after it, in the same process, captures that must work."""
    from policies.act.cuda_api import TorchCuda

    device = torch.device("cuda", 0)
    api = TorchCuda(device)
    values, doubled = torch.arange(8.0, device=device), torch.zeros(8, device=device)
    torch.cuda.synchronize()

    def good() -> None:
        torch.mul(values, 2, out=doubled)

    def bad() -> None:
        good()
        doubled.sum().item()  # waits for the device, which a capture cannot

    stream_before = torch.cuda.current_stream()
    found: Record = {"the capture's error": _attempt(lambda: api.capture(bad))}
    found["failed, as it should"] = found["the capture's error"] != "fine"
    found["the stream is restored"] = torch.cuda.current_stream() == stream_before
    say(found)
    found["empty_cache"] = _attempt(torch.cuda.empty_cache)
    for name, make in (("the same", lambda: api), ("another", lambda: TorchCuda(device))):
        words = f"a good capture, {name} object"
        found[words] = _attempt(partial(_capture_and_replay, make, good, values, doubled))
        say(found)
    found["an allocation"] = _attempt(lambda: torch.zeros(2**20, device=device).sum().item())
    for name, said in found.items():
        print(f"  {name}: {said}", flush=True)
    fine = (name for name in found if name not in {"the capture's error", "failed, as it should"})
    found["ok_so_far"] = found["failed, as it should"] and all(
        found[name] in {True, "fine"} for name in fine
    )
    return found


def _capture_and_replay(
    make: Callable[[], Any], step: Callable[[], None], values: torch.Tensor, doubled: torch.Tensor
) -> None:
    api = make()
    graph = api.capture(step)
    values.add_(1)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream_of(api)):
        graph()
    api.wait()
    torch.cuda.synchronize()
    if not torch.equal(doubled, values * 2):
        raise RuntimeError(f"a replay computed {doubled.tolist()} of {values.tolist()}")


def _attempt(action: Callable[[], Any]) -> str:
    """``fine`` or the value, or the error's words."""
    try:
        value = action()
    except Exception as error:
        return shorten(f"{type(error).__name__}: {error}")
    return str(value) if isinstance(value, bool) else "fine"


def _launch() -> None:
    torch.zeros(1, device="cuda").add_(1)
    torch.cuda.synchronize()


def _copy_and_wait(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()


def _device_attribute() -> bool | str:
    try:
        driver, value = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(-1)
        status = driver.cuDeviceGetAttribute(
            ctypes.byref(value), HOST_REGISTER_READ_ONLY_SUPPORTED, torch.cuda.current_device()
        )
    except (OSError, AttributeError) as error:
        return f"unknown: {error}"
    return bool(value.value) if status == 0 else f"unknown: error {status}"


def _ask_driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


STEPS: Mapping[str, StepFunction] = {
    "facts": facts,
    "ceilings": ceilings,
    "tests": tests,
    "replay": replay,
    "registration": registration,
    "failed_capture": failed_capture,
}

if __name__ == "__main__":
    raise SystemExit(main(STEPS, sys.argv[1:]))
