"""The pairwise methods, trained by TRL: DPO, SimPO (a loss of its CPO trainer) and ORPO."""

from __future__ import annotations

import importlib
import os
import time

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel

from tkpo.adapters import adapter_folder, check_base
from tkpo.encoding import encode_pairs
from tkpo.loss import IGNORE_INDEX
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
    config: RunConfig,
    model,
    tokenizer,
    records: list[dict],
    arguments: dict,
    lora: LoraConfig | None,
    validation: Dataset | None = None,
    validation_arguments: dict | None = None,
):
    """TRL's trainer of a pairwise method.

    With an SFT adapter, DPO and SimPO continue it, DPO against a frozen copy that TRL makes. Without one a new adapter
    is trained on the base, whose weights without adapter are DPO's reference.

    config: the run.
    model, tokenizer: of the base.
    records: pairs, with `chosen` and `rejected`.
    arguments: of transformers' TrainingArguments, and max_length.
    lora: the adapter to train where none is continued; None trains the whole model.
    validation: rows that `encode_dataset` made of single responses.
    validation_arguments: of TrainingArguments, when they are evaluated.
    """
    Config, Trainer = import_trl(config.method)
    rows = encode_pairs(records, tokenizer, arguments["max_length"])
    own = {"beta": config.beta}
    if config.method == "simpo":
        own |= {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": SIMPO_GAMMA}
    if config.rpo_alpha:
        own |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, config.rpo_alpha]}
    if config.sft_adapter:
        model, lora = _continued(config, model), None
    trainer = type(Trainer.__name__, (_Validated, Trainer), {})(
        model=model,
        args=Config(**arguments, **own),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora,
    )
    if validation is not None:
        trainer.validate(validation, validation_arguments)
    return trainer


class _Validated:
    """A trainer of TRL that validates by the cross-entropy of single responses, as TKPOTrainer logs it: no pairs."""

    _validation = None

    def validate(self, rows: Dataset, arguments: dict) -> None:
        """Evaluate these encoded rows as the arguments, of TrainingArguments, say."""
        self._validation = rows
        for name, value in arguments.items():
            setattr(self.args, name, value)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        if self._validation is None or eval_dataset is not None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        model, started, losses = self.model, time.perf_counter(), []
        training = model.training
        model.eval()
        with torch.no_grad():
            for row in self._validation:
                ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
                kept = int((labels != IGNORE_INDEX).sum())
                logits = model(input_ids=ids, logits_to_keep=kept + 1).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits.float(), labels[0, -kept:]).item())
        model.train(training)
        metrics = {
            f"{metric_key_prefix}_cross_entropy": round(sum(losses) / len(losses), 6),
            f"{metric_key_prefix}_runtime": round(time.perf_counter() - started, 3),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _continued(config: RunConfig, model) -> PeftModel:
    """The base with the SFT adapter, to be trained on."""
    adapter = adapter_folder(config.sft_adapter)
    check_base(adapter, config.model)
    model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    for adapter_config in model.peft_config.values():  # else PEFT asks the hub for the preset at each checkpoint
        adapter_config.base_model_name_or_path = str(resolve_model(config.model))
    return model
