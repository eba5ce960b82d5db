"""LoRA adapters of the tiny model that nobody has trained."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from tkpo.presets import load_model


def random_adapter(folder: Path, seed: int, **settings) -> Path:
    """A LoRA adapter whose weights are far enough from zero to change what is written; settings of its LoraConfig."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(load_model("tiny", "float32", "cpu"), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
