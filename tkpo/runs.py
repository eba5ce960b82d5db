"""One training run from a config to a folder: SFT, TKPO, DPO, SimPO or ORPO, an adapter or a whole model, resumable.

The folder holds config.json, environment.json, log.jsonl, metrics.json, the checkpoints while it runs, and
`model/`: the adapter (or model) itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, set_seed

from tkpo.attributes import get_axis
from tkpo.data import annotate, load_records, record_key, user_message
from tkpo.distributed import check_launch, deepspeed_file, join, parameter_count, precision, whole_state
from tkpo.errors import TKPOError
from tkpo.loss import IGNORE_INDEX
from tkpo.machine import avoid_cudnn_attention, processor
from tkpo.presets import DTYPES, base_model_hash, default_dtype, load_model, load_tokenizer, resolve_model
from tkpo.run_config import PAIRWISE, RunConfig
from tkpo.training import TKPOConfig, TKPOTrainer, encode_dataset

logger = logging.getLogger(__name__)

SIMPO_GAMMA = 0.5  # margin; TRL's default, within the range of the SimPO paper (arXiv 2405.14734)
RESUMABLE = ("epochs", "save_steps", "eval_steps", "eval_samples", "output")  # may differ when a run is resumed


# ---- the run -------------------------------------------------------------------------------------------


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
            _write_json(out / "config.json", asdict(config))
            _write_json(out / "environment.json", environment())

    avoid_cudnn_attention()
    set_seed(config.seed)
    model, tokenizer = load_model(config.model, _dtype(config, device), device), load_tokenizer(config.model)
    base_hash = base_model_hash(resolve_model(config.model))
    pairwise = config.method in PAIRWISE
    trainer = (_pairwise_trainer if pairwise else _tkpo_trainer)(config, model, tokenizer, records, device)
    trainer.add_callback(_LogFile(out / "log.jsonl"))
    if pairwise and config.eval_steps:
        validation = encode_dataset(_training_records(config, "validation"), tokenizer, None, config.max_length)
        trainer.add_callback(_Validation(trainer, validation, config.eval_steps))
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
        _write_json(out / "metrics.json", metrics)
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
    axis = get_axis(config.axis, config.axes_file)
    pairs = config.method in PAIRWISE and split == "train"
    records = load_records(config.dataset, split, config.lang, pairs, config.data_dir)
    records = annotate(records, axis)
    most = config.max_samples if split == "train" else config.eval_samples
    if most and most < len(records):
        records = sorted(records, key=sample_order)[:most]
    return records


def sample_order(record: dict) -> bytes:
    """A fixed shuffle, the same for a data set and its pairs, so that every method sees the same samples."""
    return hashlib.sha256(record_key(record).encode()).digest()


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


def _common_arguments(config: RunConfig, count: int, device: str) -> dict:
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


def _tkpo_trainer(config: RunConfig, model, tokenizer, records, device: str) -> TKPOTrainer:
    names = ("tau", "num_rejects", "sampler", "reduction")
    weight = config.preference_weight if config.method == "tkpo" else 0.0
    validation = _training_records(config, "validation") if config.eval_steps else None
    args = TKPOConfig(
        **_common_arguments(config, len(records), device),
        axis=config.axis,
        axes_file=config.axes_file,
        preference_weight=weight,
        **{name: getattr(config, name) for name in names},
        **({"eval_strategy": "steps", "eval_steps": config.eval_steps} if config.eval_steps else {}),
    )
    return TKPOTrainer(model, args, records, validation, processing_class=tokenizer, peft_config=_lora(config))


def _pairwise_trainer(config: RunConfig, model, tokenizer, records, device: str):
    """TRL's trainer of a pairwise method.

    dpo and simpo continue the SFT adapter, dpo against a frozen copy of it; orpo starts from the base.
    """
    from datasets import Dataset

    Config, Trainer = import_trl(config.method)
    rows = []
    for record in records:
        messages = [{"role": "user", "content": user_message(record)}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": prompt, "chosen": record["chosen"], "rejected": record["rejected"]})
    if not hasattr(model, "warnings_issued"):
        model.warnings_issued = {}  # transformers 5 dropped it, TRL 0.24 writes to it
    known = {f.name for f in dataclasses.fields(Config)}  # newer TRL has fewer knobs and these defaults
    wanted = {**_common_arguments(config, len(records), device), "beta": config.beta}
    if config.method == "dpo":
        wanted |= {"max_prompt_length": None, "use_logits_to_keep": True}
    else:  # TRL 0.24 cuts the prompt of a pair that is too long, newer TRL the responses
        wanted |= {"max_prompt_length": config.max_length * 3 // 4, "truncation_mode": "keep_start"}
    if config.method == "simpo":
        wanted |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": SIMPO_GAMMA}
    peft = {}
    if config.method == "orpo":
        peft = {"peft_config": _lora(config)}
    elif config.finetuning == "lora":
        adapter = adapter_folder(config.sft_adapter)
        check_base(adapter, config.model)
        # of a checkpoint with two adapters, Trainer loads only the one in a sub-folder: the frozen copy
        start = last_checkpoint(Path(config.output)) or adapter
        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
        if "ref_adapter_name" in known:  # else TRL makes the frozen copy itself, or the method needs none
            model.load_adapter(str(adapter), adapter_name="reference")
            model.set_adapter("default")  # loading a frozen adapter froze this one too
            wanted |= {"model_adapter_name": "default", "ref_adapter_name": "reference"}
        for adapter_config in model.peft_config.values():  # else PEFT asks the hub for the preset at each checkpoint
            adapter_config.base_model_name_or_path = str(resolve_model(config.model))
    args = Config(**{key: value for key, value in wanted.items() if key in known})
    return Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **peft)


def import_trl(method: str) -> tuple[type, type]:
    """TRL's config and trainer for a pairwise method: dpo, simpo (a loss of CPO) or orpo.

    TRL 0.24 asks transformers which optional packages there are and takes the answer for a bool; transformers 5
    answers (False, None), which is true, so that TRL then imports packages nobody has installed.
    """
    import_utils = importlib.import_module("trl.import_utils")
    for name, value in vars(import_utils).items():
        if name.endswith("_available") and isinstance(value, tuple):
            setattr(import_utils, name, value[0])
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    name = {"dpo": "DPO", "simpo": "CPO", "orpo": "ORPO"}[method]
    try:
        place = importlib.import_module("trl")
        return getattr(place, f"{name}Config"), getattr(place, f"{name}Trainer")
    except AttributeError:  # newer TRL keeps only dpo there
        place = importlib.import_module(f"trl.experimental.{name.lower()}")
        return getattr(place, f"{name}Config"), getattr(place, f"{name}Trainer")


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


class _LogFile(TrainerCallback):
    """Appends what the trainer logs to a JSON Lines file; a resumed run drops the lines it will write again."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            lines = []
            for text in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a killed run may leave half a line
                    lines.append(json.loads(text))
            kept = [line for line in lines if line["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class _Validation(TrainerCallback):
    """Every so many steps the mean cross-entropy of the validation outlines, as TKPOTrainer logs it, for TRL's."""

    def __init__(self, trainer, rows, steps: int):
        self.trainer, self.rows, self.steps = trainer, rows, steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.steps:
            return
        started, losses = time.perf_counter(), []
        model.eval()
        with torch.no_grad():
            for row in self.rows:
                ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
                kept = int((labels != IGNORE_INDEX).sum())
                logits = model(input_ids=ids, logits_to_keep=kept + 1).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits.float(), labels[0, -kept:]).item())
        model.train()
        seconds = round(time.perf_counter() - started, 3)
        self.trainer.log({"eval_cross_entropy": round(sum(losses) / len(losses), 6), "eval_runtime": seconds})


# ---- adapters ------------------------------------------------------------------------------------------


def _save(trainer, tokenizer, folder: Path, config: RunConfig, base_hash: str) -> None:
    if config.finetuning == "full":
        trainer.save_model(str(folder))
        tokenizer.save_pretrained(folder)
        if int(os.environ.get("RANK", 0)):
            return
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, with paths of this machine in it
        saved = json.loads((folder / "config.json").read_text())
        _write_json(folder / "config.json", {**saved, "architectures": ["Qwen2ForCausalLM"]})
        return
    state = whole_state(trainer)
    if int(os.environ.get("RANK", 0)):
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.save_pretrained(folder, selected_adapters=["default"], state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card, with paths of this machine in it
    weights = folder / "adapter_model.safetensors"  # at half the size: the adapter's own noise is far coarser
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    adapter_config = json.loads(path.read_text())
    adapter_config["base_model_name_or_path"] = config.model
    _write_json(path, adapter_config)
    _write_json(
        folder / "tkpo.json",
        {
            "base_model": config.model,
            "base_model_sha256": base_hash,
            "method": config.method,
            "dataset": config.dataset,
            "axis": config.axis,
        },
    )


def adapter_folder(path: str | Path) -> Path:
    """The folder with adapter_config.json: `path`, or `path`/model of a run.

    TKPOError if neither is one, or if its weights are no safetensors file: a pickle, which may run code, is not read.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise TKPOError(f"no adapter_model.safetensors in {folder}: weights are read from safetensors only")
            return folder
    raise TKPOError(f"no adapter in {path}: expected adapter_config.json there or in its folder model/")


def check_base(adapter: Path, model: str) -> None:
    """Warn if the adapter was trained on other base weights than `model`'s; nothing is said where it has no record."""
    path = adapter / "tkpo.json"
    if not path.exists():
        return
    made = json.loads(path.read_text())
    found = base_model_hash(resolve_model(model))
    if made["base_model_sha256"] != found:
        logger.warning(
            "adapter %s was trained on %s with weights %s…, but %s here has weights %s…: expect other outlines",
            *(adapter, made["base_model"], made["base_model_sha256"][:12], model, found[:12]),
        )


# ---- records of a run ----------------------------------------------------------------------------------


def environment() -> dict:
    """Versions, machine and code revision, for the run's record."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")
    versions = {}
    for name in packages:
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
    """Peak GPU memory where there is a GPU, else the process's peak resident memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)


def _write_json(path: Path, value) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
