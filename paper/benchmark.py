"""Time of a training step and its memory: TKPO beside SFT, DPO, SimPO, ORPO and its plain form.

    python paper/benchmark.py --model qwen2.5-coder-0.5b --finetuning lora
    python paper/benchmark.py --articles short          an article in its four styles per step, read once
    python paper/benchmark.py --loss-head
    python paper/benchmark.py --table paper/results/benchmark/*.json

Every method runs in a process of its own, by its own trainer and with the same settings. A rival and TKPO are started
together and take turns, step by step on the same sample, so that what else the machine does meets both; ratios are
medians over these pairs. A step is everything between two batches: forward, backward, clipping, optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

LABELS = {
    "sft": "SFT (ours)",
    "trl_sft": "SFT (TRL)",
    "trl_sft_chunked": "SFT (TRL, chunked loss)",
    "llamafactory_sft": "SFT (LLaMA-Factory)",
    "dpo": "DPO (TRL)",
    "dpo_precomputed": "DPO (TRL, reference precomputed)",
    "simpo": "SimPO (TRL)",
    "orpo": "ORPO (TRL)",
    "tkpo": "TKPO",
    "tkpo_unshared": "TKPO (passes share nothing)",
    "tkpo_plain": "TKPO (whole sequences, full softmax)",
    "tkpo_rows": "TKPO (a row per style)",
    "contrast": "Prompt contrast",
}
RIVALS = [key for key in LABELS if key not in ("tkpo", "tkpo_rows", "contrast")]
STYLES = 4  # samples of an article
# Pairs that are timed by article: (rival, ours).
BY_ARTICLE = [("tkpo_rows", "tkpo"), ("sft", "tkpo"), ("dpo", "tkpo"), ("dpo", "contrast"), ("dpo", "tkpo_plain")]
FOLDER = Path(__file__).parent / "results" / "benchmark"
MIB = 2**20


@dataclass
class Setup:
    """What all methods share."""

    model: str = "qwen2.5-coder-0.5b"
    finetuning: str = "lora"
    dtype: str = "float32"
    device: str = "cpu"
    dataset: str = "language_style"
    lang: str | None = None
    steps: int = 5
    warmup: int = 1
    batch_size: int = 1
    threads: int = 2
    max_length: int = 1024
    seed: int = 0
    attribute_last: bool = False
    articles: str | None = None  # short or long: a step is one article in its four styles

    def __post_init__(self):
        if self.articles:
            self.dataset, self.batch_size, self.attribute_last = "language_style,level_of_detail", STYLES, True
            self.max_length = max(self.max_length, 4096)

    @property
    def axis(self) -> str:
        return ",".join(Path(name).stem for name in self.dataset.split(","))

    @property
    def micro_batch_size(self) -> int:
        """Samples per forward pass of what shares nothing: long articles would not fit in memory together."""
        return 1 if self.articles == "long" else self.batch_size

    @property
    def name(self) -> str:
        extra = "-bfloat16" if self.dtype == "bfloat16" else ""
        if self.articles:
            extra += f"-{self.articles}-articles"
        else:
            extra += "-attribute-last" if self.attribute_last else ""
            extra += f"-batch{self.batch_size}" if self.batch_size > 1 else ""
        extra += "" if self.device == "cpu" else f"-{self.device}"
        return f"{Path(self.model).name}-{self.finetuning}{extra}"


# ---- in a method's own process -------------------------------------------------------------------------


def worker(method: str, setup: Setup, pipe) -> None:
    """Train by `method`, a step for each message that comes through `pipe`, which gets each step's numbers."""
    os.environ["OMP_NUM_THREADS"] = str(setup.threads)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import torch
            from transformers import set_seed

            from tkpo.machine import avoid_cudnn_attention

            avoid_cudnn_attention()  # as TKPOTrainer does: all methods by the same kernels
            torch.set_num_threads(setup.threads)
            set_seed(setup.seed)
            TRAIN[method](setup, _turns(pipe, setup))
        pipe.send({"done": True})
    except Unavailable as error:
        pipe.send({"error": str(error)})
    except Exception as error:
        detail = traceback.extract_tb(error.__traceback__)[-1]
        pipe.send({"error": f"{type(error).__name__}: {error} ({Path(detail.filename).name}:{detail.lineno})"})


class Unavailable(Exception):
    """This method cannot be had here."""


def _turns(pipe, setup: Setup):
    """A callback for transformers' Trainer that waits for its turn before each step, and times it."""
    import torch
    from transformers import TrainerCallback

    cuda = setup.device != "cpu"

    class Turns(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            self.loaded = _memory(cuda, reset=True)
            pipe.send({"ready": True})

        def on_step_begin(self, args, state, control, **kwargs):
            pipe.recv()
            if cuda:
                torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if cuda:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.started

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                peak = _memory(cuda)
                numbers = {"seconds": self.seconds, "loss": float(logs["loss"])}
                pipe.send({**numbers, "peak_mib": peak, "extra_mib": peak - self.loaded})

    return Turns()


def _memory(cuda: bool, reset: bool = False) -> float:
    """Peak so far in MiB (GPU memory, or resident memory of this process); `reset` returns what is used now."""
    if cuda:
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated() / MIB
        return torch.cuda.max_memory_allocated() / MIB
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmRSS" if reset else "VmHWM"].split()[0]) / 1024


def training_records(setup: Setup, pairs: bool = False) -> list[dict]:
    """The samples of warm-up and timed steps, in their order, none too long; as pairs, the same ones."""
    from tkpo.attributes import get_axes
    from tkpo.data import annotate, arrange, load_records, record_key, sample_order
    from tkpo.presets import load_tokenizer

    axes, tokenizer = get_axes(setup.axis), load_tokenizer(setup.model)

    def read(pairs):
        order = "article_first" if setup.attribute_last else "instruction_first"
        loaded = annotate(load_records(setup.dataset, "train", setup.lang, pairs), axes)
        return [arrange(record, axes[record["axis"]], order) for record in loaded]

    paired = {record_key(record): record for record in read(True)}
    count, chosen = (setup.steps + setup.warmup) * setup.batch_size, []
    for record in _in_order(read(False), setup, sample_order):
        pair = paired.get(record_key(record))
        if pair and count_tokens(
            {**record, "output": max(pair["chosen"], pair["rejected"], key=len)}, tokenizer, setup
        ):
            chosen.append(pair if pairs else record)
        if len(chosen) == count:
            return chosen
    raise Unavailable(
        f"{setup.dataset} has {len(chosen)} samples of at most {setup.max_length} tokens, {count} are wanted: "
        "fewer --steps"
    )


def _in_order(records: list[dict], setup: Setup, order: Callable) -> list[dict]:
    """By hash; by article, all styles of one after the other, articles of the length that is asked for."""
    if not setup.articles:
        return sorted(records, key=order)
    whole: dict[str, list[dict]] = {}
    for record in records:
        if record["form"] == "article" and record["length"] == setup.articles:
            whole.setdefault(record["id"], []).append(record)
    articles = sorted((own for own in whole.values() if len(own) == STYLES), key=lambda own: order(own[0]))
    return [record for own in articles for record in own]


def count_tokens(record: dict, tokenizer, setup: Setup) -> int | None:
    """Tokens of prompt and response; None if they are more than `max_length`."""
    from tkpo.encoding import encode_record

    tokens = len(encode_record(record, tokenizer, setup.max_length + 1)[0])
    return tokens if tokens <= setup.max_length else None


def _arguments(setup: Setup, folder: str) -> dict:
    """Settings of transformers' Trainer, the same for every method."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": setup.micro_batch_size,
        "gradient_accumulation_steps": setup.batch_size // setup.micro_batch_size,
        "gradient_checkpointing": False,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": setup.dtype == "bfloat16",
        "fp16": False,
        "use_cpu": setup.device == "cpu",
        "dataloader_pin_memory": setup.device != "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": setup.seed,
    }


def fresh_model(setup: Setup):
    from tkpo.presets import load_model, load_tokenizer

    model, tokenizer = load_model(setup.model, setup.dtype, setup.device), load_tokenizer(setup.model)
    if not hasattr(model, "warnings_issued"):
        model.warnings_issued = {}  # transformers 5 dropped it, TRL 0.24 writes to it
    return model.train(), tokenizer


def lora_config(setup: Setup):
    from peft import LoraConfig

    from tkpo.run_config import RunConfig

    if setup.finetuning == "full":
        return None
    own = RunConfig()
    return LoraConfig(r=own.lora_rank, lora_alpha=own.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _train_own(setup: Setup, turns, shared: bool = True, **losses) -> None:
    """By TKPOTrainer; shared: by article, in one row of all its styles."""
    from tkpo.training import TKPOConfig, TKPOTrainer

    model, tokenizer = fresh_model(setup)
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(setup, folder)
        if shared := shared and setup.articles is not None:
            arguments |= {"per_device_train_batch_size": setup.batch_size, "gradient_accumulation_steps": 1}
        args = TKPOConfig(**arguments, axis=setup.axis, max_length=setup.max_length, share_prefix=shared, **losses)
        own = {"processing_class": tokenizer, "peft_config": lora_config(setup), "callbacks": [turns]}
        TKPOTrainer(model, args, training_records(setup), **own).train()


def _train_sft(setup: Setup, turns) -> None:
    _train_own(setup, turns, preference_weight=0.0)


def _train_rows(setup: Setup, turns) -> None:
    _train_own(setup, turns, shared=False)


def _train_contrast(setup: Setup, turns) -> None:
    _train_own(setup, turns, preference_weight=0.0, contrast_weight=1.0)


def _train_unshared(setup: Setup, turns) -> None:
    """TKPO whose flipped pass reads again what stands before the attribute."""
    from unittest import mock

    with mock.patch("tkpo.causal_lm.has_full_attention", return_value=False):
        _train_own(setup, turns)


def _train_plain(setup: Setup, turns) -> None:
    """Plain transformers: logits of both passes at every position, and `plain_loss` on them."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from tkpo.attributes import get_axes
    from tkpo.encoding import TKPOCollator, encode_dataset
    from tkpo.flip import PromptFlipper

    class PlainTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return plain_step(model, inputs)

    model, tokenizer = fresh_model(setup)
    flipper = PromptFlipper(tokenizer, get_axes(setup.axis))
    rows = encode_dataset(training_records(setup), tokenizer, flipper, setup.max_length)
    if lora := lora_config(setup):
        model = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(**_arguments(setup, folder), remove_unused_columns=False, label_names=["labels"])
        collator = TKPOCollator(tokenizer.pad_token_id)
        PlainTrainer(model, args, train_dataset=rows, data_collator=collator, callbacks=[turns]).train()


def plain_step(model, inputs: dict, num_rejects: int = 20):
    """The TKPO loss of a batch as the formulas read: two passes of full logits, softmax over all positions.

    inputs: input_ids, attention_mask, labels (B, T) and their flipped_ counterparts, padded on the right.
    """
    import torch

    with torch.no_grad():
        flipped = model(
            input_ids=inputs["flipped_input_ids"], attention_mask=inputs["flipped_attention_mask"], use_cache=False
        ).logits.float()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    return sum(
        plain_loss(logits[row], inputs["labels"][row], flipped[row], inputs["flipped_labels"][row], num_rejects)
        for row in range(len(logits))
    ) / len(logits)


def plain_loss(logits, labels, flipped_logits, flipped_labels, num_rejects: int, tau=0.15, preference_weight=0.5):
    """Loss of one sequence. logits (T, V), labels (T,) as transformers has them; flipped ones may have another T."""
    import torch

    logits, labels = logits[:-1].float(), labels[1:]
    flipped_probs = flipped_logits[:-1].softmax(dim=-1)
    response, flipped_response = labels >= 0, flipped_labels[1:] >= 0
    moved = torch.zeros_like(logits).fill_(1.0)  # flipped probabilities beside the true positions
    moved[response] = flipped_probs[flipped_response]
    gold = labels.clamp_min(0).unsqueeze(-1)
    moved = moved.scatter(-1, gold, 0.0)
    rejects = torch.multinomial(moved, num_rejects)
    probs = logits.softmax(dim=-1)
    scores = probs.gather(-1, torch.cat([gold, rejects], dim=-1)) / tau
    rewards = scores.softmax(dim=-1)[:, 0]
    mask = response.float()
    log_probs = logits.log_softmax(dim=-1).gather(-1, gold).squeeze(-1)
    cross_entropy = -(log_probs * mask).sum() / mask.sum()
    return cross_entropy - preference_weight * ((rewards * mask).sum() / mask.sum()).log()


def _prompt(record: dict, tokenizer) -> str:
    from tkpo.data import user_message

    messages = [{"role": "user", "content": user_message(record)}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _train_trl_sft(setup: Setup, turns, **loss) -> None:
    from datasets import Dataset

    from tkpo.pairwise import import_trl

    import_trl("dpo")
    from trl import SFTConfig, SFTTrainer

    if loss and "chunked_nll" not in SFTConfig.__dataclass_fields__["loss_type"].metadata["help"]:
        raise Unavailable(f"TRL {importlib.metadata.version('trl')} has no chunked loss")
    model, tokenizer = fresh_model(setup)
    rows = [{"prompt": _prompt(r, tokenizer), "completion": r["output"]} for r in training_records(setup)]
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            **_arguments(setup, folder), max_length=setup.max_length, eos_token=tokenizer.eos_token, **loss
        )
        own = {"processing_class": tokenizer, "peft_config": lora_config(setup), "callbacks": [turns]}
        SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), **own).train()


def _train_trl_sft_chunked(setup: Setup, turns) -> None:
    _train_trl_sft(setup, turns, loss_type="chunked_nll")


def _train_pairwise(setup: Setup, turns, method: str, **settings) -> None:
    """By TRL, from the base: for DPO a fresh adapter, whose reference is the base itself, is the cheapest form."""
    import dataclasses

    from datasets import Dataset

    from tkpo.pairwise import import_trl

    Config, Trainer = import_trl(method)
    model, tokenizer = fresh_model(setup)
    names = ("chosen", "rejected")
    rows = [{"prompt": _prompt(r, tokenizer), **{n: r[n] for n in names}} for r in training_records(setup, pairs=True)]
    with tempfile.TemporaryDirectory() as folder:
        wanted = {**_arguments(setup, folder), "max_length": setup.max_length, **settings}
        known = {f.name for f in dataclasses.fields(Config)}
        args = Config(**{key: value for key, value in wanted.items() if key in known})
        own = {"processing_class": tokenizer, "peft_config": lora_config(setup), "callbacks": [turns]}
        Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), **own).train()


def _train_dpo(setup: Setup, turns, precomputed: bool = False) -> None:
    own = {"max_prompt_length": None, "use_logits_to_keep": True, "precompute_ref_log_probs": precomputed}
    _train_pairwise(setup, turns, "dpo", **own)


def _train_dpo_precomputed(setup: Setup, turns) -> None:
    _train_dpo(setup, turns, precomputed=True)


def _train_simpo(setup: Setup, turns) -> None:
    from tkpo.methods import METHODS
    from tkpo.pairwise import SIMPO_GAMMA

    own = {"beta": METHODS["simpo"].beta, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": SIMPO_GAMMA}
    _train_pairwise(setup, turns, "simpo", max_prompt_length=setup.max_length * 3 // 4, **own)


def _train_orpo(setup: Setup, turns) -> None:
    _train_pairwise(setup, turns, "orpo", max_prompt_length=setup.max_length * 3 // 4)


def _train_llamafactory(setup: Setup, turns) -> None:
    import importlib.util

    if importlib.util.find_spec("llamafactory") is None:
        raise Unavailable("LLaMA-Factory is not installed")
    import yaml

    from tkpo import llamafactory
    from tkpo.presets import load_model, load_tokenizer
    from tkpo.run_config import RunConfig

    with tempfile.TemporaryDirectory() as folder:
        kept = ("instruction", "input", "output")
        (Path(folder) / "bench.json").write_text(json.dumps([{k: r[k] for k in kept} for r in training_records(setup)]))
        info = {"bench": {"file_name": "bench.json"}}
        (Path(folder) / "dataset_info.json").write_text(json.dumps(info))
        # A frozen base stays in the precision that it is stored in, whatever infer_dtype says; so it is stored anew.
        for part in (load_model(setup.model, setup.dtype, "cpu"), load_tokenizer(setup.model)):
            part.save_pretrained(Path(folder) / "model")
        arguments = {
            **{k: v for k, v in _arguments(setup, folder).items() if k != "train_sampling_strategy"},
            "stage": "sft",
            "do_train": True,
            "disable_shuffling": True,
            "model_name_or_path": str(Path(folder) / "model"),
            "template": "qwen" if "qwen" in setup.model else "empty",
            "dataset": "bench",
            "dataset_dir": folder,
            "cutoff_len": setup.max_length,
            "finetuning_type": setup.finetuning,
            "overwrite_output_dir": True,
            "disable_gradient_checkpointing": True,
        }
        if setup.finetuning == "lora":
            own = RunConfig()
            arguments |= {"lora_rank": own.lora_rank, "lora_alpha": own.lora_alpha, "lora_target": "all"}
        path = Path(folder) / "sft.yaml"
        path.write_text(yaml.safe_dump(arguments))
        llamafactory.train(path, callbacks=[turns])


TRAIN: dict[str, Callable] = {
    "sft": _train_sft,
    "trl_sft": _train_trl_sft,
    "trl_sft_chunked": _train_trl_sft_chunked,
    "llamafactory_sft": _train_llamafactory,
    "dpo": _train_dpo,
    "dpo_precomputed": _train_dpo_precomputed,
    "simpo": _train_simpo,
    "orpo": _train_orpo,
    "tkpo": _train_own,
    "tkpo_unshared": _train_unshared,
    "tkpo_plain": _train_plain,
    "tkpo_rows": _train_rows,
    "contrast": _train_contrast,
}


# ---- the conductor -------------------------------------------------------------------------------------


class Process:
    """A method's process; `step` lets it take one step."""

    def __init__(self, method: str, setup: Setup):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.error: str | None = None
        self._process = context.Process(target=worker, args=(method, setup, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def receive(self) -> dict:
        """Its next message; {} once it has failed."""
        if self.error:
            return {}
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            message = {"error": "its process was ended from outside (out of memory?)"}
        if "done" in message:
            message = {"error": "its training ended before all steps were taken"}
        self.error = message.get("error")
        return {} if self.error else message

    def step(self) -> dict:
        with contextlib.suppress(OSError):
            self.pipe.send("step")
        return self.receive()

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def run_pair(rival: str, setup: Setup, say: Callable[[str], None] = print, ours: str = "tkpo") -> tuple[dict, dict]:
    """Time `rival` and `ours` in turn; returns ({error, steps: [{seconds, loss, peak_mib, extra_mib}]}) of each."""
    processes = [Process(method, setup) for method in (rival, ours)]
    steps: tuple[list, list] = ([], [])
    try:
        for process in processes:
            process.receive()
        for number in range(setup.warmup + setup.steps):
            order = (0, 1) if number % 2 else (1, 0)
            for i in order:
                if not any(p.error for p in processes) and (numbers := processes[i].step()) and number >= setup.warmup:
                    steps[i].append(numbers)
        seconds = [f"{statistics.median(s['seconds'] for s in own):.2f} s" if own else "failed" for own in steps]
        say(f"{LABELS[rival]}: {seconds[0]}, {LABELS[ours]} beside it: {seconds[1]}")
    finally:
        for process in processes:
            process.close()
    return tuple({"error": p.error, "steps": own} for p, own in zip(processes, steps, strict=True))


def benchmark(setup: Setup, pairs: list[tuple[str, str]], say: Callable[[str], None] = print) -> dict:
    """All pairs of (rival, ours), each in turn; the result as it is written to JSON."""
    from tkpo.data import record_key
    from tkpo.presets import load_tokenizer

    started, load = time.time(), os.getloadavg()[0]
    records = training_records(setup)[setup.warmup * setup.batch_size :]
    tokenizer = load_tokenizer(setup.model)
    lengths = [count_tokens(record, tokenizer, setup) for record in records]
    runs, ratios, memory = {}, {}, {}
    for rival, ours in pairs:
        theirs, own = run_pair(rival, setup, say, ours)
        for method, run in ((rival, theirs), (ours, own)):
            known = runs.setdefault(method, {"error": None, "steps": []})
            known["steps"] += run["steps"]
            known["error"] = known["error"] or run["error"]
        whole = len(theirs["steps"]) == len(own["steps"]) == setup.steps
        both = list(zip(own["steps"], theirs["steps"], strict=True)) if whole else []
        ratios[f"{ours}/{rival}"] = _median(a["seconds"] / b["seconds"] for a, b in both)
        peaks = [max(s["extra_mib"] for s in run["steps"]) for run in (own, theirs)] if whole else [0, 0]
        memory[f"{ours}/{rival}"] = peaks[0] / peaks[1] if peaks[1] > 0 else None
    for run in runs.values():
        run["error"] = None if run["steps"] else run["error"]
    per_step = [sum(lengths[i : i + setup.batch_size]) for i in range(0, len(lengths), setup.batch_size)]
    return {
        "name": setup.name,
        **{key: value for key, value in asdict(setup).items() if key != "threads"},
        "samples": [record_key(r) for r in records],
        "tokens": {"mean": statistics.mean(lengths), "max": max(lengths)},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds_total": round(time.time() - started, 1),
        "machine": machine(setup, load),
        "versions": versions(),
        "methods": [_method(key, runs[key], per_step) for key in LABELS if key in runs],
        "ratios": ratios,
        "memory_ratios": memory,
    }


def _method(key: str, run: dict, tokens: list[int]) -> dict:
    seconds = [step["seconds"] for step in run["steps"]]
    numbers = {}
    if seconds and not run["error"]:
        rounds = len(seconds) / len(tokens)  # TKPO took its steps beside every rival
        numbers = {
            "steps": [round(s, 4) for s in seconds],
            "median": statistics.median(seconds),
            "quartiles": _quartiles(seconds),
            "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
            "tokens_per_second": sum(tokens) * rounds / sum(seconds),
            "peak_memory_mib": max(step["extra_mib"] for step in run["steps"]),
            "peak_process_mib": max(step["peak_mib"] for step in run["steps"]),
            "loss_first": run["steps"][0]["loss"],
        }
    return {"key": key, "label": LABELS[key], **numbers, "error": run["error"]}


def _median(values) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None


def _quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [low, high]


def machine(setup: Setup, load: float) -> dict:
    from tkpo.machine import memory_gib, processor

    gpu = None
    if setup.device != "cpu":
        import torch

        gpu = torch.cuda.get_device_name()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib(), 1),
        "threads": setup.threads,
        "gpu": gpu,
        "load_before": load,
    }


def versions() -> dict:
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "peft", "llamafactory", "tkpo"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


# ---- the loss head alone -------------------------------------------------------------------------------


def head_worker(kind: str, frozen: bool, shape: dict, setup: Setup, pipe) -> None:
    """Forward and backward of the loss on made-up hidden states, in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = str(setup.threads)
    import torch

    from tkpo.loss import fused_reject_tokens, tkpo_loss

    torch.set_num_threads(setup.threads)
    torch.manual_seed(setup.seed)
    vocabulary, size, length, responses = (shape[k] for k in ("vocabulary", "hidden", "tokens", "response_tokens"))
    weight = (torch.randn(vocabulary, size) * 0.02).requires_grad_(not frozen)
    states, flipped = torch.randn(1, length, size), torch.randn(1, length, size)
    labels = torch.full((1, length), -100)
    labels[0, -responses:] = torch.randint(vocabulary, (responses,))
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    if not frozen:
        weight.grad = torch.zeros_like(weight)  # one weight gradient is there in both
    loaded = _memory(cuda=False, reset=True)
    for _ in range(setup.warmup + setup.steps):
        hidden = states.clone().requires_grad_()
        started = time.perf_counter()
        if kind == "fused":
            rejects = fused_reject_tokens(flipped, shifted, weight.detach())
            loss = tkpo_loss(hidden, shifted, weight, rejects).loss
        else:
            with torch.no_grad():
                flipped_logits = flipped[0] @ weight.T
            loss = plain_loss(hidden[0] @ weight.T, labels[0], flipped_logits, labels[0], 20)
        loss.backward()
        pipe.send((time.perf_counter() - started, _memory(cuda=False) - loaded))
    pipe.close()


def benchmark_head(setup: Setup, shape: dict) -> dict:
    """The fused loss against the plain form, with a frozen and a trained output head."""
    context, started = multiprocessing.get_context("spawn"), time.time()
    load, methods, ratios = os.getloadavg()[0], [], {}
    for frozen in (True, False):
        results, sides = {}, {}
        for kind in ("fused", "plain"):
            pipe, theirs = context.Pipe(duplex=False)
            process = context.Process(target=head_worker, args=(kind, frozen, shape, setup, theirs), daemon=True)
            process.start()
            theirs.close()
            results[kind] = [pipe.recv() for _ in range(setup.warmup + setup.steps)][setup.warmup :]
            process.join()
            seconds = [s for s, _ in results[kind]]
            sides[kind] = {
                "key": kind,
                "label": "fused, response positions" if kind == "fused" else "whole sequence, full softmax",
                "weight": "frozen" if frozen else "trained",
                "steps": [round(s, 4) for s in seconds],
                "median": statistics.median(seconds),
                "quartiles": _quartiles(seconds),
                "peak_extra_mib": max(m for _, m in results[kind]),
            }
        methods += sides.values()
        ratios["frozen" if frozen else "trained"] = {
            "time": sides["fused"]["median"] / sides["plain"]["median"],
            "memory": sides["fused"]["peak_extra_mib"] / sides["plain"]["peak_extra_mib"],
        }
    return {
        "name": "loss-head",
        **shape,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "machine": machine(setup, load),
        "versions": versions(),
        "methods": methods,
        "ratios": ratios,
    }


# ---- what is shown -------------------------------------------------------------------------------------


def table(result: dict) -> str:
    """The result as a Markdown table."""
    where = f"{result['machine']['processor']}, {result['machine']['threads']} threads"
    if result["name"] == "loss-head":
        rows = [
            f"| {m['weight']} | {m['label']} | {m['median']:.2f} | {m['peak_extra_mib']:.0f} |"
            for m in result["methods"]
        ]
        for weight, ratio in result["ratios"].items():
            rows.append(f"| {weight} | **fused / plain** | **{ratio['time']:.2f}** | **{ratio['memory']:.2f}** |")
        title = (
            "Loss head: vocabulary {vocabulary}, hidden {hidden}, {tokens} tokens, {response_tokens} of them response"
        )
        head = ["| output head | form | seconds | extra MiB |", "| --- | --- | ---: | ---: |"]
        return "\n".join([f"{title.format(**result)} ({where})", "", *head, *rows])
    head = [
        "| method | s a step | quartiles | tokens/s | extra MiB | TKPO's time / its | TKPO's memory / its |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = []
    for m in result["methods"]:
        if m["error"]:
            rows.append(f"| {m['label']} | {m['error']} | | | | | |")
            continue
        ratios = (result[kind].get(f"tkpo/{m['key']}") for kind in ("ratios", "memory_ratios"))
        cells = [f"{ratio:.2f}" if ratio else "" for ratio in ratios]
        quartiles = " to ".join(f"{q:.2f}" for q in m["quartiles"])
        numbers = f"{m['median']:.2f} | {quartiles} | {m['tokens_per_second']:.0f} | {m['peak_memory_mib']:.0f}"
        rows.append(f"| {m['label']} | {numbers} | {' | '.join(cells)} |")
    title = f"{result['model']}, {result['finetuning']}, {result['dtype']}, batch {result['batch_size']}, {where}"
    return "\n".join([title, "", *head, *rows])


def by_article(setup: Setup) -> list[tuple[str, str]]:
    """The pairs to time; whole logits of four long articles would not fit in memory."""
    return [pair for pair in BY_ARTICLE if setup.articles == "short" or "tkpo_plain" not in pair]


def save(result: dict, folder: Path, shown: str) -> None:
    """Write the result to `folder`, by its name, and print what is shown of it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{shown}\n\n{path}")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Setup()
    p.add_argument("--model", default=defaults.model, help="preset or folder; default %(default)s")
    p.add_argument("--finetuning", choices=("lora", "full"), default=defaults.finetuning)
    p.add_argument(
        "--dtype", default=defaults.dtype, choices=("float32", "bfloat16"), help="of the model; default %(default)s"
    )
    p.add_argument("--device", default=defaults.device, help="cpu (default) or cuda")
    p.add_argument("--dataset", default=defaults.dataset, help="default %(default)s")
    p.add_argument("--lang", choices=("en", "zh"), help="default both; small writes English only")
    p.add_argument("--attribute-last", action="store_true", help="prompts with the instruction after the article")
    p.add_argument("--steps", type=int, default=defaults.steps, help="timed steps a method; default %(default)s")
    p.add_argument("--warmup", type=int, default=defaults.warmup, help="steps before them; default %(default)s")
    p.add_argument("--batch-size", type=int, default=defaults.batch_size, help="default %(default)s")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    p.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS, metavar="METHOD", help=", ".join(RIVALS))
    p.add_argument("--articles", choices=("short", "long"), help="time by article: one in its four styles per step")
    p.add_argument("--output", type=Path, default=FOLDER, help="folder for the JSON; default %(default)s")
    p.add_argument("--loss-head", action="store_true", help="time the loss alone, on made-up hidden states")
    p.add_argument("--table", nargs="+", type=Path, metavar="JSON", help="print the tables of earlier results")
    args = p.parse_args(argv)
    if args.table:
        print("\n\n".join(table(json.loads(path.read_text())) for path in args.table))
        return 0
    if args.steps < 1 or args.warmup < 0 or args.batch_size < 1 or args.threads < 1:
        p.error("--steps, --batch-size and --threads must be at least 1, --warmup at least 0")
    setup = Setup(**{name: getattr(args, name) for name in asdict(defaults) if hasattr(args, name)})
    from tkpo.errors import TKPOError

    try:
        if args.loss_head:
            shape = {"vocabulary": 151_936, "hidden": 896, "tokens": 1024, "response_tokens": 256}
            result = benchmark_head(setup, shape)
        else:
            pairs = by_article(setup) if setup.articles else [(rival, "tkpo") for rival in args.rivals]
            result = benchmark(setup, pairs, lambda line: print(line, file=sys.stderr, flush=True))
    except (TKPOError, Unavailable) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    save(result, args.output, table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
