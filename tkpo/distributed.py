"""Training in several processes: the shipped DeepSpeed configurations, and the weights put together again."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

import psutil
import torch
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

logger = logging.getLogger(__name__)


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
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and arguments.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        logger.warning("Accelerate does not split models among CPU processes: FSDP is off, each holds the whole model")
    return arguments


def leave() -> None:
    """Leave the launcher's process group, if there is one: the last thing that a process which has finished does.

    Gloo's threads may otherwise abort the interpreter on its way out. A process that failed must not call it: with
    NCCL it would wait for the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def init_deepspeed() -> None:
    """Tell DeepSpeed of the process group, which on a CPU transformers makes without it."""
    import deepspeed

    if os.environ.get("LOCAL_RANK", "0") == "0":
        drop_stale_locks()
    deepspeed.init_distributed()


def drop_stale_locks() -> None:
    """Remove the build locks that killed processes left; every later process would wait for them for ever.

    DeepSpeed compiles its kernels at their first use, through torch.utils.cpp_extension, whose lock is a file that its
    holder keeps open. A lock that no process here has open is stale, unless another node that shares the folder may
    hold it: with several nodes only locks older than ten minutes go.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    several_nodes = os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE")
    newest = time.time() - (600 if several_nodes else 0)
    locks = set()
    for path in root.rglob("lock"):
        with contextlib.suppress(FileNotFoundError):  # its holder has finished meanwhile
            if path.stat().st_mtime <= newest:
                locks.add(path.resolve())
    for path in locks - _open_files() if locks else ():
        path.unlink(missing_ok=True)


def _open_files() -> set[Path]:
    """The files that processes of this machine have open, as far as they may be looked at."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found.update(Path(file.path).resolve() for file in process.open_files())
    return found


def precision(deepspeed: str | None, dtype: torch.dtype) -> dict[str, bool]:
    """fp16 and bf16 of TrainingArguments.

    With DeepSpeed its own mixed precision, with master weights in float32. Without, autocast to bfloat16 for a
    bfloat16 base: the adapter's float32 weights are multiplied in bfloat16 as well.
    """
    return {"fp16": bool(deepspeed) and dtype == torch.float16, "bf16": dtype == torch.bfloat16}


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The model's weights, gathered from all processes, each of which must call this; None where nothing is split."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return None


def parameter_count(model: torch.nn.Module) -> int:
    """Trainable parameters, also of a model that ZeRO-3 has split (each process then holds empty ones)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
