"""TKPOConfig and TKPOTrainer: a Trainer pair as TRL's users know them."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from tkpo.attributes import get_axis
from tkpo.data import user_message
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper, pad_rows
from tkpo.loss import IGNORE_INDEX
from tkpo.machine import avoid_cudnn_attention
from tkpo.modeling_qwen2 import TKPOQwen2ForCausalLM
from tkpo.settings import CHUNK_SIZE, SAMPLERS, TKPOSettings

logger = logging.getLogger(__name__)

METRICS = ("cross_entropy", "preference", "reward", "accuracy")


@dataclass
class TKPOConfig(TrainingArguments):
    """TrainingArguments with what the loss, the flip and the samples need.

    A `preference_weight` of 0 is supervised fine-tuning: no flipped pass is run.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate of AdamW"})
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps"})
    axis: str = field(default="language_style", metadata={"help": "axis along which prompts are flipped"})
    axes_file: str | None = field(default=None, metadata={"help": "YAML table of attributes and axes of your own"})
    preference_weight: float = field(
        default=TKPOSettings.preference_weight, metadata={"help": "lambda, weight of the preference loss"}
    )
    tau: float = field(default=TKPOSettings.tau, metadata={"help": "temperature of the Bradley-Terry preference"})
    num_rejects: int = field(default=TKPOSettings.num_rejects, metadata={"help": "K, reject tokens at each position"})
    sampler: str = field(
        default=TKPOSettings.sampler, metadata={"help": f"how rejects are drawn: {', '.join(SAMPLERS)}"}
    )
    reduction: str = field(default=TKPOSettings.reduction, metadata={"help": "log_mean or mean_log"})
    max_length: int = field(default=1024, metadata={"help": "samples are cut to so many tokens"})
    chunk_size: int = field(default=CHUNK_SIZE, metadata={"help": "response positions whose logits exist at a time"})

    def settings(self, tokenizer: PreTrainedTokenizerBase) -> TKPOSettings:
        names = ("preference_weight", "tau", "num_rejects", "sampler", "reduction", "chunk_size")
        flipper = PromptFlipper(tokenizer, get_axis(self.axis, self.axes_file)) if self.preference_weight else None
        return TKPOSettings(**{name: getattr(self, name) for name in names}, flipper=flipper)


def encode_record(record: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], int]:
    """(token ids of prompt and response, length of the prompt) of an Alpaca record, in the chat template.

    The response ends as the template ends an assistant's turn. Cut on the right to `max_length` tokens.
    """
    messages = [{"role": "user", "content": user_message(record)}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": record["output"]})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise TKPOError("this tokenizer's chat template does not put the response after the generation prompt")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    return (prompt_ids + response_ids)[:max_length], len(prompt_ids)


def encode_dataset(
    records: list[dict] | Dataset, tokenizer: PreTrainedTokenizerBase, flipper: PromptFlipper | None, max_length: int
) -> Dataset:
    """Records → `input_ids`, `labels` and, with a flipper, `flipped_input_ids`, `flipped_labels`.

    A record whose response is cut to nothing by `max_length` is left out with a warning; TKPOError names the
    record whose prompt has no attribute phrase, or says that no record is left.
    """
    rows, cut = [], []
    for number, record in enumerate(records, 1):
        name = f"record {number}" + (f" ({record['id']})" if record.get("id") else "")
        ids, prompt_length = encode_record(record, tokenizer, max_length)
        if len(ids) <= prompt_length:
            cut.append(name)
            continue
        response = ids[prompt_length:]
        row = {"input_ids": ids, "labels": [IGNORE_INDEX] * prompt_length + response}
        if flipper:
            flipped = flipper.flip_ids(ids, prompt_length, name)
            row["flipped_input_ids"] = flipped
            row["flipped_labels"] = [IGNORE_INDEX] * (len(flipped) - len(response)) + response
        rows.append(row)
    if cut:
        logger.warning(
            "%d of %d records have no response left within max_length %d and are skipped: %s",
            *(len(cut), len(cut) + len(rows), max_length, ", ".join(cut[:5]) + (", …" if len(cut) > 5 else "")),
        )
    if not rows:
        raise TKPOError(f"no record has a response token within max_length {max_length}: raise it")
    return Dataset.from_list(rows)


@dataclass
class TKPOCollator:
    """Pads encoded rows on the right: input_ids, attention_mask, labels and their flipped_ counterparts, (B, T)."""

    pad_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        for prefix in ("", "flipped_"):
            if f"{prefix}input_ids" in rows[0]:
                pairs = [(row[f"{prefix}input_ids"], row[f"{prefix}labels"]) for row in rows]
                names = (f"{prefix}{name}" for name in ("input_ids", "attention_mask", "labels"))
                batch.update(zip(names, pad_rows(pairs, self.pad_id), strict=True))
        return batch


class TKPOTrainer(Trainer):
    """Trains a Qwen2ForCausalLM (which becomes a TKPOQwen2ForCausalLM) with TKPO.

    train_dataset, eval_dataset: Alpaca records (a list or a Dataset with `instruction`, `input`, `output`), or
    rows that `encode_dataset` made. peft_config: a PEFT config, to train an adapter in place of the model.
    Logs loss, cross_entropy, preference, reward (mean r_t) and accuracy (share of response positions whose gold
    probability beats every reject). Losses are means over sequences, exactly so under gradient accumulation.
    """

    _tag_names = ["tkpo"]  # noqa: RUF012  (a name that Trainer reads)

    def __init__(
        self,
        model,
        args: TKPOConfig,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        **kw,
    ):
        if processing_class is None:
            raise TKPOError("TKPOTrainer needs processing_class, the tokenizer: the flip works on its tokens")
        if isinstance(model, str):
            from tkpo.presets import load_model

            model = load_model(model)
        avoid_cudnn_attention()
        settings = args.settings(processing_class)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        TKPOQwen2ForCausalLM.adopt(base, settings)
        _check_vocabulary(base, settings)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        flip = settings.flipper if settings.flips else None

        self._flip = flip.flip_batch if flip else lambda ids, labels, mask: (ids, mask, labels)

        def encode(data):
            if data is None or "input_ids" in data[0]:
                return data
            return encode_dataset(data, processing_class, flip, args.max_length)

        args.remove_unused_columns = False
        args.label_names = args.label_names or ["labels"]
        pad_id = processing_class.pad_token_id
        super().__init__(
            model=model,
            args=args,
            train_dataset=encode(train_dataset),
            eval_dataset=encode(eval_dataset),
            processing_class=processing_class,
            data_collator=kw.pop("data_collator", None) or TKPOCollator(0 if pad_id is None else pad_id),
            **kw,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the sequences of the whole step
        self._sums = {mode: defaultdict(float) for mode in ("train", "eval")}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Sequences with a response in one optimizer step: all its micro-batches, over all processes."""
        counts = [(batch["labels"] != IGNORE_INDEX).any(dim=1).sum() for batch in batch_samples]
        count = torch.stack(counts).sum().to(device)
        return self.accelerator.gather(count).sum().clamp_min(1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_sequences=num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # data parallelism averages gradients over processes
        self._note("train" if model.training else "eval", outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = self._prepare_inputs(inputs)
            if "flipped_input_ids" not in inputs:  # in eval mode they are what asks for the TKPO loss
                flipped = self._flip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
                names = ("flipped_input_ids", "flipped_attention_mask", "flipped_labels")
                inputs.update(zip(names, flipped, strict=True))
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def _note(self, mode: str, outputs, num_sequences) -> None:
        """Sums for the log: per-sequence terms come divided by the step's sequences, the others are means."""
        sums, count = self._sums[mode], float(outputs.num_sequences)
        scale = count if num_sequences is None else float(num_sequences)
        sums["sequences"] += count
        for name in METRICS:
            weight = scale if name in ("cross_entropy", "preference") else count
            sums[name] += getattr(outputs, name).item() * weight

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        sums = self._sums[mode]
        names = sorted(sums)
        if mode == "train" and "loss" not in logs:
            names = []  # the summary at the end of training
        if names:
            totals = torch.tensor([sums[name] for name in names], dtype=torch.float64)
            totals = self.accelerator.reduce(totals.float().to(self.accelerator.device), "sum").tolist()
            totals = dict(zip(names, totals, strict=True))
            count = max(totals.pop("sequences"), 1.0)
            prefix = "eval_" if mode == "eval" else ""
            shown = METRICS if self.args.preference_weight else METRICS[:1]
            logs.update({prefix + name: round(totals[name] / count, 6) for name in shown})
            sums.clear()
        super().log(logs, start_time)


def _check_vocabulary(model, settings: TKPOSettings) -> None:
    size = model.config.vocab_size
    if settings.preference_weight and settings.num_rejects >= size:
        raise TKPOError(f"num_rejects (K) is {settings.num_rejects}, but the model's vocabulary has only {size} tokens")
