"""The README.md of a trained model or adapter: base, data, settings and how to load it, by the hub's card helper."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from tkpo import __version__
from tkpo.methods import METHODS
from tkpo.presets import PRESETS
from tkpo.run_config import RunConfig

SETTINGS = ("epochs", "batch_size", "learning_rate", "scheduler", "warmup", "max_length", "seed", "dtype")
OWN = {
    "tkpo": ("preference_weight", "tau", "num_rejects", "sampler", "reduction"),
    "dpo": ("beta", "rpo_alpha"),
    "simpo": ("beta",),
    "orpo": ("beta",),
}
TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

{{ what }} for outlines in a requested style, trained by [TKPO](https://doi.org/10.18653/v1/2025.findings-acl.823)'s
reference implementation, `tkpo` {{ version }}.

## Base

`{{ base }}`, {{ origin }}. SHA-256 of its weights (over its `*.safetensors` files in order of name):
`{{ base_hash }}`.{{ belongs }}

## Data

`{{ dataset }}`, language {{ lang }}, {{ samples }} samples, axis `{{ axis }}`.{{ started }}

## Settings

| setting | value |
| --- | --- |
{{ settings }}

## How to load it

{{ load }}

## Training

{{ steps }} optimizer steps, mean training loss {{ loss }}.
"""


def write_card(folder: Path, config: RunConfig, base_hash: str, metrics: dict) -> None:
    """Write `folder`/README.md.

    folder: the model or adapter.
    config: of the run. Local paths in it are named by their last part: the card may be published.
    base_hash: SHA-256 of the base's weights.
    metrics: of the run, as in metrics.json.
    """
    method = METHODS[config.method]
    adapter = config.finetuning == "lora"
    names = (*SETTINGS, *(("lora_rank", "lora_alpha") if adapter else ()), *OWN.get(config.method, ()))
    base, hub_id = _public(config.model), PRESETS[config.model].hub_id if config.model in PRESETS else None
    belongs = " The adapter belongs to these weights: on others it loads, but writes other outlines." if adapter else ""
    data = ModelCardData(
        base_model=hub_id or (base if "/" in base else None),
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        language=[config.lang] if config.lang else ["en", "zh"],
        tags=["tkpo", config.method, "outline-generation", *(["lora"] if adapter else [])],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        title=f"{base} + {method.label}, {_public(config.dataset)}",
        what="LoRA adapter" if adapter else "Causal language model",
        version=__version__,
        base=base,
        origin=_origin(config.model),
        base_hash=base_hash,
        belongs=belongs,
        dataset=_public(config.dataset),
        lang=config.lang or "en and zh",
        samples=metrics["samples"],
        axis=config.axis,
        started=f" Continues the SFT adapter `{_public(config.sft_adapter)}`." if config.sft_adapter else "",
        settings="\n".join(f"| {name} | {getattr(config, name)} |" for name in ("method", *names)),
        load=_loading(config.model, adapter),
        steps=metrics["steps"],
        loss=f"{metrics['train_loss']:.4f}",
    )
    card.save(folder / "README.md")


def _public(name: str) -> str:
    """The name without the path to it: presets and hub ids as they are, of local paths the last part."""
    return Path(name).name if name.startswith(("/", ".", "~")) or Path(name).exists() else name


def _origin(model: str) -> str:
    if model in PRESETS:
        return f"a preset of `tkpo` ({PRESETS[model].about}), made by `tkpo fetch {model}`"
    return "a model of the hub" if "/" in _public(model) else "a local folder"


def _loading(model: str, adapter: bool) -> str:
    if not adapter:
        return (
            "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")\n```'
        )
    return (
        "```python\nfrom peft import PeftModel\nfrom tkpo import load_model, load_tokenizer\n\n"
        f'model = PeftModel.from_pretrained(load_model("{_public(model)}"), "FOLDER")\n'
        f'tokenizer = load_tokenizer("{_public(model)}")\n```\n\n'
        "or on the command line: `tkpo generate --topic TOPIC --style STYLE --adapters mine=FOLDER`."
    )
