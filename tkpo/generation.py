"""Outlines from the base model and its adapters, several adapters in one batched forward, as a stream."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tkpo.adapters import adapter_folder, check_base, load_with_adapters
from tkpo.data import user_message
from tkpo.decoder import Decoder
from tkpo.decoding import PackedDecoder
from tkpo.errors import TKPOError
from tkpo.loop_guard import LoopGuard
from tkpo.machine import find_device
from tkpo.presets import load_tokenizer, resolve_model
from tkpo.sampling import Decoding, Pick

logger = logging.getLogger(__name__)

BASE = "base"  # the name under which the model without adapter is asked for
PEFT_BASE = "__base__"  # PEFT's name for the same in a batch of mixed adapters
MAX_PROMPT_TOKENS = 3072


class Outlines(list):
    """Texts, one a record. finished: which the model ended itself (list of bool). tokens: of each (list of int)."""

    def __init__(self, texts: list[str], finished: list[bool], tokens: list[int]):
        super().__init__(texts)
        self.finished = finished
        self.tokens = tokens


class OutlineGenerator:
    """The base model with its adapters loaded once; `generate` and `stream` write outlines.

    model: preset, folder or hub id. adapters: name → run or adapter folder. "base" is always there: zero-shot.
    In float32, the default on a CPU, the model runs by `tkpo.decoding`, elsewhere by transformers. One generation runs
    at a time; a second caller waits.
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
        self.loop_guard = LoopGuard(self.tokenizer)
        for folder in folders.values():
            check_base(folder, model)
        self.adapters = (*folders, BASE)
        self.decoder: Decoder = _load(model, folders, dtype, device, self.tokenizer.pad_token_id)
        self._instructions: dict[str, list[int]] = {}  # instruction → ids of a prompt without input
        self._lock = threading.Lock()

    @property
    def lm_head_weight(self) -> Tensor:
        """The output head's weight, (V, H), in the dtype that it is stored in."""
        return self.decoder.head_weight

    def hidden_states(self, sequences: list[list[int]], adapter: str) -> list[Tensor]:
        """Last hidden states, (T, H) each, of sequences of token ids under one adapter ("base": none)."""
        names = self._names(sequences, adapter)
        with self._lock:
            return self.decoder.hidden_states(sequences, names)

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

    def shared_tokens(self, record: dict, prompt: list[int]) -> int:
        """How many of the record's prompt ids begin every prompt of its instruction; never all of them."""
        instruction = record["instruction"]
        if instruction not in self._instructions:
            self._instructions[instruction] = self.prompt_ids({"instruction": instruction})
        pairs = zip(prompt[:-1], self._instructions[instruction], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def generate(self, records: list[dict], adapters: str | list[str], **options) -> list[str]:
        """Outlines for `records`, one each. `adapters`: one name for all, or one a record; options as in `each`."""
        outlines = [""] * len(records)
        for number, outline in self.each(records, adapters, **options):
            outlines[number] = outline
        return outlines

    def each(
        self,
        records: list[dict],
        adapters: str | list[str],
        *,
        should_stop: Callable[[], bool] | None = None,
        batch_size: int | None = None,
        **decoding,
    ) -> Iterator[tuple[int, str]]:
        """Yield (number of the record, its whole outline) as the outlines are finished; options as in `stream`.

        batch_size: so many are written at a time, default all; where one ends the next begins. When `should_stop`
        stops it, what is there of the others comes at the end.
        """
        names = self._names(records, adapters)
        ids: list[list[int]] = [[] for _ in records]
        told = set()
        settings = Decoding(**decoding)
        with contextlib.closing(self._steps(records, names, settings, should_stop, batch_size)) as steps:
            for row, token in (pair for step in steps for pair in step.items()):
                if token != self.tokenizer.eos_token_id:
                    ids[row].append(token)
                if token == self.tokenizer.eos_token_id or len(ids[row]) == settings.max_new_tokens:
                    told.add(row)
                    yield row, self._text(ids[row], whole=True)
        for row in range(len(records)):
            if row not in told:
                yield row, self._text(ids[row], whole=True)

    def stream(
        self,
        records: list[dict],
        adapters: str | list[str],
        *,
        should_stop: Callable[[], bool] | None = None,
        **decoding,
    ) -> Iterator[Outlines]:
        """Yield the outlines so far, one text a record, after every token; the last yield is the whole.

        An outline ends at the end-of-turn token. Closing the iterator stops the generation.

        Args:
            records: what to outline, without output.
            adapters: one name for all, or one for each record.
            should_stop: asked before every token and, while the prompts are read, before every layer.
            decoding: `tkpo.sampling.Decoding`'s settings: max_new_tokens, temperature, min_p, seed, guard.
        """
        names = self._names(records, adapters)
        ids: list[list[int]] = [[] for _ in records]
        finished = [False] * len(records)
        with contextlib.closing(self._steps(records, names, Decoding(**decoding), should_stop)) as steps:
            for step in steps:
                for row, token in step.items():
                    finished[row] = token == self.tokenizer.eos_token_id
                    if not finished[row]:
                        ids[row].append(token)
                yield Outlines([self._text(row) for row in ids], list(finished), [len(row) for row in ids])
        yield Outlines([self._text(row, whole=True) for row in ids], finished, [len(row) for row in ids])

    def _steps(
        self, records, names, settings: Decoding, should_stop, batch_size: int | None = None
    ) -> Iterator[dict[int, int]]:
        """{row: token} of each step, written by a thread of its own, which ends with this iterator."""
        if not records:
            return
        prompts = [self.prompt_ids(record) for record in records]
        shared = [self.shared_tokens(record, ids) for record, ids in zip(records, prompts, strict=True)]
        cancelled = threading.Event()
        steps: queue.SimpleQueue = queue.SimpleQueue()
        pick = Pick(self.loop_guard, len(records), settings, steps.put)
        check = lambda: cancelled.is_set() or bool(should_stop and should_stop())  # noqa: E731

        def work() -> None:
            try:
                with self._lock:
                    end = self.tokenizer.eos_token_id
                    self.decoder.decode(prompts, names, pick, end, settings.max_new_tokens, check, batch_size, shared)
                steps.put(None)
            except Exception as error:  # for the thread that reads the steps
                steps.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while isinstance(step := steps.get(), dict):
                yield step
        finally:
            cancelled.set()
            worker.join()
        if step:
            raise step

    def _names(self, records: list, adapters: str | list[str]) -> list[str]:
        """An adapter for each record."""
        names = [adapters] * len(records) if isinstance(adapters, str) else list(adapters)
        if len(names) != len(records):
            raise TKPOError(f"{len(records)} records but {len(names)} adapter names")
        if unknown := sorted(set(names) - set(self.adapters)):
            raise TKPOError(f"no adapter {', '.join(unknown)}; there are: {', '.join(self.adapters)}")
        return names

    def _text(self, ids: list[int], whole: bool = False) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip() if whole else text.lstrip().rstrip("\ufffd")  # a character that is still incomplete


def _load(model: str, folders: dict[str, Path], dtype, device, pad_id: int) -> Decoder:
    device = find_device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"  # `PackedDecoder` is quicker than bfloat16 is, also where the CPU has that
    quick = device.type == "cpu" and str(dtype).removeprefix("torch.") == "float32"
    # `PackedDecoder` repacks the weights as they are stored: in float32 they would only take time and memory.
    stored = AutoConfig.from_pretrained(resolve_model(model)).dtype if quick else None
    whole = load_with_adapters(model, folders, stored or dtype, device)
    if quick and PackedDecoder.fits(whole):
        return PackedDecoder(whole)
    return TransformersDecoder(whole.float() if quick else whole, pad_id)


class TransformersDecoder:
    """What `tkpo.decoding.PackedDecoder` does, for any model and device, by transformers and PEFT."""

    def __init__(self, model, pad_id: int):
        self.model = model
        self.pad_id = pad_id

    @property
    def head_weight(self) -> Tensor:
        return self.model.get_output_embeddings().weight.detach()

    @torch.inference_mode()
    def hidden_states(self, sequences: list[list[int]], adapters: list[str]) -> list[Tensor]:
        states = []
        for ids, name in zip(sequences, adapters, strict=True):
            options = self._adapter_options([name])
            tokens = torch.tensor([ids], device=self.model.device)
            states.append(self.model(input_ids=tokens, output_hidden_states=True, **options).hidden_states[-1][0])
        return states

    @torch.inference_mode()
    def decode(self, prompts, adapters, choose, end, max_new_tokens, check, slots=None, shared=None) -> None:
        slots = slots or len(prompts)
        for start in range(0, len(prompts), slots):
            part = slice(start, start + slots)
            own = lambda logits, rows, start=start: choose(logits, [start + row for row in rows])  # noqa: E731
            if not check():
                self._decode(prompts[part], adapters[part], own, end, max_new_tokens, check)

    def _decode(self, prompts, adapters, choose, end, max_new_tokens, check) -> None:
        width = max(map(len, prompts))
        rows = [[self.pad_id] * (width - len(ids)) + ids for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        self.model.generate(
            input_ids=torch.tensor(rows, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            logits_processor=LogitsProcessorList([_Chosen(choose, end, len(prompts))]),
            stopping_criteria=StoppingCriteriaList([_Stop(check)]),
            eos_token_id=end,
            pad_token_id=self.pad_id,
            **self._adapter_options(adapters),
        )

    def _adapter_options(self, names: list[str]) -> dict:
        """How the model is told the adapters; a batch of one adapter alone goes the quicker way."""
        if not isinstance(self.model, PeftModel):
            return {}
        if len(set(names)) == 1 and names[0] != BASE:
            self.model.set_adapter(names[0])
            return {}
        return {"adapter_names": [PEFT_BASE if name == BASE else name for name in names]}


class _Chosen(LogitsProcessor):
    """Leaves generate no choice but the token that `choose` takes."""

    def __init__(self, choose: Callable[[Tensor, list[int]], list[int]], end: int, rows: int):
        self.choose = choose
        self.end = end
        self.rows = list(range(rows))  # those that have not ended

    def __call__(self, input_ids, scores):
        tokens = self.choose(scores[self.rows], self.rows)
        only = torch.full_like(scores, -torch.inf)
        only[self.rows, tokens] = 0
        only[[row for row in range(len(scores)) if row not in self.rows], self.end] = 0
        self.rows = [row for row, token in zip(self.rows, tokens, strict=True) if token != self.end]
        return only


class _Stop(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]):
        self.stopped = stopped

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.stopped(), dtype=torch.bool, device=input_ids.device)
