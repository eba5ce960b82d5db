"""This machine: what it is, and the two rates that limit what a model does on its processor."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import psutil
import torch

from tkpo.errors import TKPOError


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of this name; None takes a CUDA GPU, else Apple's (mps), else the CPU.

    TKPOError for a name that is no device, or a device that this machine or this build of torch does not have.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        return torch.device(next(kind for kind, found in present.items() if found))
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise TKPOError(f"no device {name!r}: choose cpu, cuda, cuda:N or mps") from error
    if not present.get(device.type, True):
        there = ", ".join(kind for kind, found in present.items() if found)
        raise TKPOError(f"device {name} is not available here (torch {torch.__version__}); there is: {there}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TKPOError(f"device {name} is not available here: this machine has {torch.cuda.device_count()} GPUs")
    return device


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def memory_gib() -> float:
    """Main memory, GiB."""
    return psutil.virtual_memory().total / 2**30


def read_bandwidth(size: int = 1 << 28) -> float:
    """GB read from memory a second, by summing `size` float32 numbers, the best of five."""
    numbers = torch.ones(size)
    return 4 * size / _best(numbers.sum, 5) / 1e9


def matrix_gflops(rows: int = 512, width: int = 896, out: int = 4864) -> float:
    """10⁹ operations a second of a float32 product, by default of Qwen2.5-0.5B's largest shape, the best of ten."""
    a, b = torch.rand(rows, width), torch.rand(out, width)
    return 2 * rows * width * out / _best(lambda: a @ b.T, 10) / 1e9


def _best(function, times: int) -> float:
    """Seconds that the quickest call took."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def avoid_cudnn_attention() -> None:
    """Keep torch from choosing cuDNN's attention in this process.

    Its gradients are NaN for a padded batch whose length is a multiple of 64 (seen with torch 2.11, CUDA 13.0 and an
    H100); the other kernels of scaled_dot_product_attention are not affected.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
