"""What a training run is: one table of fields that are YAML keys and flags alike."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tkpo.data.prompts import INSTRUCTION_FIRST, PROMPT_ORDERS
from tkpo.errors import TKPOError
from tkpo.launch import deepspeed_file
from tkpo.methods import METHODS
from tkpo.settings import CONTRAST_POSITIONS, REDUCTIONS, SAMPLERS, TKPOSettings

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
# transformers' schedules that need no arguments of their own
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
TRACKERS = ("none", "tensorboard", "wandb", "trackio")
STOP_METRICS = {  # metric → the methods that validate it
    "cross_entropy": tuple(METHODS),
    "loss": ("sft", "tkpo", "contrast"),
    "preference": ("tkpo",),
    "reward": ("tkpo",),
    "accuracy": ("tkpo",),
    "contrast": ("contrast",),
}
PATHS = ("model", "output", "axes_file", "data_dir", "sft_adapter", "deepspeed", "dataset")


def _option(default, help: str, **limits):
    """A field of RunConfig. limits: choices (tuple), least (≥), above (>) or most (≤) of a value that is not None."""
    return field(default=default, metadata={"help": help, **limits})


@dataclass
class RunConfig:
    """What a run is; every field is a flag of `tkpo train` and a key of its YAML file.

    Raises TKPOError for a value outside its range, or for values that exclude each other.
    """

    method: str = _option("tkpo", "training method", choices=tuple(METHODS))
    dataset: str = _option("language_style", "name in dataset_info.json, or a JSON file; several with commas")
    model: str = _option("qwen2.5-coder-0.5b", "preset, local folder or hub id")
    output: str | None = _option(None, "folder of the run; default runs/METHOD-DATASET-SEED")
    axis: str | None = _option(None, "axis of the flip; default: the data set's name")
    axes_file: str | None = _option(None, "YAML table of your own attributes and axes")
    data_dir: str | None = _option(None, "folder with dataset_info.json; default data")
    lang: str | None = _option(None, "language of the samples; default both", choices=("en", "zh"))
    max_samples: int | None = _option(None, "train on at most N samples, picked by hash", least=1)
    max_articles: int | None = _option(
        None, "train on at most N articles in all their styles, balanced, picked by hash", least=1
    )
    prompt_order: str = _option(
        INSTRUCTION_FIRST, "of the prompt's two parts; instruction_first is the published one", choices=PROMPT_ORDERS
    )
    sft_adapter: str | None = _option(
        None, "dpo, simpo: the run or adapter to continue; default: a new adapter on the base"
    )

    finetuning: str = _option("lora", "train an adapter or the whole model", choices=("lora", "full"))
    lora_rank: int = _option(8, "rank of the adapter", least=1)
    lora_alpha: int = _option(16, "scale of the adapter", least=1)
    quantization: str | None = _option(None, "load the base in 4 bits (QLoRA), by bitsandbytes", choices=("4bit",))
    attn_implementation: str | None = _option(
        None, "attention of the base, as transformers names it: sdpa, eager, flash_attention_2; default: its choice"
    )

    epochs: float = _option(1.0, "passes over the samples", above=0)
    batch_size: int = _option(8, "samples (or pairs) per optimizer step", least=1)
    micro_batch_size: int | None = _option(
        None, "samples (or pairs) per forward pass and process; default 1, with --share-prefix 4", least=1
    )
    share_prefix: bool = _option(
        False, "sft, tkpo, contrast: read what samples share, an article for all its styles, once"
    )
    learning_rate: float | None = _option(
        None, "peak; default 2e-4 for sft, tkpo, orpo, 1e-5 for dpo, simpo; full: a tenth of that", above=0
    )
    scheduler: str = _option("cosine", "learning rate schedule", choices=SCHEDULERS)
    warmup: float = _option(0.05, "share of the steps with rising learning rate, 0 to 1", least=0, most=1)
    max_length: int = _option(4096, "tokens of prompt and response; longer articles are cut", least=1)
    seed: int = _option(0, "seed of sample order, adapter and draws", least=0, most=2**32 - 1)
    dtype: str = _option("auto", "dtype of the base model", choices=DTYPES)
    device: str | None = _option(None, "cpu, cuda (cuda:1, …) or mps; default: a GPU if there is one, else cpu")
    gradient_checkpointing: bool = _option(False, "less memory for a third more time")
    deepspeed: str | None = _option(None, "DeepSpeed configuration: a file, or the name of a shipped one")

    preference_weight: float = _option(TKPOSettings.preference_weight, "tkpo: lambda", least=0)
    tau: float = _option(TKPOSettings.tau, "tkpo: temperature", above=0)
    num_rejects: int = _option(TKPOSettings.num_rejects, "tkpo: K, reject tokens per position", least=1)
    sampler: str = _option(TKPOSettings.sampler, "tkpo: how rejects are drawn", choices=SAMPLERS)
    reduction: str = _option(TKPOSettings.reduction, "tkpo: mean over positions", choices=REDUCTIONS)
    contrast_weight: float = _option(1.0, "contrast: weight of the prompt contrast", least=0)
    contrast_beta: float = _option(
        TKPOSettings.contrast_beta, "contrast: inverse temperature of the prompt contrast", above=0
    )
    contrast_positions: str = _option(
        TKPOSettings.contrast_positions, "contrast: how response positions are weighted", choices=CONTRAST_POSITIONS
    )
    beta: float | None = _option(None, "dpo, simpo: beta, orpo: lambda; default 0.1, simpo 2.0", least=0)
    rpo_alpha: float = _option(0.0, "dpo: weight of the likelihood of the chosen responses (RPO)", least=0)

    save_steps: int = _option(20, "optimizer steps between checkpoints", least=1)
    eval_steps: int = _option(0, "optimizer steps between validations; 0: none", least=0)
    eval_samples: int | None = _option(None, "validate on at most N samples, picked by hash", least=1)
    early_stopping: int | None = _option(None, "stop after N validations without improvement", least=1)
    early_stopping_metric: str = _option(
        "cross_entropy", "validation metric that has to improve", choices=tuple(STOP_METRICS)
    )

    report_to: str = _option("none", "experiment tracker", choices=TRACKERS)
    run_name: str | None = _option(None, "name of the run in the tracker; default: the output folder's name")
    push_to_hub: bool = _option(False, "upload the trained model or adapter when the run ends")
    hub_model_id: str | None = _option(None, "repository on the hub, USER/NAME; default: your own, named as the run")

    def __post_init__(self):
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value is not None and (fault := _fault(value, option.metadata)):
                raise TKPOError(f"{option.name} {fault}, not {value!r}")
        if self.micro_batch_size is None:
            self.micro_batch_size = 4 if self.share_prefix else 1
        self._check_together()
        for name in PATHS:
            if str(getattr(self, name) or "").startswith("~"):
                setattr(self, name, str(Path(getattr(self, name)).expanduser()))
        if self.output is None:
            self.output = f"runs/{self.method}-{Path(self.dataset).stem}-{self.seed}"
        if self.axis is None:
            self.axis = Path(self.dataset).stem
        method = METHODS[self.method]
        if self.beta is None:
            self.beta = method.beta
        if self.learning_rate is None:
            self.learning_rate = method.learning_rate / (10 if self.finetuning == "full" else 1)
        if self.deepspeed:
            deepspeed_file(self.deepspeed)

    def _check_together(self) -> None:
        """TKPOError for values that are right by themselves but exclude each other."""
        method = METHODS[self.method]
        if self.device and not re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", self.device):
            raise TKPOError(f"device must be cpu, cuda, cuda:N or mps, not {self.device!r}")
        if self.share_prefix and method.pairwise:
            raise TKPOError(
                f"share_prefix is for sft, tkpo and contrast; {self.method} is trained by TRL, pair by pair"
            )
        if self.share_prefix and self.micro_batch_size < 2:
            raise TKPOError("share_prefix needs a micro_batch_size of 2 or more: one sample shares nothing")
        if self.batch_size % self.micro_batch_size:
            raise TKPOError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.sft_adapter and (not method.continues_sft or self.finetuning == "full"):
            raise TKPOError(
                "sft_adapter is for dpo and simpo with lora; with full fine-tuning the SFT model itself is --model"
            )
        if self.rpo_alpha and self.method != "dpo":
            raise TKPOError(f"rpo_alpha is a term of dpo; {self.method} has none")
        if self.quantization and (self.finetuning == "full" or self.deepspeed):
            raise TKPOError("quantization trains an adapter on a frozen base: not with finetuning full or deepspeed")
        if self.eval_steps and Path(self.dataset).suffix in (".json", ".jsonl"):
            raise TKPOError("eval_steps needs a data set of dataset_info.json, with its validation file: not a file")
        if self.early_stopping and not self.eval_steps:
            raise TKPOError("early_stopping needs validations: set eval_steps")
        if self.early_stopping and self.method not in STOP_METRICS[self.early_stopping_metric]:
            own = ", ".join(name for name, methods in STOP_METRICS.items() if self.method in methods)
            raise TKPOError(f"early_stopping_metric of {self.method} must be one of {own}")
        if self.hub_model_id and not self.push_to_hub:
            raise TKPOError("hub_model_id is where push_to_hub uploads to: add push_to_hub")

    @classmethod
    def load(cls, path: str | Path | None = None, **overrides) -> RunConfig:
        """From a YAML file and overrides; TKPOError names an unknown key or a value of the wrong type."""
        values = {}
        if path:
            try:
                values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise TKPOError(f"cannot read run configuration {path}: {error}") from error
            if not isinstance(values, dict):
                raise TKPOError(f"{path}: expected keys and values")
        values.update(overrides)
        types = {f.name: f.type for f in dataclasses.fields(cls)}
        for key, value in values.items():
            where = f"{path}: " if path and key not in overrides else ""
            if key not in types:
                raise TKPOError(f"{where}unknown key {key!r}; there are: {', '.join(types)}")
            values[key] = _typed(key, value, types[key], where)
        return cls(**values)


def _typed(key: str, value, annotation: str, where: str):
    """`value` as the field's type; YAML reads 2e-4 as text, which float() understands."""
    kind = annotation.split(" | ")[0]
    if value is None:
        if "None" in annotation:
            return None
    elif kind == "bool":
        if isinstance(value, bool):
            return value
    else:
        try:
            if not isinstance(value, (bool, list, dict)):
                return {"str": str, "int": _whole, "float": float}[kind](value)
        except (ValueError, OverflowError):
            pass
    raise TKPOError(f"{where}{key} must be {kind}, not {value!r}")


def _whole(value) -> int:
    if float(value) != int(float(value)):
        raise ValueError
    return int(float(value))


def _fault(value, limits) -> str | None:
    """What a value has to be, if it is not."""
    if "choices" in limits and value not in limits["choices"]:
        return f"must be one of {', '.join(limits['choices'])}"
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    wanted = [
        (name, limits[key])
        for key, name, holds in (
            ("least", "at least", lambda v, limit: v >= limit),
            ("above", "above", lambda v, limit: v > limit),
            ("most", "at most", lambda v, limit: v <= limit),
        )
        if key in limits and not holds(value, limits[key])
    ]
    return f"must be {wanted[0][0]} {wanted[0][1]}" if wanted else None
