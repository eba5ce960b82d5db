"""What a run does beside its steps: the log file."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from transformers import TrainerCallback


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
