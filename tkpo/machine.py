"""This machine: what it is, and the two rates that limit what a model does on its processor."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def memory_gib() -> float:
    """Main memory, GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


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
