"""Detects this machine's devices, number formats and cores, and configures torch for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from policies.errors import ContractMismatch

DEVICES = ("auto", "cpu", "cuda")
"""Valid device names, besides ``cuda:N``."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU_FLAGS = {
    "bf16": frozenset({"amx_bf16", "avx512_bf16"}),
    "fp16": frozenset({"amx_fp16", "avx512_fp16"}),
}
"""Flags in /proc/cpuinfo; any one of them means that the CPU multiplies that format in hardware."""
TOPOLOGY = Path("/sys/devices/system/cpu")


def choose_device(name: str) -> torch.device:
    """Return the device that ``name`` (one of ``DEVICES``, or ``cuda:N``) stands for.

    Raises:
        ContractMismatch: An unknown name, or a GPU that torch does not see.
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
    """Return the number formats that ``device`` multiplies in hardware; emulated ones are not
    offered.
    """
    if device.type == "cuda":
        # Not ``is_bf16_supported``: it counts emulation, and looks at the current device.
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("fp32", "bf16", "fp16") if has_bf16 else ("fp32", "fp16")
    flags = cpu_flags()
    return ("fp32", *(name for name, needed in CPU_FLAGS.items() if needed & flags))


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the CPU's feature flags as the kernel lists them; empty where it lists none."""
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
    """Return the number of cores that this process may use less one, and at least one.

    One core is left for the control loop, which shares the machine in a simulation and on many
    robots and would otherwise wait for the inference. Two hardware threads of a core count as one,
    because the second has no arithmetic units of its own. docs/inference.md has the measurement.
    """
    return max(1, len(_cores()) - 1)


def streams(threads: int) -> int:
    """Return how many inferences of ``threads`` threads fit this process's cores, at least one."""
    return max(1, len(_cores()) // threads)


def _cores() -> set[str]:
    """Return the physical cores that this process may run on, named by their hardware threads."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            cores.add(siblings.read_text(encoding="ascii").strip())
        except OSError:
            cores.add(str(cpu))
    return cores


def set_threads(threads: int) -> None:
    """Make all of this process's torch use ``threads`` CPU threads."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def configure_cuda(
    device: torch.device, dtype: torch.dtype, *, pinned_attention: bool = True
) -> None:
    """Make CUDA deterministic and float32 full precision, in all of this process's torch.

    By default torch computes float32 convolutions in TF32, with 10 bits of mantissa.

    Args:
        device: Nothing is done where it is not a CUDA device.
        dtype: Number format of the network.
        pinned_attention: Never use cuDNN's attention, which torch prefers on Hopper and which had
            wrong results before cuDNN 9.15.1 where the number of tokens is no multiple of 128.
            That leaves flash attention, then the memory-efficient one, which float32 needs.
    """
    if device.type != "cuda":
        return
    torch.backends.cuda.enable_cudnn_sdp(not pinned_attention)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    if dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def is_lost(stream: Any) -> bool:
    """Wait for a CUDA stream; return whether its device failed for good.

    After an error such as an illegal memory access, every call repeats it. The device as a whole is
    not waited for: that is an error while another thread captures a graph, and ends the capture.
    """
    try:
        stream.synchronize()
    except RuntimeError as error:
        return "captur" not in str(error)
    return False
