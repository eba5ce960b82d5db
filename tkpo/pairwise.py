"""The pairwise methods, trained by TRL: DPO, SimPO (a loss of its CPO trainer) and ORPO."""

from __future__ import annotations

import importlib
import os

from peft import LoraConfig, PeftModel

from tkpo.adapters import adapter_folder, check_base
from tkpo.data import user_message
from tkpo.presets import resolve_model
from tkpo.run_config import RunConfig

SIMPO_GAMMA = 0.5  # margin; TRL's default, within the range of the SimPO paper (arXiv 2405.14734)
TRL_NAMES = {"dpo": ("trl", "DPO"), "simpo": ("trl.experimental.cpo", "CPO"), "orpo": ("trl.experimental.orpo", "ORPO")}


def import_trl(method: str) -> tuple[type, type]:
    """TRL's config and trainer for a pairwise method: dpo, simpo or orpo."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    module, name = TRL_NAMES[method]
    place = importlib.import_module(module)
    return getattr(place, f"{name}Config"), getattr(place, f"{name}Trainer")


def pairwise_trainer(
    config: RunConfig, model, tokenizer, records: list[dict], arguments: dict, lora: LoraConfig | None
):
    """TRL's trainer of a pairwise method.

    DPO and SimPO continue the SFT adapter, DPO against a frozen copy of it, which TRL makes; ORPO starts from the base.

    config: the run.
    model, tokenizer: of the base.
    records: pairs, with `chosen` and `rejected`.
    arguments: of transformers' TrainingArguments, and max_length.
    lora: the adapter to train where none is continued; None trains the whole model.
    """
    from datasets import Dataset

    Config, Trainer = import_trl(config.method)
    rows = []
    for record in records:
        messages = [{"role": "user", "content": user_message(record)}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        rows.append({"prompt": prompt, "chosen": record["chosen"], "rejected": record["rejected"]})
    own = {"beta": config.beta}
    if config.method == "simpo":
        own |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": SIMPO_GAMMA}
    if config.sft_adapter:
        model, lora = _continued(config, model), None
    return Trainer(
        model=model,
        args=Config(**arguments, **own),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )


def _continued(config: RunConfig, model) -> PeftModel:
    """The base with the SFT adapter, to be trained on."""
    adapter = adapter_folder(config.sft_adapter)
    check_base(adapter, config.model)
    model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    for adapter_config in model.peft_config.values():  # else PEFT asks the hub for the preset at each checkpoint
        adapter_config.base_model_name_or_path = str(resolve_model(config.model))
    return model
