"""One training run from a config to a folder: SFT, TKPO, DPO, SimPO or ORPO, an adapter or a whole model, resumable.

The folder holds config.json, environment.json, log.jsonl, metrics.json, the checkpoints while it runs, and
`model/`: the adapter (or model) itself.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import set_seed

from tkpo.adapters import save_adapter, write_json
from tkpo.attributes import get_axes
from tkpo.callbacks import LogFile, Validation
from tkpo.data import annotate, arrange, balanced_subset, load_records, sample_order
from tkpo.distributed import check_launch, deepspeed_file, join, parameter_count, precision, whole_state
from tkpo.encoding import encode_dataset
from tkpo.environment import environment, peak_memory_mib
from tkpo.errors import TKPOError
from tkpo.machine import avoid_cudnn_attention
from tkpo.methods import PAIRWISE
from tkpo.pairwise import pairwise_trainer
from tkpo.presets import DTYPES, base_model_hash, default_dtype, load_model, load_tokenizer, resolve_model
from tkpo.run_config import RunConfig
from tkpo.training import TKPOConfig, TKPOTrainer

logger = logging.getLogger(__name__)

RESUMABLE = ("epochs", "save_steps", "eval_steps", "eval_samples", "output")  # may differ when a run is resumed


def run(config: RunConfig, resume: bool = True) -> dict:
    """Train as `config` says and return the metrics. A finished run is not trained again.

    resume: go on from the folder's last complete checkpoint; False starts over and deletes what is there.
    TKPOError if the folder holds a run with another config.
    """
    out = Path(config.output)
    main_process = int(os.environ.get("RANK", 0)) == 0
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_launch(config.deepspeed)
    launch = join(device, _deepspeed(config), _dtype(config, device), config.output)
    with launch.main_process_first(local=False):
        if not resume and main_process and (out / "config.json").exists():
            shutil.rmtree(out)
        _check_same_run(config, out)
        if (out / "metrics.json").exists():
            logger.warning("%s is finished already; --restart trains it again", out)
            return json.loads((out / "metrics.json").read_text())
        records = _training_records(config)
        if main_process:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "config.json", asdict(config))
            write_json(out / "environment.json", environment())

    avoid_cudnn_attention()
    set_seed(config.seed)
    model, tokenizer = load_model(config.model, _dtype(config, device), device), load_tokenizer(config.model)
    base_hash = base_model_hash(resolve_model(config.model))
    pairwise = config.method in PAIRWISE
    arguments = _arguments(config, len(records), device)
    make = pairwise_trainer if pairwise else _tkpo_trainer
    trainer = make(config, model, tokenizer, records, arguments, _lora(config))
    trainer.add_callback(LogFile(out / "log.jsonl"))
    if pairwise and config.eval_steps:
        validation = encode_dataset(_training_records(config, "validation"), tokenizer, None, config.max_length)
        trainer.add_callback(Validation(trainer, validation, config.eval_steps))
    checkpoint = last_checkpoint(out)
    done = int(Path(checkpoint).name.split("-")[1]) if checkpoint else 0
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started

    _save(trainer, tokenizer, out / "model", config, base_hash)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    metrics = {
        "train_loss": sum(losses) / max(1, len(losses)),  # Trainer's own forgets the steps before a resume
        "epoch": trainer.state.epoch,
        "seconds": round(seconds, 3),
        "steps": trainer.state.global_step,
        "samples": len(records),
        "seconds_a_step": round(seconds / max(1, trainer.state.global_step - done), 4),
        "peak_memory_mib": peak_memory_mib(),
        "trainable_parameters": parameter_count(trainer.model),
    }
    if main_process:
        write_json(out / "metrics.json", metrics)
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (out / "README.md").unlink(missing_ok=True)  # TRL's model card, about a hub model that is not there
    return metrics


def _check_same_run(config: RunConfig, out: Path) -> None:
    path = out / "config.json"
    if not path.exists():
        return
    old, new = json.loads(path.read_text()), asdict(config)
    changed = [k for k in new if k not in RESUMABLE and old.get(k) != new[k]]
    if changed:
        what = ", ".join(f"{k} {old.get(k)!r} → {new[k]!r}" for k in changed)
        raise TKPOError(f"{out} holds another run ({what}): choose another --output, or --restart to replace it")


def _training_records(config: RunConfig, split: str = "train") -> list[dict]:
    axes = get_axes(config.axis, config.axes_file)
    pairs = config.method in PAIRWISE and split == "train"
    records = load_records(config.dataset, split, config.lang, pairs, config.data_dir)
    records = annotate(records, axes)
    if config.max_articles and split == "train":
        records = balanced_subset(records, config.max_articles)
    most = config.max_samples if split == "train" else config.eval_samples
    if most and most < len(records):
        records = sorted(records, key=sample_order)[:most]
    return [arrange(record, axes[record["axis"]], config.prompt_order) for record in records]


def _dtype(config: RunConfig, device: str) -> torch.dtype:
    """What the base model is loaded in."""
    if config.dtype != "auto":
        return DTYPES.get(config.dtype, config.dtype)
    default = default_dtype(device)
    if config.finetuning == "full" and default != torch.bfloat16 and not config.deepspeed:
        return torch.float32  # without DeepSpeed's master weights, float16 does not train
    return default


def _deepspeed(config: RunConfig) -> str | None:
    return deepspeed_file(config.deepspeed) if config.deepspeed else None


def _arguments(config: RunConfig, count: int, device: str) -> dict:
    world = int(os.environ.get("WORLD_SIZE", 1))
    per_step = config.micro_batch_size * world
    if config.batch_size % per_step:
        raise TKPOError(
            f"batch_size {config.batch_size} cannot be shared by {world} processes of micro_batch_size "
            f"{config.micro_batch_size}: make it a multiple of {per_step}"
        )
    steps = math.ceil(count / config.batch_size) * config.epochs
    return {
        "output_dir": config.output,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.micro_batch_size,
        "gradient_accumulation_steps": config.batch_size // per_step,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": round(config.warmup * steps),
        "max_grad_norm": 1.0,
        "logging_steps": 1,
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "seed": config.seed,
        "use_cpu": device == "cpu",
        **precision(config.deepspeed, _dtype(config, device)),
        "gradient_checkpointing": config.gradient_checkpointing,
        "deepspeed": _deepspeed(config),
        "report_to": "none",
        "dataloader_pin_memory": device != "cpu",
        "max_length": config.max_length,
    }


def _lora(config: RunConfig) -> LoraConfig | None:
    if config.finetuning == "full":
        return None
    return LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _tkpo_trainer(config: RunConfig, model, tokenizer, records, arguments: dict, lora) -> TKPOTrainer:
    names = ("tau", "num_rejects", "sampler", "reduction", "contrast_beta", "contrast_positions", "share_prefix")
    validation = _training_records(config, "validation") if config.eval_steps else None
    args = TKPOConfig(
        **arguments,
        axis=config.axis,
        axes_file=config.axes_file,
        preference_weight=config.preference_weight if config.method == "tkpo" else 0.0,
        contrast_weight=config.contrast_weight if config.method == "contrast" else 0.0,
        **{name: getattr(config, name) for name in names},
        **({"eval_strategy": "steps", "eval_steps": config.eval_steps} if config.eval_steps else {}),
    )
    return TKPOTrainer(model, args, records, validation, processing_class=tokenizer, peft_config=lora)


def last_checkpoint(out: Path) -> str | None:
    """The newest checkpoint that was written to its end, by every process of this run, or None."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    states = [f"rng_state_{rank}.pth" for rank in range(world)] if world > 1 else []
    complete = [
        p
        for p in out.glob("checkpoint-*")
        if _is_json(p / "trainer_state.json") and all((p / name).is_file() for name in states)
    ]
    newest = max(complete, key=lambda p: int(p.name.split("-")[1]), default=None)
    return str(newest) if newest else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True


def _save(trainer, tokenizer, folder: Path, config: RunConfig, base_hash: str) -> None:
    if config.finetuning == "full":
        trainer.save_model(str(folder))
        tokenizer.save_pretrained(folder)
        if int(os.environ.get("RANK", 0)):
            return
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine in it
        saved = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", {**saved, "architectures": ["Qwen2ForCausalLM"]})
        return
    state = whole_state(trainer)
    if int(os.environ.get("RANK", 0)):
        return
    record = {"base_model": config.model, "base_model_sha256": base_hash}
    record |= {name: getattr(config, name) for name in ("method", "dataset", "axis")}
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder, config.model, record, state)
