"""What this machine has: devices, number formats, cores."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from policies.errors import ContractMismatch

DEVICES = ("auto", "cpu", "cuda")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_UNITS = {
    "bf16": frozenset({"amx_bf16", "avx512_bf16"}),
    "fp16": frozenset({"amx_fp16", "avx512_fp16"}),
}
"""Names in /proc/cpuinfo, any of which means that the CPU multiplies that format."""
TOPOLOGY = Path("/sys/devices/system/cpu")


def choose_device(name: str) -> torch.device:
    """The device that ``name`` (``DEVICES``, or ``cuda:N``) means.

    Raises:
        ContractMismatch: An unknown name, or a GPU where torch sees none.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and not (kind == "cuda" and index.isdecimal())):
        raise ContractMismatch("device", repr(name), f"one of {DEVICES}, or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= gpus:
        raise ContractMismatch(
            "device", repr(name), f"'cpu' or one of {gpus} GPUs (torch {torch.__version__})"
        )
    if kind == "cpu" or not gpus:
        return torch.device("cpu")
    return torch.device("cuda", int(index or 0))


def precisions(device: torch.device) -> tuple[str, ...]:
    """The number formats that ``device`` multiplies in hardware; emulation is not offered."""
    if device.type == "cuda":
        return ("fp32", "bf16", "fp16") if torch.cuda.is_bf16_supported() else ("fp32", "fp16")
    flags = cpu_flags()
    return ("fp32", *(name for name, units in CPU_UNITS.items() if units & flags))


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """What the kernel says that the CPU can do; nothing where it says nothing."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(
        word
        for line in lines
        if line.startswith(("flags", "Features"))  # x86 and ARM
        for word in line.partition(":")[2].split()
    )


def default_threads() -> int:
    """Every core that this process may use but one, and at least one.

    The one is the control loop's, which shares the machine in a simulation and on many robots; it
    would otherwise wait for the inference. Two hardware threads of a core count as one: the second
    has no arithmetic units of its own. docs/inference.md has the measurement.
    """
    return max(1, len(_cores()) - 1)


def streams(threads: int) -> int:
    """Inferences of ``threads`` threads that this process has cores for at a time, at least one."""
    return max(1, len(_cores()) // threads)


def _cores() -> set[str]:
    """Physical cores that this process may run on, each by its hardware threads."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return cores


def set_threads(threads: int) -> None:
    """Use ``threads`` CPU threads in all of this process's torch."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def set_exact(device: torch.device, dtype: torch.dtype) -> None:
    """Make CUDA give the same bits every time, and float32 be float32; all of this process's torch.

    By default torch computes float32 convolutions in TF32, with 10 bits of mantissa, and may
    choose another algorithm in every process.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
