"""TKPOConfig and TKPOTrainer: a Trainer pair as TRL's users know them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, fields

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from tkpo.attributes import get_axes
from tkpo.causal_lm import patch
from tkpo.encoding import TKPOCollator
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper
from tkpo.loss import IGNORE_INDEX
from tkpo.machine import avoid_cudnn_attention
from tkpo.settings import CHUNK_SIZE, CONTRAST_POSITIONS, REDUCTIONS, SAMPLERS, TKPOSettings
from tkpo.shared_prefix import SharedPrefixDataset, collate
from tkpo.trainer_data import DataPreparer

SEQUENCE_MEANS = ("cross_entropy", "preference", "contrast")
METRICS = (*SEQUENCE_MEANS, "reward", "accuracy")


@dataclass
class TKPOConfig(TrainingArguments):
    """TrainingArguments with what the loss, the flip and the samples need.

    A `preference_weight` of 0 is supervised fine-tuning: no flipped pass is run.
    """

    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate of AdamW"})
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps"})
    axis: str = field(
        default="language_style", metadata={"help": "axis along which prompts are flipped; several with commas"}
    )
    axes_file: str | None = field(default=None, metadata={"help": "YAML table of attributes and axes of your own"})
    preference_weight: float = field(
        default=TKPOSettings.preference_weight, metadata={"help": "lambda, weight of the preference loss"}
    )
    tau: float = field(default=TKPOSettings.tau, metadata={"help": "temperature of the Bradley-Terry preference"})
    num_rejects: int = field(default=TKPOSettings.num_rejects, metadata={"help": "K, reject tokens at each position"})
    sampler: str = field(
        default=TKPOSettings.sampler, metadata={"help": f"how rejects are drawn: {', '.join(SAMPLERS)}"}
    )
    reduction: str = field(default=TKPOSettings.reduction, metadata={"help": " or ".join(REDUCTIONS)})
    contrast_weight: float = field(
        default=TKPOSettings.contrast_weight, metadata={"help": "weight of the prompt contrast; 0: none"}
    )
    contrast_beta: float = field(
        default=TKPOSettings.contrast_beta, metadata={"help": "inverse temperature of the prompt contrast"}
    )
    contrast_positions: str = field(
        default=TKPOSettings.contrast_positions, metadata={"help": " or ".join(CONTRAST_POSITIONS)}
    )
    share_prefix: bool = field(
        default=False, metadata={"help": "read what samples have in common (an article, for all its styles) once"}
    )
    max_length: int = field(default=4096, metadata={"help": "samples are cut to so many tokens"})
    chunk_size: int = field(default=CHUNK_SIZE, metadata={"help": "response positions whose logits exist at a time"})

    def settings(self, tokenizer: PreTrainedTokenizerBase) -> TKPOSettings:
        """What the loss is told; with a flipper where it needs one."""
        own = {f.name: getattr(self, f.name) for f in fields(TKPOSettings) if f.name != "flipper"}
        settings = TKPOSettings(**own)
        if settings.flips:
            settings.flipper = PromptFlipper(tokenizer, get_axes(self.axis, self.axes_file))
        return settings


class TKPOTrainer(Trainer):
    """Trains any causal LM that `tkpo.causal_lm.patch` covers with TKPO.

    model: a causal LM, or what `tkpo.presets.load_model` takes: preset, folder or hub id.
    args: TKPOConfig; of plain TrainingArguments what they say, with TKPOConfig's defaults for the rest.
    train_dataset: records (a list or a Dataset), rows that `encode_dataset` made, or a stream of either (an
        IterableDataset, with `max_steps`).
    eval_dataset: the same, or a dict of such by name.
    processing_class: the tokenizer, with a chat template.
    peft_config: a PEFT config, to train an adapter in place of the model.

    `evaluate` and `predict` take the same data sets; `predict` gives metrics alone, no predictions: logits never exist
    as a whole. TKPOError for what Trainer would do with logits (`compute_metrics`, label smoothing).
    Logs loss, cross_entropy, preference, contrast, reward (mean r_t) and accuracy (share of response positions whose
    gold probability beats every reject). Losses are means over sequences, exactly so under gradient accumulation.
    With `share_prefix`, batch sizes still count samples; a micro-batch is one row of them (`tkpo.shared_prefix`).
    """

    _tag_names = ["tkpo"]  # noqa: RUF012  (a name that Trainer reads)

    def __init__(
        self,
        model,
        args: TrainingArguments | None = None,
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
        args = _own_arguments(args)
        _refuse_logits(args, kw)
        avoid_cudnn_attention()
        settings = args.settings(processing_class)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        patch(base, settings)
        settings.check_vocabulary(base.config.get_text_config().vocab_size)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)

        self._prepare_data = DataPreparer(processing_class, settings.flipper, args.max_length, args.share_prefix)
        train_dataset = self._prepare_data(train_dataset, args.per_device_train_batch_size, "train_dataset")
        if train_dataset is not None and not hasattr(train_dataset, "__len__") and args.max_steps <= 0:
            raise TKPOError("train_dataset is a stream: set max_steps, the learning rate schedule needs to know them")
        args.remove_unused_columns = False
        args.label_names = args.label_names or ["labels"]
        pad_id = processing_class.pad_token_id
        collator = collate if args.share_prefix else TKPOCollator(0 if pad_id is None else pad_id)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=self._prepare_data(eval_dataset, args.per_device_eval_batch_size, "eval_dataset"),
            processing_class=processing_class,
            data_collator=kw.pop("data_collator", None) or collator,
            **kw,
        )
        self.model_accepts_loss_kwargs = True  # compute_loss divides by the sequences of the whole step
        self._sums = {mode: defaultdict(float) for mode in ("train", "eval")}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """Sequences with a response in one optimizer step: all its micro-batches, over all processes."""
        count = torch.tensor(sum(map(_count_sequences, batch_samples)), device=device)
        return self.accelerator.gather(count).sum().clamp_min(1)

    def get_eval_dataloader(self, eval_dataset=None):
        if not isinstance(eval_dataset, str):  # a name is one of self.eval_dataset, which is encoded
            eval_dataset = self._prepare_data(eval_dataset, self.args.per_device_eval_batch_size, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        rows = self._prepare_data(test_dataset, self.args.per_device_eval_batch_size, "test_dataset")
        return super().get_test_dataloader(rows)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Trainer's, with the means of the loss's terms among its metrics."""
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in self._means("eval").items()})
        return output

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs):
        if isinstance(dataset, SharedPrefixDataset):
            batch_size = 1  # its items are micro-batches
        return super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_sequences=num_items_in_batch)
        loss = outputs.loss
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # data parallelism averages gradients over processes
        self._note("train" if model.training else "eval", outputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _note(self, mode: str, outputs, num_sequences) -> None:
        """Sums for the log: per-sequence terms come divided by the step's sequences, the others are means."""
        sums, count = self._sums[mode], float(outputs.num_sequences)
        scale = count if num_sequences is None else float(num_sequences)
        sums["sequences"] += count
        for name in METRICS:
            weight = scale if name in SEQUENCE_MEANS else count
            sums[name] += getattr(outputs, name).item() * weight

    def _means(self, mode: str) -> dict[str, float]:
        """Means over sequences (or positions) of what `_note` summed in all processes, which forget it."""
        sums = self._sums[mode]
        if not sums:
            return {}
        names = sorted(sums)
        totals = torch.tensor([sums[name] for name in names], dtype=torch.float64)
        totals = self.accelerator.reduce(totals.float().to(self.accelerator.device), "sum").tolist()
        totals = dict(zip(names, totals, strict=True))
        sums.clear()
        count = max(totals.pop("sequences"), 1.0)
        shown = ["cross_entropy"]
        shown += ["preference", "reward", "accuracy"] if self.args.preference_weight else []
        shown += ["contrast"] if self.args.contrast_weight else []
        return {name: round(totals[name] / count, 6) for name in shown}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training steps; not of an evaluation, nor the summary at the end
            logs.update(self._means("train"))
        super().log(logs, start_time)


def _own_arguments(args: TrainingArguments | None) -> TKPOConfig:
    """TKPOConfig as it is; of plain TrainingArguments what they say, as TRL's trainers do."""
    if args is None:
        return TKPOConfig("tkpo_output")
    if isinstance(args, TKPOConfig):
        return args
    if not isinstance(args, TrainingArguments):
        raise TKPOError(f"args must be a TKPOConfig, not {type(args).__name__}")
    values = {f.name: getattr(args, f.name) for f in fields(TrainingArguments) if f.init}
    return TKPOConfig(**values)


def _refuse_logits(args: TKPOConfig, options: dict) -> None:
    """TKPOError for what needs logits or another loss: it would be ignored."""
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        if options.get(name) is not None:
            raise TKPOError(
                f"{name} needs logits, which TKPO never holds as a whole: score outlines by tkpo.evaluation"
            )
    if options.get("compute_loss_func") is not None:
        raise TKPOError("compute_loss_func would replace the TKPO loss: use transformers' Trainer for another loss")
    if options.get("model_init") is not None:
        raise TKPOError("model_init is not supported: give the model itself")
    if args.label_smoothing_factor:
        raise TKPOError("label_smoothing_factor is not part of the TKPO loss: set it to 0")


def _count_sequences(batch: dict) -> int:
    """Sequences of a batch that have a response."""
    responses = batch["labels"] != IGNORE_INDEX
    if "branch_ids" in batch:
        return len(batch["branch_ids"][responses].unique())
    return int(responses.any(dim=1).sum())
