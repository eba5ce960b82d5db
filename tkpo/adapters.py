"""Adapter folders: finding, checking, loading and writing them."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tkpo.errors import TKPOError
from tkpo.outputs import share_mode, write_json
from tkpo.presets import base_model_hash, load_model, resolve_model

logger = logging.getLogger(__name__)


def adapter_folder(path: str | Path) -> Path:
    """The folder with adapter_config.json: `path`, or `path`/model of a run.

    TKPOError if neither has one, or if its weights are no safetensors file: a pickle, which may run code, is not read.
    """
    for folder in (Path(path), Path(path) / "model"):
        if (folder / "adapter_config.json").is_file():
            if not (folder / "adapter_model.safetensors").is_file():
                raise TKPOError(f"no adapter_model.safetensors in {folder}: weights are read from safetensors only")
            return folder
    raise TKPOError(f"no adapter in {path}: expected adapter_config.json there or in its folder model/")


def check_base(adapter: Path, model: str) -> None:
    """Warn if the adapter was trained on other base weights than `model`'s; silent where it has no record of them."""
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


def adapter_hash(folder: Path) -> str:
    """SHA-256 (hex) over an adapter's weights and configuration."""
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def prompt_order(folder: Path) -> str:
    """The order of the prompts that an adapter was trained on: its tkpo.json's, else "instruction_first"."""
    path = folder / "tkpo.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record.get("prompt_order", "instruction_first")


def load_with_adapters(model: str, folders: dict[str, Path], dtype, device) -> PreTrainedModel | PeftModel:
    """The base model in eval mode, with its adapters around it.

    model: preset, folder or hub id.
    folders: name → adapter folder.
    dtype, device: as `tkpo.presets.load_model` takes them.
    TKPOError for an adapter that does not fit the model.
    """
    whole = load_model(model, dtype, device)
    for name, folder in folders.items():
        try:
            options = {"adapter_name": name, "low_cpu_mem_usage": True}  # without random weights first
            if isinstance(whole, PeftModel):
                whole.load_adapter(str(folder), **options)
            else:
                whole = PeftModel.from_pretrained(whole, str(folder), **options)
        except (RuntimeError, ValueError, OSError) as error:
            raise TKPOError(f"adapter {folder} does not fit model {model}: {error}") from error
    return whole.eval()


def save_adapter(model: PeftModel, folder: Path, base: str, record: dict, state: dict | None = None) -> None:
    """Write the adapter "default" as bfloat16 safetensors, with a record of its base and training.

    model: the trained PeftModel.
    folder: where adapter_config.json, adapter_model.safetensors and tkpo.json go.
    base: what adapter_config.json names as the base model: a preset, folder or hub id.
    record: content of tkpo.json; `check_base` reads base_model and base_model_sha256.
    state: the weights, where DeepSpeed has split the model's own.
    """
    model.save_pretrained(folder, selected_adapters=["default"], state_dict=state)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card, with paths of this machine in it
    weights = folder / "adapter_model.safetensors"  # at half the size: the adapter's own noise is far coarser
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text()), "base_model_name_or_path": base})
    write_json(folder / "tkpo.json", record)
    share_mode(folder, folder / "tkpo.json")
