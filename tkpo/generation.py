"""Outlines from the base model and its adapters, several adapters in one batched forward, as a stream."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from tkpo.data import user_message
from tkpo.errors import TKPOError
from tkpo.loop_guard import LoopGuard
from tkpo.presets import load_model, load_tokenizer
from tkpo.runs import adapter_folder, check_base

logger = logging.getLogger(__name__)

BASE = "base"  # the name under which the model without adapter is asked for
PEFT_BASE = "__base__"  # PEFT's name for the same in a batch of mixed adapters
MAX_NEW_TOKENS = 384
MAX_PROMPT_TOKENS = 3072


class OutlineGenerator:
    """The base model with its adapters loaded once; `generate` and `stream` write outlines.

    model: preset, folder or hub id. adapters: name → run or adapter folder. "base" is always there: zero-shot.
    One generation runs at a time; a second caller waits.
    """

    def __init__(
        self,
        model: str = "qwen2.5-coder-0.5b",
        adapters: dict[str, str | Path] | None = None,
        dtype="auto",
        device=None,
    ):
        self.model_name = model
        folders = {name: adapter_folder(path) for name, path in (adapters or {}).items()}
        if BASE in folders:
            raise TKPOError(f"an adapter cannot be called {BASE!r}: that is the model without one")
        self.tokenizer = load_tokenizer(model)
        self.tokenizer.padding_side = "left"
        self.loop_guard = LoopGuard(self.tokenizer)
        self.model = load_model(model, dtype, device)
        for name, folder in folders.items():
            check_base(folder, model)
            try:
                if isinstance(self.model, PeftModel):
                    self.model.load_adapter(str(folder), adapter_name=name)
                else:
                    self.model = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
            except (RuntimeError, ValueError, OSError) as error:
                raise TKPOError(f"adapter {folder} does not fit model {model}: {error}") from error
        self.adapters = (*folders, BASE)
        self.model.eval()
        self._lock = threading.Lock()

    def prompt_ids(self, record: dict) -> list[int]:
        """Token ids of a record's prompt; an input of more than MAX_PROMPT_TOKENS is cut, with a warning."""

        def ids(message: str) -> list[int]:
            chat = [{"role": "user", "content": message}]
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        whole = ids(user_message(record))
        excess = len(whole) - MAX_PROMPT_TOKENS
        if excess <= 0:
            return whole
        article = self.tokenizer(record["input"], add_special_tokens=False)["input_ids"]
        kept = self.tokenizer.decode(article[: max(1, len(article) - excess - 8)]).rstrip("\ufffd")
        logger.warning("the input has %d tokens: its last %d were cut", len(article), excess)
        return ids(user_message({**record, "input": kept}))

    def generate(self, records: list[dict], adapters: str | list[str], **options) -> list[str]:
        """Outlines for `records`, one each. `adapters`: one name for all, or one a record; options as in `stream`."""
        outlines = [""] * len(records)
        for texts in self.stream(records, adapters, **options):
            outlines = texts
        return outlines

    def stream(
        self,
        records: list[dict],
        adapters: str | list[str],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
        should_stop: Callable[[], bool] | None = None,
    ) -> Iterator[list[str]]:
        """Yield the outlines so far, one text a record, after every token; the last yield is the whole.

        temperature 0 is greedy. The same seed gives the same outlines. Ends at the end-of-turn token. No outline
        repeats a heading or a run of tokens of its own: see `tkpo.loop_guard`. should_stop: asked before every
        token. Closing the iterator stops the generation too.
        """
        names = [adapters] * len(records) if isinstance(adapters, str) else list(adapters)
        if len(names) != len(records):
            raise TKPOError(f"{len(records)} records but {len(names)} adapter names")
        unknown = sorted(set(names) - set(self.adapters))
        if unknown:
            raise TKPOError(f"no adapter {', '.join(unknown)}; there are: {', '.join(self.adapters)}")
        if not records:
            return
        batch = self.tokenizer.pad({"input_ids": [self.prompt_ids(r) for r in records]}, return_tensors="pt")
        batch = batch.to(self.model.device)
        cancelled = threading.Event()
        tokens = _TokenQueue()
        options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0,
            "logits_processor": LogitsProcessorList([_NoLoops(self.loop_guard, batch["input_ids"].shape[1])]),
            "stopping_criteria": StoppingCriteriaList(
                [_Stop(lambda: cancelled.is_set() or bool(should_stop and should_stop()))]
            ),
            "streamer": tokens,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
            **({"temperature": temperature, "top_p": 0.95, "top_k": 0} if temperature > 0 else {}),
            **self._adapter_options(names),
        }
        worker = threading.Thread(target=self._work, args=(batch, options, seed, tokens), daemon=True)
        worker.start()
        ids: list[list[int]] = [[] for _ in records]
        done = [False] * len(records)
        try:
            while (step := tokens.get()) is not None:
                for row, token in enumerate(step):
                    done[row] |= token == self.tokenizer.eos_token_id
                    if not done[row]:
                        ids[row].append(token)
                yield [self._text(row) for row in ids]
        finally:
            cancelled.set()
            worker.join()
        if tokens.error:
            raise tokens.error
        yield [self._text(row, whole=True) for row in ids]

    def _adapter_options(self, names: list[str]) -> dict:
        """How generate is told the adapters; a batch of one adapter alone goes the quicker way."""
        if not isinstance(self.model, PeftModel):
            return {}
        if set(names) == {BASE}:
            return {"adapter_names": [PEFT_BASE] * len(names)}
        if len(set(names)) == 1:
            self.model.set_adapter(names[0])
            return {}
        return {"adapter_names": [PEFT_BASE if name == BASE else name for name in names]}

    def _work(self, batch, options: dict, seed: int, tokens: _TokenQueue) -> None:
        try:
            with self._lock, torch.inference_mode():
                torch.manual_seed(seed)
                self.model.generate(**batch, **options)
        except Exception as error:  # handed to the thread that reads the stream
            tokens.error = error
        finally:
            tokens.put_end()

    def _text(self, ids: list[int], whole: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip() if whole else text.lstrip().rstrip("\ufffd")  # a character that is still incomplete


class _TokenQueue(BaseStreamer):
    """A streamer for batches: hands each step's tokens, one a row, to another thread."""

    def __init__(self):
        self.error: Exception | None = None
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._queue.put(value.flatten().tolist())
        self._prompt_seen = True

    def end(self) -> None:
        """generate calls this at its end; the stream ends by `put_end`, when the model is free again."""

    def put_end(self) -> None:
        self._queue.put(None)

    def get(self) -> list[int] | None:
        return self._queue.get()


class _NoLoops(LogitsProcessor):
    """The loop guard on what was generated, row by row."""

    def __init__(self, guard: LoopGuard, prompt_length: int):
        self.guard = guard
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            scores[row, list(self.guard.banned(ids))] = -torch.inf
        return scores


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)
