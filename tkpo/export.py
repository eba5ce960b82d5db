"""A trained run in the shapes that other runtimes read: a plain model folder, GGUF, a LoRA GGUF, Ollama."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from tkpo.adapters import adapter_folder, check_base, load_with_adapters
from tkpo.errors import TKPOError
from tkpo.gguf_file import FILE_TYPES, write_adapter, write_model
from tkpo.presets import PRESETS, load_model, load_tokenizer, resolve_model

TARGETS = ("merged", "gguf", "lora-gguf", "ollama")
SYSTEM, USER, ANSWER = "\u27e6system\u27e7", "\u27e6user\u27e7", "\u27e6answer\u27e7"  # stand for texts in a template


def export(
    run: str | Path, to: str, output: str | Path | None = None, model: str | None = None, dtype: str | None = None
) -> Path:
    """Write a run, adapter, model folder or preset for another runtime; returns the file or folder.

    run: a run's folder, an adapter's, a model's, or the name of a preset (its base weights).
    to: merged (a folder that transformers, vLLM and TRL load), gguf (one file for llama.cpp), lora-gguf (the adapter
        alone, for the base's GGUF file), ollama (a folder with model.gguf and Modelfile).
    output: file or folder to write, which must not exist; None is beside the run, named by the target.
    model: the base model of an adapter; None is what the adapter records.
    dtype: of the weights: float32, float16, bfloat16, for GGUF also q8_0; None is bfloat16, for GGUF float16.
    Raises TKPOError for what cannot be exported, before anything is written.
    """
    if to not in TARGETS:
        raise TKPOError(f"no export target {to!r}; there are: {', '.join(TARGETS)}")
    dtype = dtype or ("bfloat16" if to == "merged" else "float32" if to == "lora-gguf" else "float16")
    if dtype not in FILE_TYPES or (to == "merged" and dtype == "q8_0") or (to == "lora-gguf" and dtype != "float32"):
        raise TKPOError(f"no dtype {dtype} for {to}: lora-gguf is float32, merged float32, float16 or bfloat16")
    adapter, base = _parts(run, model)
    if to == "lora-gguf" and adapter is None:
        raise TKPOError(f"{run} is a whole model: lora-gguf is for an adapter. Use --to gguf")
    target = Path(output).expanduser() if output else _beside(run, to)
    if target.exists():
        raise TKPOError(f"{target} exists: remove it, or choose another --output")
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # left by a run that was killed
        try:
            _write(adapter, base, to, part, dtype)
            part.rename(target)
        finally:
            _remove(part)
    except OSError as error:
        raise TKPOError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def _parts(run: str | Path, model: str | None) -> tuple[Path | None, str]:
    """(adapter folder or None, name or folder of the base model)."""
    if str(run) in PRESETS:
        return None, str(run)
    path = Path(run).expanduser()
    if not path.is_dir():
        raise TKPOError(f"no run {run}: give the folder of a run, adapter or model, or a preset ({', '.join(PRESETS)})")
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
            return None, str(folder)
    adapter = adapter_folder(path)
    base = model or _recorded_base(adapter)
    check_base(adapter, base)
    return adapter, base


def _recorded_base(adapter: Path) -> str:
    record = adapter / "tkpo.json"
    if record.is_file():
        return str(json.loads(record.read_text(encoding="utf-8"))["base_model"])
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise TKPOError(f"{adapter} does not say what its base model is: give --model")
    return str(base)


def _beside(run: str | Path, to: str) -> Path:
    path = Path(str(run)).expanduser()
    ending = {"gguf": ".gguf", "lora-gguf": "-lora.gguf"}.get(to, f"-{to}")
    return path.with_name(path.resolve().name + ending)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write(adapter: Path | None, base: str, to: str, part: Path, dtype: str) -> None:
    if to == "lora-gguf":
        assert adapter is not None
        config = AutoConfig.from_pretrained(resolve_model(base))
        write_adapter(
            load_file(adapter / "adapter_model.safetensors"), PeftConfig.from_pretrained(str(adapter)), config, part
        )
        return
    whole, tokenizer = _merged(adapter, base), load_tokenizer(base)
    if to == "merged":
        whole.to(getattr(torch, dtype)).save_pretrained(part)
        tokenizer.save_pretrained(part)
    elif to == "gguf":
        write_model(whole, tokenizer, resolve_model(base), part, dtype)
    else:
        file = modelfile(tokenizer)
        part.mkdir()
        write_model(whole, tokenizer, resolve_model(base), part / "model.gguf", dtype)
        (part / "Modelfile").write_text(file, encoding="utf-8")


def _merged(adapter: Path | None, base: str) -> PreTrainedModel:
    """The model in float32 on the CPU, with the adapter's product added to its weights."""
    if adapter is None:
        return load_model(base, "float32", "cpu")
    return load_with_adapters(base, {"default": adapter}, "float32", "cpu").merge_and_unload()


def modelfile(tokenizer) -> str:
    """An Ollama Modelfile for model.gguf beside it, with the tokenizer's chat template in Ollama's language.

    TKPOError if the template does not write a system message, a user message and an answer one after the other.
    """
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    answer = {"role": "assistant", "content": ANSWER}
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    told = tokenizer.apply_chat_template([*turns, answer], tokenize=False)
    places = [told.find(mark) for mark in (SYSTEM, USER, ANSWER)]
    if places != sorted(places) or -1 in places or not told.startswith(asked):
        raise TKPOError("this chat template cannot be put in Ollama's language: write the Modelfile by hand")
    again = tokenizer.apply_chat_template([*turns, answer, turns[1]], tokenize=False)
    before_user = again[len(told) : again.rindex(USER)]
    head = told[: places[1]]
    if not head.endswith(before_user):
        raise TKPOError("this chat template cannot be put in Ollama's language: write the Modelfile by hand")
    system = head.removesuffix(before_user).replace(SYSTEM, "{{ .System }}")
    user = before_user + "{{ .Prompt }}" + asked[places[1] + len(USER) :]
    end = told[places[2] + len(ANSWER) :]
    template = "{{ if .System }}" + system + "{{ end }}" + user + "{{ .Response }}" + end
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template}"""']
    if default := _default_system(tokenizer, head, before_user):
        lines.append(f'SYSTEM """{default}"""')
    lines += [f'PARAMETER stop "{tokenizer.eos_token}"', "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


def _default_system(tokenizer, head: str, before_user: str) -> str:
    """The system message that the template adds by itself, or ""."""
    plain = tokenizer.apply_chat_template([{"role": "user", "content": USER}], tokenize=False)
    start, end = head.removesuffix(before_user).split(SYSTEM)
    added = plain[: plain.index(USER)].removesuffix(before_user)
    return added[len(start) : len(added) - len(end)] if added.startswith(start) and added.endswith(end) else ""
