"""Where something was computed: versions, machine and code revision, and the memory it took."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from tkpo.machine import processor

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")


def environment() -> dict:
    """Versions, machine and code revision, for the record of a run or an evaluation."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "revision": _revision(),
    }


def _revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory_mib() -> float:
    """Peak GPU memory where a GPU was used, else this process's peak resident memory, MiB."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(_peak_resident_bytes() / 2**20, 1)


def _peak_resident_bytes() -> int:
    try:
        import resource  # Unix only
    except ImportError:
        return psutil.Process().memory_info().peak_wset  # Windows only
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
