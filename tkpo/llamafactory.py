"""LLaMA-Factory with the TKPO loss: its own YAML file, with one section `tkpo:` more.

`train` takes the section out, patches Qwen2 in this process (`patch_qwen2`), and hands the rest to LLaMA-Factory's
SFT stage as it was published. Under torchrun every worker does so for itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM, TrainerCallback

from tkpo.attributes import get_axis
from tkpo.data import data_dir
from tkpo.distributed import init_deepspeed
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper
from tkpo.launch import check_launch, deepspeed_file
from tkpo.loss import IGNORE_INDEX
from tkpo.machine import avoid_cudnn_attention
from tkpo.modeling_qwen2 import patch_qwen2
from tkpo.presets import PRESETS, resolve_model
from tkpo.run_config import RunConfig
from tkpo.settings import TKPOSettings

CONFIGS = Path(__file__).parent / "configs"
SECTION = ("axis", "axes_file", "preference_weight", "tau", "num_rejects", "sampler", "reduction")
# What would take the loss out of Qwen2's hands, or put several prompts in a row, and so train something else.
REFUSED = {
    "packing": "it puts several samples, each with a prompt of its own, in one row",
    "neat_packing": "it puts several samples, each with a prompt of its own, in one row",
    "train_on_prompt": "the prompt has no response to compare",
    "enable_liger_kernel": "it replaces the loss",
    "use_unsloth": "it replaces the model's code",
    "use_dft_loss": "it replaces the loss",
    "use_asft_loss": "it replaces the loss",
    "use_eaft_loss": "it replaces the loss",
    "use_ray": "its workers are processes that are not patched; use torchrun",
}


def train(config: str | Path, overrides: list[str] = (), callbacks: list[TrainerCallback] = ()) -> None:
    """Run LLaMA-Factory on a YAML file, with the TKPO loss if the file has a section `tkpo:`.

    config: a file, or one that the package ships (qwen_sft_tkpo.yaml, qwen_sft.yaml, qwen_dpo.yaml).
    overrides: `key=value` as LLaMA-Factory takes them, `tkpo.tau=0.2` for the section.
    callbacks: of transformers, given to its Trainer.
    Beyond LLaMA-Factory's own keys' values, `model_name_or_path` may be a preset and `deepspeed` the name of a
    shipped configuration. TKPOError for a wrong key or value, a sample in whose prompt no attribute phrase of the
    axis is found (before the first step), a model that is no Qwen2, or a feature that would replace the loss.
    """
    run_exp = _import_run_exp()
    avoid_cudnn_attention()
    arguments, section = read_config(config, overrides)
    callbacks = list(callbacks)
    with contextlib.ExitStack() as stack:
        if section is not None:
            settings = _settings(section, arguments, config)
            callbacks.append(_Check(settings))
            stack.callback(patch_qwen2(settings))
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


def read_config(config: str | Path, overrides: list[str] = ()) -> tuple[dict, dict | None]:
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
        arguments["dataset_dir"] = str(data_dir())
    return arguments, section


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
    try:
        values = RunConfig.load(**section)
    except TKPOError as error:
        raise TKPOError(f"{config}: section tkpo: {error}") from error
    if "axis" not in section:
        raise TKPOError(f"{config}: section tkpo: needs an axis, e.g. language_style")
    tokenizer = AutoTokenizer.from_pretrained(
        arguments["model_name_or_path"],
        cache_dir=arguments.get("cache_dir"),
        revision=arguments.get("model_revision", "main"),
        trust_remote_code=arguments.get("trust_remote_code", False),
    )
    names = ("preference_weight", "tau", "num_rejects", "sampler", "reduction")
    flipper = PromptFlipper(tokenizer, get_axis(values.axis, values.axes_file))
    return TKPOSettings(**{name: getattr(values, name) for name in names}, flipper=flipper)


class _Check(TrainerCallback):
    """Before the first step: is it the patched model that is trained, and can every sample's prompt be flipped?"""

    def __init__(self, settings: TKPOSettings):
        self.settings = settings

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(base, Qwen2ForCausalLM) or getattr(base, "tkpo", None) is not self.settings:
            raise TKPOError(f"TKPO is written for Qwen2ForCausalLM, this model is {type(base).__name__}")
        if not self.settings.flips:
            return
        dataset = train_dataloader.dataset
        for number, row in enumerate(dataset if hasattr(dataset, "__len__") else (), 1):  # no: it is streamed
            start = next((i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX), None)
            if start is not None:
                self.settings.flipper.flip_ids(list(row["input_ids"]), start, f"training sample {number}")


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
