"""Outlines by vLLM's offline engine, for many documents on GPUs; its adapters are LoRA requests."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from tkpo.adapters import adapter_folder, adapter_hash, check_base, prompt_order
from tkpo.errors import TKPOError
from tkpo.presets import base_model_hash, load_tokenizer, resolve_model
from tkpo.prompting import INSTRUCTION_FIRST, PromptWriter
from tkpo.sampling import TOP_P, Decoding

BASE = "base"


def why_not(decoding: Decoding) -> str | None:
    """Why vLLM cannot write with these settings here; None where it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed (pip install vllm, on a machine with a GPU)"
    if not torch.cuda.is_available():
        return "vllm is installed, but there is no GPU"
    if decoding.guard != "none" or decoding.style_strength:
        return "vllm knows neither the loop guard nor style strength: add --guard none and leave out --style-strength"
    return None


class VLLMEngine:
    """Writes outlines as `tkpo.generation.OutlineGenerator.each` does, without loop guard and style strength.

    Args:
        model: preset, folder or hub id.
        adapters: name → run or adapter folder.
        dtype: "auto" or torch's name for one.
        tensor_parallel: GPUs that share the model.
        axes_file, base_prompt_order: as in `OutlineGenerator`.
    """

    engine = "vllm"

    def __init__(
        self,
        model: str,
        adapters: dict[str, str | Path] | None = None,
        dtype: str = "auto",
        *,
        tensor_parallel: int = 1,
        axes_file: str | None = None,
        base_prompt_order: str = INSTRUCTION_FIRST,
    ):
        from vllm import LLM

        self.model_name, self.dtype = model, dtype
        self._folders = {name: adapter_folder(path) for name, path in (adapters or {}).items()}
        for folder in self._folders.values():
            check_base(folder, model)
        self._orders = {name: prompt_order(folder) for name, folder in self._folders.items()} | {
            BASE: base_prompt_order
        }
        self._hashes = {name: adapter_hash(folder) for name, folder in self._folders.items()}
        self._tokenizer = load_tokenizer(model)
        self._prompts = PromptWriter(self._tokenizer, axes_file)
        ranks = [json.loads((folder / "adapter_config.json").read_text())["r"] for folder in self._folders.values()]
        lora = {"enable_lora": True, "max_lora_rank": max(8, *ranks), "max_loras": len(ranks)} if ranks else {}
        folder = str(resolve_model(model))
        self._llm = LLM(model=folder, dtype=dtype, tensor_parallel_size=tensor_parallel, **lora)

    def identity(self, adapter: str) -> dict:
        """What decides the outlines, as `OutlineGenerator.identity`."""
        return {
            "model": self.model_name,
            "model_sha256": base_model_hash(resolve_model(self.model_name)),
            "adapter_sha256": self._hashes.get(adapter),
            "dtype": self.dtype,
            "prompt_order": self._orders[adapter],
        }

    def each(
        self, records: list[dict], adapters: list[str], *, batch_size: int, numbers: list[int], **decoding
    ) -> Iterator[tuple[int, str]]:
        """Yield (place of the record, its outline). batch_size is vLLM's own affair."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        settings = Decoding(**decoding)
        if reason := why_not(settings):
            raise TKPOError(reason)
        names = list(self._folders)
        requests = {name: LoRARequest(name, names.index(name) + 1, str(self._folders[name])) for name in names}
        prompts, params = [], []
        for record, name, number in zip(records, adapters, numbers, strict=True):
            ids = self._prompts.prompt(self._prompts.arranged(record, self._orders[name])).ids
            prompts.append({"prompt_token_ids": ids})
            params.append(
                SamplingParams(
                    temperature=settings.temperature,
                    top_p=1.0 if settings.min_p or not settings.temperature else TOP_P,
                    min_p=settings.min_p,
                    seed=settings.seed + number if settings.temperature else None,
                    max_tokens=settings.max_new_tokens,
                    stop_token_ids=[self._tokenizer.eos_token_id],
                )
            )
        lora = [requests.get(name) for name in adapters] if requests else None
        for place, output in enumerate(self._llm.generate(prompts, params, lora_request=lora)):
            ids = list(output.outputs[0].token_ids)
            yield place, self._tokenizer.decode(ids, skip_special_tokens=True).strip()
