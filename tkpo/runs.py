"""One training run from a config to a folder: SFT, TKPO, DPO, SimPO or ORPO, an adapter or a whole model, resumable.

The folder holds config.json, environment.json, log.jsonl, metrics.json, the checkpoints while it runs, and
`model/`: the adapter (or model) itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoConfig, EarlyStoppingCallback, IntervalStrategy, set_seed
from transformers.trainer_utils import SaveStrategy

from tkpo.adapters import adapter_folder, save_adapter
from tkpo.attributes import get_axes
from tkpo.callbacks import LogFile
from tkpo.data import arrange, balanced_subset, load_records, sample_order
from tkpo.distributed import join, parameter_count, precision, whole_state
from tkpo.encoding import encode_dataset
from tkpo.environment import environment, peak_memory_mib
from tkpo.errors import TKPOError
from tkpo.hub import check_hub, push
from tkpo.launch import check_launch, deepspeed_file
from tkpo.machine import avoid_cudnn_attention, find_device
from tkpo.methods import PAIRWISE
from tkpo.model_card import write_card
from tkpo.outputs import check_folder, read_json, share_mode, write_json
from tkpo.pairwise import pairwise_trainer
from tkpo.presets import DTYPES, base_model_hash, default_dtype, load_model, load_tokenizer, resolve_model
from tkpo.run_config import RunConfig
from tkpo.settings import TKPOSettings
from tkpo.training import TKPOConfig, TKPOTrainer

logger = logging.getLogger(__name__)

# May differ when a run is resumed:
RESUMABLE = ("epochs", "save_steps", "eval_steps", "eval_samples", "output", "device", "early_stopping")
RESUMABLE += ("report_to", "run_name", "push_to_hub", "hub_model_id")


def run(config: RunConfig, resume: bool = True) -> dict:
    """Train as `config` says and return the metrics. A finished run is not trained again.

    resume: continue from the folder's last complete checkpoint; False starts over and deletes what is there.
    TKPOError, before any weights are loaded, if the folder holds a run with another config, or if something that the
    config asks for cannot be had here.
    """
    out = Path(config.output)
    device = str(find_device(config.device))
    _check_requirements(config, out)
    launch = join(device, _deepspeed(config), _dtype(config, device), config.output)
    if resume and (found := _found(config, out)):
        return found
    records = _training_records(config)
    trainer, tokenizer, base_hash = _prepare(config, records, device)
    with launch.main_process_first(local=False):
        if _is_main():
            _begin(config, out, resume)
    trainer.add_callback(LogFile(out / "log.jsonl"))
    checkpoint = last_checkpoint(out)
    done = int(Path(checkpoint).name.split("-")[1]) if checkpoint else 0
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = _metrics(trainer, time.perf_counter() - started, done)
    _save(trainer, tokenizer, out / "model", config, base_hash)
    if _is_main():
        write_card(out / "model", config, base_hash, metrics)
        share_mode(out / "model", out / "config.json")
        write_json(out / "metrics.json", metrics)
        for checkpoint in out.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        (out / "README.md").unlink(missing_ok=True)  # TRL's model card, about a hub model that is not there
        if config.push_to_hub:
            push(out / "model", config.hub_model_id, out.name)
    return metrics


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _check_requirements(config: RunConfig, out: Path) -> None:
    """TKPOError for what is asked for but not here, or cannot be written."""
    check_launch(config.deepspeed)
    check_folder(out)
    if config.sft_adapter:
        adapter_folder(config.sft_adapter)
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise TKPOError(f"report_to {config.report_to} needs its package: pip install {config.report_to}")
    if config.push_to_hub and _is_main():
        check_hub()
    if config.method == "tkpo":
        size = AutoConfig.from_pretrained(resolve_model(config.model)).get_text_config().vocab_size
        TKPOSettings(config.preference_weight, num_rejects=config.num_rejects).check_vocabulary(size)


def _found(config: RunConfig, out: Path) -> dict | None:
    """The metrics of the run that the folder holds, if it is finished; TKPOError if it is another one.

    A folder without checkpoint, where a start has failed, is nobody's run.
    """
    if not (out / "config.json").exists():
        return None
    finished = (out / "metrics.json").exists()
    if not finished and not last_checkpoint(out):
        return None
    defaults = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    old, new = {**defaults, **read_json(out / "config.json")}, asdict(config)
    changed = [k for k in new if k not in RESUMABLE and old[k] != new[k]]
    if changed:
        what = ", ".join(f"{k} {old[k]!r} → {new[k]!r}" for k in changed)
        raise TKPOError(f"{out} holds another run ({what}): choose another --output, or --restart to replace it")
    if not finished:
        return None
    if old["epochs"] != new["epochs"]:
        raise TKPOError(
            f"{out} is finished with epochs {old['epochs']:g} and cannot be trained on to {new['epochs']:g}: its "
            "optimizer is gone. Choose another --output, or --restart to train it anew"
        )
    logger.warning("%s is finished already; --restart trains it again", out)
    return read_json(out / "metrics.json")


def _begin(config: RunConfig, out: Path, resume: bool) -> None:
    """Make the folder and write what the run is; all that could have been wrong with it has been found by now."""
    if not resume and (out / "config.json").exists():
        shutil.rmtree(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "config.json", asdict(config))
        write_json(out / "environment.json", environment())
    except OSError as error:
        raise TKPOError(f"cannot write to {out}: {error.strerror or error}") from error


def _prepare(config: RunConfig, records: list[dict], device: str):
    """(trainer, tokenizer, hash of the base's weights) of a run that has not begun."""
    avoid_cudnn_attention()
    set_seed(config.seed)
    loading = {"attn_implementation": config.attn_implementation, "quantization": config.quantization}
    model = load_model(config.model, _dtype(config, device), device, **loading)
    tokenizer = load_tokenizer(config.model)
    if config.quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    arguments = _arguments(config, len(records), device)
    validation = _training_records(config, "validation") if config.eval_steps else None
    if config.method in PAIRWISE:
        if validation:
            validation = encode_dataset(validation, tokenizer, None, config.max_length)
        when = _validation_arguments(config)
        trainer = pairwise_trainer(config, model, tokenizer, records, arguments, _lora(config), validation, when)
    else:
        trainer = _tkpo_trainer(config, model, tokenizer, records, arguments, validation)
    if config.early_stopping:
        trainer.add_callback(EarlyStoppingCallback(config.early_stopping))
    return trainer, tokenizer, base_model_hash(resolve_model(config.model))


def _metrics(trainer, seconds: float, done: int) -> dict:
    """What metrics.json says. seconds: of this process's training, which began after `done` steps."""
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    metrics = {
        "train_loss": sum(losses) / max(1, len(losses)),  # Trainer's own forgets the steps before a resume
        "epoch": trainer.state.epoch,
        "seconds": round(seconds, 3),
        "steps": trainer.state.global_step,
        "samples": len(getattr(trainer.train_dataset, "samples", trainer.train_dataset)),  # with share_prefix, of rows
        "seconds_a_step": round(seconds / max(1, trainer.state.global_step - done), 4),
        "peak_memory_mib": peak_memory_mib(),
        "trainable_parameters": parameter_count(trainer.model),
    }
    if trainer.args.load_best_model_at_end:
        metrics |= {"best_step": trainer.state.best_global_step, "best_metric": trainer.state.best_metric}
    return metrics


def _training_records(config: RunConfig, split: str = "train") -> list[dict]:
    axes = get_axes(config.axis, config.axes_file)
    pairs = config.method in PAIRWISE and split == "train"
    records = load_records(config.dataset, split, config.lang, pairs, config.data_dir, axes)
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
        "report_to": config.report_to,
        "run_name": config.run_name or Path(config.output).name,
        "dataloader_pin_memory": device != "cpu",
        "max_length": config.max_length,
    }


def _lora(config: RunConfig) -> LoraConfig | None:
    if config.finetuning == "full":
        return None
    return LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _validation_arguments(config: RunConfig) -> dict:
    """Of TrainingArguments: when to validate, and with early stopping to end with the best weights."""
    if not config.eval_steps:
        return {}
    arguments = {"eval_strategy": IntervalStrategy.STEPS, "eval_steps": config.eval_steps}
    if config.early_stopping:
        arguments |= {
            "save_strategy": SaveStrategy.STEPS,
            "save_steps": config.eval_steps,
            "load_best_model_at_end": True,
            "metric_for_best_model": config.early_stopping_metric,
            "greater_is_better": config.early_stopping_metric in ("reward", "accuracy"),
            "restore_callback_states_from_checkpoint": True,
        }
    return arguments


def _tkpo_trainer(config: RunConfig, model, tokenizer, records, arguments: dict, validation) -> TKPOTrainer:
    names = ("tau", "num_rejects", "sampler", "reduction", "contrast_beta", "contrast_positions", "share_prefix")
    args = TKPOConfig(
        **{**arguments, **_validation_arguments(config)},
        axis=config.axis,
        axes_file=config.axes_file,
        preference_weight=config.preference_weight if config.method == "tkpo" else 0.0,
        contrast_weight=config.contrast_weight if config.method == "contrast" else 0.0,
        **{name: getattr(config, name) for name in names},
    )
    return TKPOTrainer(model, args, records, validation, processing_class=tokenizer, peft_config=_lora(config))


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
        saved, base = (read_json(Path(place) / "config.json") for place in (folder, resolve_model(config.model)))
        write_json(folder / "config.json", {**saved, "architectures": base["architectures"]})
        return
    state = whole_state(trainer)
    if int(os.environ.get("RANK", 0)):
        return
    record = {"base_model": config.model, "base_model_sha256": base_hash}
    record |= {name: getattr(config, name) for name in ("method", "dataset", "axis", "prompt_order")}
    save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder, config.model, record, state)
