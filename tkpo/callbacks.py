"""What a run does beside its steps: the log file, and validation where the trainer has none of its own."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from tkpo.loss import IGNORE_INDEX


class LogFile(TrainerCallback):
    """Appends what the trainer logs to a JSON Lines file; a resumed run drops the lines it will write again."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            lines = []
            for text in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a killed run may leave half a line
                    lines.append(json.loads(text))
            kept = [line for line in lines if line["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            line = {"step": state.global_step, "time": round(time.time(), 3), **logs}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


class Validation(TrainerCallback):
    """Every `steps` steps the mean cross-entropy of the validation outlines, as TKPOTrainer logs it, for TRL's."""

    def __init__(self, trainer, rows, steps: int):
        self.trainer, self.rows, self.steps = trainer, rows, steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.steps:
            return
        started, losses = time.perf_counter(), []
        model.eval()
        with torch.no_grad():
            for row in self.rows:
                ids, labels = (torch.tensor([row[key]], device=model.device) for key in ("input_ids", "labels"))
                kept = int((labels != IGNORE_INDEX).sum())
                logits = model(input_ids=ids, logits_to_keep=kept + 1).logits[0, :-1]
                losses.append(torch.nn.functional.cross_entropy(logits.float(), labels[0, -kept:]).item())
        model.train()
        seconds = round(time.perf_counter() - started, 3)
        self.trainer.log({"eval_cross_entropy": round(sum(losses) / len(losses), 6), "eval_runtime": seconds})
