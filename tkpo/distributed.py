"""Training in several processes: the shipped DeepSpeed configurations, and the weights put together again."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

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
        raise TKPOError("--deepspeed needs DeepSpeed: pip install 'tkpo[deepspeed]' (or: bash install.sh deepspeed)")
    if "RANK" not in os.environ:
        raise TKPOError(
            "--deepspeed needs a launcher, one process a GPU: torchrun --nproc-per-node 8 -m tkpo.cli train …"
        )


def join(device: str, deepspeed: str | None, dtype: torch.dtype, output: str) -> TrainingArguments:
    """Join the process group of the launcher, if there is one.

    Under ZeRO-3, from_pretrained splits the weights among the processes while it reads them, for as long as the
    returned object lives.
    """
    arguments = TrainingArguments(
        output_dir=output, use_cpu=device == "cpu", deepspeed=deepspeed, report_to="none", **precision(deepspeed, dtype)
    )
    if deepspeed:
        init_deepspeed()
    return arguments


def init_deepspeed() -> None:
    """Tell DeepSpeed of the process group, which on a CPU transformers makes without it."""
    import deepspeed

    deepspeed.init_distributed()


def precision(deepspeed: str | None, dtype: torch.dtype) -> dict[str, bool]:
    """fp16 and bf16 of TrainingArguments: DeepSpeed's own mixed precision, with master weights in float32.

    Without DeepSpeed the model's dtype alone decides.
    """
    return {
        "fp16": bool(deepspeed) and dtype == torch.float16,
        "bf16": bool(deepspeed) and dtype == torch.bfloat16,
    }


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The model's weights, gathered from all processes, each of which must call this; None where nothing is split."""
    return trainer.accelerator.get_state_dict(trainer.deepspeed) if trainer.is_deepspeed_enabled else None


def parameter_count(model: torch.nn.Module) -> int:
    """Trainable parameters, also of a model that ZeRO-3 has split (each process then holds empty ones)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
