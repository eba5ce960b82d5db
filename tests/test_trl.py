"""The patch inside trainers that are not ours: TRL's SFTTrainer and transformers' Trainer."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tkpo.attributes import get_axis
from tkpo.causal_lm import patch
from tkpo.encoding import TKPOCollator, encode_dataset
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper
from tkpo.loss import draw_reject_tokens, preference_loss
from tkpo.settings import TKPOSettings


@pytest.fixture(scope="session")
def settings(tiny_tokenizer):
    flipper = PromptFlipper(tiny_tokenizer, get_axis("language_style"))
    return TKPOSettings(sampler="topk", num_rejects=5, flipper=flipper)


def strings(samples, tokenizer):
    """Prompt and completion as text, the template written out."""
    return [
        {"prompt": tokenizer.decode(s.prompt), "completion": tokenizer.decode(s.response).removesuffix("<|im_end|>\n")}
        for s in samples
    ]


def chats(samples, tokenizer):
    return [
        {
            "prompt": [{"role": "user", "content": f"{s.record['instruction']}\n{s.record['input']}"}],
            "completion": [{"role": "assistant", "content": s.record["output"]}],
        }
        for s in samples
    ]


OPTIONS = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 1,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def by_hand(model, batch, settings):
    """TRL's mean over the batch's tokens, of each token's cross-entropy plus its sequence's weighted preference."""
    total, tokens = 0.0, 0
    flipped_ids, flipped_mask, flipped_labels = settings.flipper.flip_batch(
        batch["input_ids"], batch["labels"], batch["attention_mask"]
    )
    with torch.no_grad():
        true = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        flipped = model(flipped_ids, attention_mask=flipped_mask).logits[:, :-1]
    for row in range(len(true)):
        at, there = batch["labels"][row, 1:] != -100, flipped_labels[row, 1:] != -100
        gold = batch["labels"][row, 1:][at]
        ours = true[row][at]
        rejects = draw_reject_tokens(flipped[row][there][None], gold[None], settings.num_rejects, "topk")
        preference = preference_loss(ours[None], gold[None], rejects, settings.tau).sum()
        total += torch.nn.functional.cross_entropy(ours, gold, reduction="sum") + 0.5 * preference * len(gold)
        tokens += len(gold)
    return float(total / tokens)


@pytest.mark.parametrize("peft", [None, LoraConfig(r=2, target_modules=["q_proj"])], ids=["full", "lora"])
@pytest.mark.parametrize("shape", [strings, chats])
def test_sft_trainer_trains_with_the_tkpo_loss(tiny_model, tiny_tokenizer, samples, settings, tmp_path, shape, peft):
    trainer = SFTTrainer(
        tiny_model(),
        SFTConfig(output_dir=str(tmp_path), loss_type="nll", gradient_checkpointing=False, **OPTIONS),
        train_dataset=Dataset.from_list(shape(samples, tiny_tokenizer)),
        processing_class=tiny_tokenizer,
        peft_config=peft,
    )
    base = trainer.model.get_base_model() if peft else trainer.model
    patch(base, settings)
    (batch,) = trainer.get_train_dataloader()
    expected = by_hand(tiny_model(), batch, settings)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(expected, abs=2e-4)
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved and (not peft or all("lora_" in name for name in moved))


def test_plain_trainer_trains_with_the_tkpo_loss(tiny_model, tiny_tokenizer, samples, settings, by_hand, tmp_path):
    rows = encode_dataset([s.record for s in samples], tiny_tokenizer, None, 1024)
    model = tiny_model()
    patch(model, settings)
    trainer = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), **OPTIONS),
        train_dataset=rows,
        data_collator=TKPOCollator(tiny_tokenizer.pad_token_id),
    )
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["loss"] == pytest.approx(float(by_hand(tiny_model(), samples)["loss"]), abs=2e-4)


def test_a_patch_that_sft_trainer_has_replaced_is_an_error(tiny_model, tiny_tokenizer, samples, settings, tmp_path):
    """SFTTrainer gives the model a forward of its own: patched before, it would train with cross-entropy alone."""
    model = tiny_model()
    patch(model, settings)
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(tmp_path), loss_type="nll", gradient_checkpointing=False, **OPTIONS),
        train_dataset=Dataset.from_list(strings(samples, tiny_tokenizer)),
        processing_class=tiny_tokenizer,
    )
    with pytest.raises(TKPOError, match="after the trainer is made"):
        trainer.train()
