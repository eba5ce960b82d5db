"""GGUF files, as llama.cpp reads them, from models and adapters of transformers and PEFT.

Tensor names, quantisation and the file format are the `gguf` package's. What it leaves to converters is here: the
model's shape, its tokenizer, and the order of Llama's rotary dimensions (as in llama.cpp's convert_hf_to_gguf.py).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftConfig
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tkpo.errors import TKPOError

ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
}
FILE_TYPES = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# How a tokenizer splits text before it merges, and llama.cpp's name for it.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPLITS = {QWEN2_SPLIT: "qwen2", LLAMA3_SPLIT: "llama-bpe"}
NO_MERGE = "\u0100 \u0100"  # llama.cpp wants a list of merges; this one's result is no token, so nothing is merged


def write_model(model: PreTrainedModel, tokenizer, folder: Path, path: Path, dtype: str = "float16") -> None:
    """Write a causal LM and its tokenizer as one GGUF file.

    model: Qwen2, Qwen3, Llama or Mistral; its weights are read, not changed.
    tokenizer: its tokenizer, a byte-level BPE.
    folder: where both were saved by save_pretrained.
    path: the file to write.
    dtype: of the matrices, a key of `FILE_TYPES`; vectors stay float32.
    Raises TKPOError for a model or tokenizer that has no counterpart here.
    """
    config = model.config
    arch = _architecture(config)
    kind, file_type = FILE_TYPES[dtype]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(file_type)
    _add_shape(writer, config)
    _add_tokenizer(writer, tokenizer, folder, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise TKPOError(f"{type(model).__name__} has a tensor {name} for which GGUF has no name")
        _add(writer, found, _rotary_order(tensor, name, config), kind)
    _finish(writer)


def write_adapter(adapter: dict[str, Tensor], peft: PeftConfig, config: PretrainedConfig, path: Path) -> None:
    """Write a LoRA adapter as a GGUF file that llama.cpp puts on the base model's.

    adapter: the tensors of adapter_model.safetensors. peft: its configuration. config: the base model's.
    path: the file to write, float32.
    Raises TKPOError for what llama.cpp's adapters do not have: DoRA, biases, ranks of single modules, whole modules.
    """
    _check_plain_lora(adapter, peft)
    arch = _architecture(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = float(peft.lora_alpha) * (math.sqrt(peft.r) if peft.use_rslora else 1.0)  # llama.cpp divides it by the rank
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in adapter.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        found = match and names.get_name(match[1] + ".weight", try_suffixes=(".weight",))
        if not match or not found:
            raise TKPOError(f"the adapter has a tensor {name} for which GGUF has no name: export it merged")
        tensor = _rotary_order(tensor, match[1] + ".weight", config) if match[2] == "B" else tensor
        _add(writer, f"{found}.lora_{match[2].lower()}", tensor, gguf.GGMLQuantizationType.F32)
    _finish(writer)


def _check_plain_lora(adapter: dict[str, Tensor], peft: PeftConfig) -> None:
    faults = {
        "it is no LoRA": str(getattr(peft.peft_type, "value", peft.peft_type)) != "LORA",
        "DoRA": getattr(peft, "use_dora", False),
        "biases": getattr(peft, "bias", "none") != "none",
        "ranks of single modules": getattr(peft, "rank_pattern", None) or getattr(peft, "alpha_pattern", None),
        "whole modules (modules_to_save)": getattr(peft, "modules_to_save", None),
    }
    if found := [name for name, fault in faults.items() if fault]:
        raise TKPOError(f"llama.cpp's adapters do not have {', '.join(found)}: export it merged (--to merged or gguf)")
    if not adapter:
        raise TKPOError("the adapter has no weights")


def _architecture(config: PretrainedConfig) -> gguf.MODEL_ARCH:
    if config.model_type not in ARCHITECTURES:
        raise TKPOError(
            f"GGUF files are written for {', '.join(ARCHITECTURES)}, not {config.model_type}: "
            "export it merged and use llama.cpp's convert_hf_to_gguf.py"
        )
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        raise TKPOError(f"rotary embeddings of type {rope['rope_type']} are not written: use llama.cpp's converter")
    return ARCHITECTURES[config.model_type]


def _add_shape(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer, folder: Path, size: int) -> None:
    """The vocabulary with its merges, special tokens and chat template, up to the model's `size`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(tokenizer))
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    texts, types = [], []
    for i in range(size):
        if i not in tokens:
            texts.append(f"[PAD{i}]")
            types.append(gguf.TokenType.UNUSED)
            continue
        texts.append(tokens[i])
        special = i in added and added[i].special
        kind = gguf.TokenType.USER_DEFINED if i in added else gguf.TokenType.NORMAL
        types.append(gguf.TokenType.CONTROL if special else kind)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    vocab = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    vocab.merges = vocab.merges or [NO_MERGE]
    vocab.chat_template = tokenizer.chat_template
    vocab.add_special_token = {"bos": tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id}
    vocab.special_token_ids["eos"] = tokenizer.eos_token_id
    vocab.add_to_gguf(writer, quiet=True)


def _split_name(tokenizer) -> str:
    """llama.cpp's name of how the tokenizer splits text; TKPOError if it has none that is known here."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = state["pre_tokenizer"] or {}
    steps = pre.get("pretokenizers", [pre])
    if state["model"]["type"] == "BPE" and steps and steps[-1].get("type") == "ByteLevel":
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(steps[0]["pattern"].get("Regex"))):
            return name
    raise TKPOError(
        "this tokenizer splits text in a way that is not known here: export it merged and use llama.cpp's "
        "convert_hf_to_gguf.py"
    )


def _rotary_order(tensor: Tensor, name: str, config: PretrainedConfig) -> Tensor:
    """Rows of a Llama's query or key projection in the order in which llama.cpp rotates them, pair by pair."""
    match = re.search(r"self_attn\.(q|k)_proj\.weight$", name)
    if ARCHITECTURES[config.model_type] is not gguf.MODEL_ARCH.LLAMA or not match:
        return tensor
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    rows = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, rows, -1).swapaxes(1, 2).reshape(tensor.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: gguf.GGMLQuantizationType) -> None:
    data: np.ndarray[Any, Any] = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    if data.ndim < 2:
        kind = gguf.GGMLQuantizationType.F32
    elif kind is gguf.GGMLQuantizationType.Q8_0 and data.shape[-1] % 32:
        kind = gguf.GGMLQuantizationType.F16  # blocks of 32 do not fit its rows
    writer.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
