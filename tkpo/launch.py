"""What can be said of a training in several processes before torch is imported."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from tkpo.errors import TKPOError

DEEPSPEED_CONFIGS = Path(__file__).parent / "configs" / "deepspeed"


def deepspeed_file(name: str) -> str:
    """Path of a DeepSpeed configuration: a file, or one that the package ships, by its name with or without .json.

    TKPOError lists the shipped ones.
    """
    for path in (Path(name), DEEPSPEED_CONFIGS / name, DEEPSPEED_CONFIGS / f"{name}.json"):
        if path.is_file():
            return str(path)
    shipped = ", ".join(sorted(path.stem for path in DEEPSPEED_CONFIGS.glob("*.json")))
    raise TKPOError(f"no DeepSpeed configuration {name!r}: neither a file nor one that tkpo ships ({shipped})")


def check_launch(deepspeed: str | None) -> None:
    """TKPOError if DeepSpeed is asked for but not installed, or no launcher has started this process."""
    if not deepspeed:
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise TKPOError("--deepspeed needs DeepSpeed: bash install.sh deepspeed, or: pip install deepspeed")
    if "RANK" not in os.environ:
        raise TKPOError(
            "--deepspeed needs a launcher, one process a GPU: torchrun --nproc-per-node 8 -m tkpo.cli train …"
        )
