"""LLaMA-Factory with the TKPO loss: its own YAML file, with one section `tkpo:` more.

`train` takes the section out, patches the model's class in this process (`tkpo.causal_lm.patch`), and hands the rest to
LLaMA-Factory's SFT stage as published. Under torchrun every worker does so for itself. The log has the loss's terms
beside `loss`; `eval_loss` stays what LLaMA-Factory makes of the plain model, the mean cross-entropy of the tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    TrainerCallback,
)

from tkpo.attributes import get_axis
from tkpo.causal_lm import check_covered, patch
from tkpo.data import data_dir
from tkpo.distributed import init_deepspeed
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper
from tkpo.launch import check_launch, deepspeed_file
from tkpo.loss_log import LossLog
from tkpo.machine import avoid_cudnn_attention
from tkpo.presets import PRESETS, resolve_model
from tkpo.run_config import RunConfig
from tkpo.settings import TKPOSettings

CONFIGS = Path(__file__).parent / "configs"
LOSS_KEYS = [f.name for f in dataclasses.fields(TKPOSettings) if f.name not in ("flipper", "chunk_size")]
SECTION = ("axis", "axes_file", *LOSS_KEYS)
# Keys of transformers 4 that later releases dropped, as LLaMA-Factory's published files still have them, and the key
# that took over, if one did.
FORMER_KEYS = {
    "adafactor": "optim: adafactor",
    "dispatch_batches": "accelerator_config",
    "evaluation_strategy": "eval_strategy",
    "fp16_backend": None,
    "fp16_opt_level": None,
    "fsdp_min_num_params": "fsdp_config",
    "fsdp_transformer_layer_cls_to_wrap": "fsdp_config",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "half_precision_backend": None,
    "include_inputs_for_metrics": "include_for_metrics",
    "include_tokens_per_second": None,
    "jit_mode_eval": None,
    "logging_dir": None,
    "mp_parameters": None,
    "no_cuda": "use_cpu",
    "overwrite_output_dir": None,
    "past_index": None,
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_organization": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "ray_scope": None,
    "save_safetensors": None,
    "sharded_ddp": "fsdp",
    "split_batches": "accelerator_config",
    "torchdynamo": "torch_compile",
    "tpu_metrics_debug": None,
    "tpu_num_cores": None,
    "use_ipex": None,
    "use_legacy_prediction_loop": None,
    "use_mps_device": None,
    "warmup_ratio": "warmup_steps",
    "xpu_backend": "ddp_backend",
}
# What would take the loss out of the patch's hands, or put several prompts in a row, and so train something else.
REFUSED = {
    "packing": "it puts several samples, each with a prompt of its own, in one row",
    "neat_packing": "it puts several samples, each with a prompt of its own, in one row",
    "train_on_prompt": "the prompt has no response to compare",
    "enable_liger_kernel": "it replaces the loss",
    "use_unsloth": "it replaces the model's code",
    "mixture_of_depths": "it replaces the model's code",
    "upcast_lmhead_output": "the loss computes its logits in float32 anyway",
    "use_dft_loss": "it replaces the loss",
    "use_asft_loss": "it replaces the loss",
    "use_eaft_loss": "it replaces the loss",
    "use_ray": "its workers are processes that are not patched; use torchrun",
}


def train(config: str | Path, overrides: Sequence[str] = (), callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Run LLaMA-Factory on a YAML file, with the TKPO loss if the file has a section `tkpo:`.

    config: a file, or one that the package ships (qwen_sft_tkpo.yaml, qwen_sft.yaml, qwen_dpo.yaml).
    overrides: `key=value` as LLaMA-Factory takes them, `tkpo.tau=0.2` for the section.
    callbacks: of transformers, given to its Trainer.

    Beyond LLaMA-Factory's own values, `model_name_or_path` may be a preset and `deepspeed` the name of a shipped
    configuration. Keys that the installed transformers has dropped are left out with a warning. TKPOError for a wrong
    key or value, a sample in whose prompts no attribute phrase of the axis is found (before the first step), a model
    that the patch does not cover, or a feature that would replace the loss.
    """
    run_exp = _import_run_exp()
    avoid_cudnn_attention()
    arguments, section = read_config(config, overrides)
    arguments = _drop_former_keys(arguments)
    callbacks = list(callbacks)
    with contextlib.ExitStack() as stack:
        if section is not None:
            settings = _settings(section, arguments, config)
            callbacks = [_Check(settings), LossLog(settings), *callbacks]  # the others see the terms in the log
            stack.callback(patch(_model_class(_model_config(arguments), config), settings))
        if arguments.get("deepspeed") and not torch.cuda.is_available():
            check_launch(arguments["deepspeed"])
            init_deepspeed()
        try:
            run_exp(arguments, callbacks)
        except (ValueError, TypeError, AssertionError) as error:
            places = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            if places & {"get_train_args", "get_dataset", "get_ray_args"}:  # the user's file or data, not a defect
                raise TKPOError(f"{config}: LLaMA-Factory refuses it: {error}") from error
            raise


def read_config(config: str | Path, overrides: Sequence[str] = ()) -> tuple[dict, dict | None]:
    """(LLaMA-Factory's keys, the section `tkpo:` or None) of a YAML file; TKPOError if it cannot be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = next((p for p in (Path(config), CONFIGS / config) if p.is_file()), None)
    if path is None:
        shipped = ", ".join(sorted(p.name for p in CONFIGS.glob("qwen_*.yaml")))
        raise TKPOError(f"no file {config}; tkpo ships {shipped}")
    try:
        merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(list(overrides)))
        arguments = OmegaConf.to_container(merged, resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise TKPOError(f"cannot read {path}: {error}") from error
    if not isinstance(arguments, dict):
        raise TKPOError(f"{path}: expected keys and values")
    section = arguments.pop("tkpo", None)
    if section is not None and not isinstance(section, dict):
        raise TKPOError(f"{path}: the section tkpo: needs keys and values, not {section!r}")
    for key in ("model_name_or_path", "ref_model"):
        if arguments.get(key) in PRESETS:
            arguments[key] = str(resolve_model(arguments[key]))
    if isinstance(arguments.get("deepspeed"), str):
        arguments["deepspeed"] = deepspeed_file(arguments["deepspeed"])
    if "dataset_dir" not in arguments:
        with contextlib.suppress(TKPOError):  # no built data sets here: LLaMA-Factory says what it looked for
            arguments["dataset_dir"] = str(data_dir())
    return arguments, section


def _drop_former_keys(arguments: dict) -> dict:
    """The arguments without those that transformers once had and LLaMA-Factory would refuse as unknown."""
    from llamafactory.hparams import parser

    known = {f.name for group in parser._TRAIN_ARGS for f in dataclasses.fields(group)}
    for key in sorted(arguments.keys() & FORMER_KEYS.keys() - known):
        instead = f"; {FORMER_KEYS[key]} took its place" if FORMER_KEYS[key] else ""
        _log().warning_rank0(f"{key} is left out: transformers {transformers.__version__} does not know it{instead}")
        arguments = {name: value for name, value in arguments.items() if name != key}
    return arguments


def _settings(section: dict, arguments: dict, config: str | Path) -> TKPOSettings:
    """Settings of the section, with the flipper of the model's tokenizer."""
    for key in section:
        if key not in SECTION:
            raise TKPOError(f"{config}: unknown key {key!r} in section tkpo:; there are: {', '.join(SECTION)}")
    if arguments.get("stage", "sft") != "sft":
        raise TKPOError(f"{config}: TKPO is trained by the stage sft, not {arguments['stage']}: leave out tkpo:")
    for key, reason in REFUSED.items():
        if arguments.get(key):
            raise TKPOError(f"{config}: {key} cannot be used with TKPO: {reason}. Turn it off")
    if not arguments.get("model_name_or_path"):
        raise TKPOError(f"{config}: no model_name_or_path")
    if not section.get("axis"):
        raise TKPOError(f"{config}: section tkpo: needs an axis, e.g. language_style")
    try:
        values = RunConfig.load(**section)
        settings = TKPOSettings(**{key: getattr(values, key) for key in LOSS_KEYS if key in section})
        axis = get_axis(section["axis"], values.axes_file)
    except TKPOError as error:
        raise TKPOError(f"{config}: section tkpo: {error}") from error
    size = _model_config(arguments).get_text_config().vocab_size
    if settings.preference_weight and settings.num_rejects >= size:
        raise TKPOError(
            f"{config}: section tkpo: num_rejects (K) is {settings.num_rejects}, but the model's vocabulary has only "
            f"{size} tokens"
        )
    tokenizer = AutoTokenizer.from_pretrained(**_source(arguments))
    return dataclasses.replace(settings, flipper=PromptFlipper(tokenizer, axis))


def _source(arguments: dict) -> dict:
    """What LLaMA-Factory gives to from_pretrained to find the model."""
    return {
        "pretrained_model_name_or_path": arguments["model_name_or_path"],
        "cache_dir": arguments.get("cache_dir"),
        "revision": arguments.get("model_revision", "main"),
        "trust_remote_code": arguments.get("trust_remote_code", False),
    }


def _model_config(arguments: dict) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(**_source(arguments))
    except (OSError, ValueError) as error:
        raise TKPOError(f"cannot load the model {arguments['model_name_or_path']}: {error}") from error


def _model_class(model_config: PretrainedConfig, config: str | Path) -> type[PreTrainedModel]:
    """The class that LLaMA-Factory will load; TKPOError if transformers has no causal LM of this configuration."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
    if found is None:
        raise TKPOError(f"{config}: TKPO trains causal language models of transformers, not {model_config.model_type}")
    return found


class _Check(TrainerCallback):
    """Before the first step: is it a covered, patched model that is trained, and can every sample be flipped?"""

    def __init__(self, settings: TKPOSettings):
        self.settings = settings

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(base, "tkpo", None) is not self.settings:
            raise TKPOError(f"LLaMA-Factory trains a {type(base).__name__}, which the patch does not cover")
        check_covered(base)
        self.settings.check_vocabulary(base.config.get_text_config().vocab_size)
        self._announce(base)
        if not self.settings.flips:
            return
        dataset = train_dataloader.dataset
        for number, row in enumerate(dataset if hasattr(dataset, "__len__") else (), 1):  # no: it is streamed
            self.settings.flipper.flip_row(list(row["input_ids"]), list(row["labels"]), f"training sample {number}")

    def _announce(self, base: PreTrainedModel) -> None:
        s = self.settings
        terms = ["cross_entropy"]
        terms += [f"{s.preference_weight:g} * preference"] if s.preference_weight else []
        terms += [f"{s.contrast_weight:g} * contrast"] if s.contrast_weight else []
        values = ", ".join(f"{key} {getattr(s, key)}" for key in LOSS_KEYS if not key.endswith("_weight"))
        axes = ", ".join(s.flipper.axes) if s.flipper else ""
        _log().info_rank0(
            f"TKPO is active on {type(base).__name__}: loss = {' + '.join(terms)} ({values}; axis {axes}). "
            "eval_loss is the plain model's cross-entropy"
        )


def _log() -> logging.Logger:
    """LLaMA-Factory's logger, so that the lines look like its own; its rank-0 methods are on every logger."""
    from llamafactory.extras import logging as theirs

    return theirs.get_logger("llamafactory.tkpo")


def _import_run_exp() -> Callable:
    """LLaMA-Factory's run_exp; TKPOError if it is not there or does not load."""
    if importlib.util.find_spec("llamafactory") is None:
        raise TKPOError("LLaMA-Factory is not installed: bash install.sh llamafactory")
    try:
        with _torchaudio_left_out():
            import llamafactory.data.mm_plugin  # noqa: F401
        from llamafactory.train.tuner import run_exp
    except ImportError as error:
        raise TKPOError(f"LLaMA-Factory does not load: {error}. Install it by: bash install.sh llamafactory") from error
    return run_exp


@contextlib.contextmanager
def _torchaudio_left_out() -> Iterator[None]:
    """Within this, `import torchaudio` gives an empty module on a CPU build of torch that has no torchaudio.

    LLaMA-Factory's data/mm_plugin.py imports it at the top, for audio samples. Its published wheels (torchvision's
    too, which LLaMA-Factory only names as a requirement) are linked against CUDA and do not load beside a CPU build.
    With a GPU build, or where torchaudio is installed, nothing is touched.
    """
    from transformers.utils import is_torchaudio_available

    gpu_build = torch.version.cuda or torch.version.hip
    if gpu_build or is_torchaudio_available() or "torchaudio" in sys.modules:
        yield
        return
    placeholder = sys.modules["torchaudio"] = ModuleType("torchaudio")
    placeholder.__spec__ = ModuleSpec("torchaudio", None)
    try:
        yield
    finally:
        del sys.modules["torchaudio"]
