"""What a training run is: one table of fields that are YAML keys and flags alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tkpo.data.prompts import INSTRUCTION_FIRST, PROMPT_ORDERS
from tkpo.errors import TKPOError
from tkpo.methods import CONTINUED, METHODS
from tkpo.settings import CONTRAST_POSITIONS, REDUCTIONS, SAMPLERS, TKPOSettings


@dataclass
class RunConfig:
    """What a run is; every field is a flag of `tkpo train` and a key of its YAML file."""

    method: str = field(default="tkpo", metadata={"help": f"one of {', '.join(METHODS)}"})
    dataset: str = field(
        default="language_style", metadata={"help": "name in dataset_info.json, or a JSON file; several with commas"}
    )
    model: str = field(default="qwen2.5-coder-0.5b", metadata={"help": "preset, local folder or hub id"})
    output: str | None = field(default=None, metadata={"help": "folder of the run; default runs/METHOD-DATASET-SEED"})
    axis: str | None = field(default=None, metadata={"help": "axis of the flip; default: the data set's name"})
    axes_file: str | None = field(default=None, metadata={"help": "YAML table of attributes and axes of your own"})
    data_dir: str | None = field(default=None, metadata={"help": "folder with dataset_info.json; default data"})
    lang: str | None = field(default=None, metadata={"help": "en or zh; default both"})
    max_samples: int | None = field(default=None, metadata={"help": "train on so many samples, chosen by hash"})
    max_articles: int | None = field(
        default=None, metadata={"help": "train on at most N articles in all their styles, balanced, picked by hash"}
    )
    prompt_order: str = field(
        default=INSTRUCTION_FIRST, metadata={"help": "instruction_first (as published) or article_first"}
    )
    sft_adapter: str | None = field(default=None, metadata={"help": "dpo, simpo: the run or adapter they continue"})

    finetuning: str = field(default="lora", metadata={"help": "lora or full"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=16, metadata={"help": "scale of the adapter"})

    epochs: float = field(default=1.0, metadata={"help": "passes over the samples"})
    batch_size: int = field(default=8, metadata={"help": "samples (or pairs) an optimizer step"})
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "samples per forward pass; default 1, with --share-prefix 4"}
    )
    share_prefix: bool = field(
        default=False,
        metadata={"help": "sft, tkpo, contrast: read what samples share, an article for all its styles, once"},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "peak; default 2e-4 for sft, tkpo, orpo, 1e-5 for dpo, simpo; full: a tenth"}
    )
    scheduler: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup: float = field(default=0.05, metadata={"help": "share of the steps that warms up"})
    max_length: int = field(default=1024, metadata={"help": "tokens at which a sample is cut"})
    seed: int = field(default=0, metadata={"help": "seed of order, adapter and draws"})
    dtype: str = field(default="auto", metadata={"help": "of the base model: auto, float32, bfloat16, float16"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; default: what there is"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more time"})
    deepspeed: str | None = field(default=None, metadata={"help": "DeepSpeed configuration file"})

    preference_weight: float = field(default=TKPOSettings.preference_weight, metadata={"help": "tkpo: lambda"})
    tau: float = field(default=TKPOSettings.tau, metadata={"help": "tkpo: temperature"})
    num_rejects: int = field(default=TKPOSettings.num_rejects, metadata={"help": "tkpo: K"})
    sampler: str = field(default=TKPOSettings.sampler, metadata={"help": f"tkpo: {', '.join(SAMPLERS)}"})
    reduction: str = field(default=TKPOSettings.reduction, metadata={"help": f"tkpo: {' or '.join(REDUCTIONS)}"})
    contrast_weight: float = field(default=1.0, metadata={"help": "contrast: weight of the prompt contrast"})
    contrast_beta: float = field(
        default=TKPOSettings.contrast_beta, metadata={"help": "contrast: inverse temperature of the prompt contrast"}
    )
    contrast_positions: str = field(
        default=TKPOSettings.contrast_positions, metadata={"help": f"contrast: {' or '.join(CONTRAST_POSITIONS)}"}
    )
    beta: float | None = field(
        default=None, metadata={"help": "dpo, simpo: beta, orpo: lambda; default 0.1, simpo 2.0"}
    )

    save_steps: int = field(default=20, metadata={"help": "optimizer steps between checkpoints"})
    eval_steps: int = field(default=0, metadata={"help": "steps between validations; 0: none"})
    eval_samples: int | None = field(default=None, metadata={"help": "validate on so many samples, chosen by hash"})

    def __post_init__(self):
        for name, choices in (
            ("method", METHODS),
            ("finetuning", ("lora", "full")),
            ("prompt_order", PROMPT_ORDERS),
        ):
            if getattr(self, name) not in choices:
                raise TKPOError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if self.micro_batch_size is None:
            self.micro_batch_size = 4 if self.share_prefix else 1
        if self.share_prefix and METHODS[self.method].pairwise:
            raise TKPOError(
                f"share_prefix is for sft, tkpo and contrast; {self.method} is trained by TRL, pair by pair"
            )
        if self.share_prefix and self.micro_batch_size < 2:
            raise TKPOError("share_prefix needs a micro_batch_size of 2 or more: one sample shares nothing")
        for name in ("epochs", "batch_size", "micro_batch_size", "max_length", "save_steps", "lora_rank"):
            if not getattr(self, name) > 0:
                raise TKPOError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.batch_size % self.micro_batch_size:
            raise TKPOError(f"batch_size {self.batch_size} is no multiple of micro_batch_size {self.micro_batch_size}")
        if self.method in CONTINUED and not self.sft_adapter and self.finetuning == "lora":
            raise TKPOError(
                f"{self.method} continues an SFT adapter: give --sft-adapter RUN_FOLDER (train one with --method sft)"
            )
        if self.sft_adapter and (self.method not in CONTINUED or self.finetuning == "full"):
            raise TKPOError(
                "sft_adapter is for dpo and simpo with lora; with full fine-tuning the SFT model itself is --model"
            )
        if self.eval_steps and Path(self.dataset).suffix in (".json", ".jsonl"):
            raise TKPOError("eval_steps needs a data set of dataset_info.json, with its validation file: not a file")
        if self.output is None:
            self.output = f"runs/{self.method}-{Path(self.dataset).stem}-{self.seed}"
        if self.axis is None:
            self.axis = Path(self.dataset).stem
        if self.beta is None:
            self.beta = METHODS[self.method].beta
        if self.learning_rate is None:
            self.learning_rate = METHODS[self.method].learning_rate / (10 if self.finetuning == "full" else 1)

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
