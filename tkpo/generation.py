"""Outlines from the base model and its adapters, several adapters in one batched forward, as a stream."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

from tkpo.adapters import adapter_folder, adapter_hash, check_base, load_with_adapters, prompt_order
from tkpo.decoder import Decoder
from tkpo.decoding import PackedDecoder
from tkpo.errors import TKPOError
from tkpo.loop_guard import LoopGuard
from tkpo.machine import find_device
from tkpo.presets import base_model_hash, load_tokenizer, resolve_model
from tkpo.prompting import INSTRUCTION_FIRST, PROMPT_ORDERS, Prompt, PromptWriter
from tkpo.sampling import Decoding, FlipGuided, Pick

ENGINES = ("auto", "decoder", "transformers")
BASE = "base"  # the name under which the model without adapter is asked for
PEFT_BASE = "__base__"  # PEFT's name for the same in a batch of mixed adapters


class Outlines(list):
    """Texts, one per record.

    finished: which the model ended itself (list of bool). tokens: of each (list of int).
    cut: tokens of each record's article that were not read, its tail (list of int).
    read: share (0 to 1) of the prompts that is read; 1 from the first token on.
    """

    def __init__(
        self,
        texts: list[str],
        finished: list[bool],
        tokens: list[int],
        cut: list[int] | None = None,
        read: float = 1.0,
    ):
        super().__init__(texts)
        self.finished = finished
        self.tokens = tokens
        self.cut = cut or [0] * len(texts)
        self.read = read


class OutlineGenerator:
    """The base model with its adapters loaded once; `generate`, `each` and `stream` write outlines.

    One generation runs at a time; a second caller waits. "base" is always among the adapters: zero-shot.

    Args:
        model: preset, folder or hub id.
        adapters: name → run or adapter folder. An adapter's prompts stand in the order that its tkpo.json names.
        dtype: "auto", or torch's name for one.
        device: default cuda if available, else cpu.
        axes_file: the axes table of one's own attributes.
        base_prompt_order: order of the base model's prompts, "instruction_first" or "article_first".
        engine: "decoder" (`tkpo.decoding`: Qwen2 in float32 on a CPU), "transformers", or "auto": the first that fits.
    """

    def __init__(
        self,
        model: str = "qwen2.5-coder-0.5b",
        adapters: dict[str, str | Path] | None = None,
        dtype="auto",
        device=None,
        *,
        axes_file: str | None = None,
        base_prompt_order: str = INSTRUCTION_FIRST,
        engine: str = "auto",
    ):
        self.model_name = model
        folders = {name: adapter_folder(path) for name, path in (adapters or {}).items()}
        if BASE in folders:
            raise TKPOError(f"an adapter cannot be called {BASE!r}: that is the model without one")
        if engine not in ENGINES:
            raise TKPOError(f"no engine {engine!r}; there are: {', '.join(ENGINES)}")
        self.prompt_orders = {name: prompt_order(folder) for name, folder in folders.items()}
        self.prompt_orders[BASE] = base_prompt_order
        for name, order in self.prompt_orders.items():
            if order not in PROMPT_ORDERS:
                raise TKPOError(f"{name}: no prompt order {order!r}; there are: {', '.join(PROMPT_ORDERS)}")
        self.tokenizer = load_tokenizer(model)
        self.loop_guard = LoopGuard(self.tokenizer)
        self.prompts = PromptWriter(self.tokenizer, axes_file)
        for folder in folders.values():
            check_base(folder, model)
        self.adapters = (*folders, BASE)
        self._hashes = {name: adapter_hash(folder) for name, folder in folders.items()}
        self.decoder: Decoder = _load(model, folders, dtype, device, self.tokenizer.pad_token_id, engine)
        self.engine = "decoder" if isinstance(self.decoder, PackedDecoder) else "transformers"
        self._instructions: dict[str, list[int]] = {}  # instruction → ids of a prompt without input
        self._lock = threading.Lock()

    def identity(self, adapter: str) -> dict:
        """What tells outlines by this model and adapter from others': weights by their hash, dtype, prompt order."""
        return {
            "model": self.model_name,
            "model_sha256": base_model_hash(resolve_model(self.model_name)),
            "adapter_sha256": self._hashes.get(adapter),
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "prompt_order": self.prompt_orders[adapter],
        }

    @property
    def lm_head_weight(self) -> Tensor:
        """The output head's weight, (V, H), in the dtype that it is stored in."""
        return self.decoder.head_weight

    def hidden_states(self, sequences: list[list[int]], adapter: str) -> list[Tensor]:
        """Last hidden states, (T, H) each, of sequences of token ids under one adapter ("base": none)."""
        names = self._names(sequences, adapter)
        with self._lock:
            return self.decoder.hidden_states(sequences, names)

    def prompt_ids(self, record: dict, adapter: str | None = None) -> list[int]:
        """Token ids of a record's prompt, in the adapter's order; without adapter in the record's own.

        The tail of an article of more than MAX_ARTICLE_TOKENS is cut, with a warning.
        """
        return self.prompt(record, adapter).ids

    def prompt(self, record: dict, adapter: str | None = None) -> Prompt:
        """The same with the number of tokens that were cut."""
        return self.prompts.prompt(self.prompts.arranged(record, self.prompt_orders[adapter]) if adapter else record)

    def shared_tokens(self, record: dict, prompt: list[int]) -> int:
        """How many of the record's prompt ids begin every prompt of its instruction; never all of them."""
        instruction = record["instruction"]
        if instruction not in self._instructions:
            self._instructions[instruction] = self.prompts.prompt({"instruction": instruction}).ids
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
        numbers: list[int] | None = None,
        **decoding,
    ) -> Iterator[tuple[int, str]]:
        """Yield (number of the record, its whole outline) as the outlines are finished; options as in `stream`.

        batch_size: outlines written at a time, default all; where one ends the next begins.
        numbers: of each record, which its draws follow beside the seed; default its place among the records.
        When `should_stop` stops it, what is there of the others comes at the end.
        """
        settings = Decoding(**decoding)
        batch = self._batch(records, adapters)
        ids: list[list[int]] = [[] for _ in records]
        told = set()
        with contextlib.closing(self._steps(batch, settings, should_stop, batch_size, numbers)) as steps:
            for row, token in (pair for step in steps if isinstance(step, dict) for pair in step.items()):
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
        reading: bool = False,
        **decoding,
    ) -> Iterator[Outlines]:
        """Yield the outlines so far, one text a record, after every token; the last yield is the whole.

        An outline ends at the end-of-turn token. Closing the iterator stops the generation.

        Args:
            records: what to outline, without output.
            adapters: one name for all, or one for each record.
            should_stop: asked before every token and, while the prompts are read, before every layer.
            reading: yield empty outlines while the prompts are read, too, with the share that is `read`.
            decoding: `tkpo.sampling.Decoding`'s settings: max_new_tokens, temperature, min_p, seed, guard,
                style_strength.
        """
        batch = self._batch(records, adapters)
        cut = [prompt.cut for prompt in batch.prompts]
        ids: list[list[int]] = [[] for _ in records]
        finished = [False] * len(records)
        outlines = lambda whole=False, read=1.0: Outlines(  # noqa: E731
            [self._text(row, whole) for row in ids], list(finished), [len(row) for row in ids], cut, read
        )
        with contextlib.closing(self._steps(batch, Decoding(**decoding), should_stop)) as steps:
            for step in steps:
                if isinstance(step, float):
                    if reading:
                        yield outlines(read=step)
                    continue
                for row, token in step.items():
                    finished[row] = token == self.tokenizer.eos_token_id
                    if not finished[row]:
                        ids[row].append(token)
                yield outlines()
        yield outlines(whole=True)

    def _batch(self, records: list[dict], adapters: str | list[str]) -> _Batch:
        names = self._names(records, adapters)
        arranged = [self.prompts.arranged(r, self.prompt_orders[name]) for r, name in zip(records, names, strict=True)]
        return _Batch(arranged, names, [self.prompts.prompt(record) for record in arranged])

    def _steps(
        self,
        batch: _Batch,
        settings: Decoding,
        should_stop: Callable[[], bool] | None,
        batch_size: int | None = None,
        numbers: list[int] | None = None,
    ) -> Iterator[dict[int, int] | float]:
        """{row: token} of each step, before the first ones the share of the prompts that is read.

        They are written by a thread of its own, which ends with this iterator.
        """
        if not batch.records:
            return
        cancelled = threading.Event()
        steps: queue.SimpleQueue = queue.SimpleQueue()
        choose: Callable = Pick(self.loop_guard, numbers or range(len(batch.records)), settings, steps.put)
        stopped = lambda: cancelled.is_set() or bool(should_stop and should_stop())  # noqa: E731
        if settings.style_strength:
            batch = self._with_flips(batch)
            batch_size = batch_size and 2 * batch_size
            choose = FlipGuided(choose, settings.style_strength)
        prompts = [prompt.ids for prompt in batch.prompts]
        shared = [self.shared_tokens(record, ids) for record, ids in zip(batch.records, prompts, strict=True)]

        def work() -> None:
            try:
                with self._lock:
                    self.decoder.decode(
                        prompts,
                        batch.adapters,
                        choose,
                        self.tokenizer.eos_token_id,
                        settings.max_new_tokens,
                        stopped,
                        slots=batch_size,
                        shared=shared,
                        progress=steps.put,
                    )
                steps.put(None)
            except Exception as error:  # for the thread that reads the steps
                steps.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while isinstance(step := steps.get(), (dict, float)):
                yield step
        finally:
            cancelled.set()
            worker.join()
        if step:
            raise step

    def _with_flips(self, batch: _Batch) -> _Batch:
        """Each row and, right after it, the same under the flipped prompt."""
        flips = [self.prompts.flipped(record) for record in batch.records]
        twice = lambda own, others: [row for pair in zip(own, others, strict=True) for row in pair]  # noqa: E731
        return _Batch(
            twice(batch.records, flips),
            twice(batch.adapters, batch.adapters),
            twice(batch.prompts, [self.prompts.prompt(flip) for flip in flips]),
        )

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


@dataclass(frozen=True)
class _Batch:
    """Records in their adapters' order, the adapters, and the prompts."""

    records: list[dict]
    adapters: list[str]
    prompts: list[Prompt]


def _load(model: str, folders: dict[str, Path], dtype, device, pad_id: int, engine: str) -> Decoder:
    device = find_device(device)
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"  # `PackedDecoder` is quicker than bfloat16 is, also where the CPU has that
    quick = device.type == "cpu" and str(dtype).removeprefix("torch.") == "float32"
    # `PackedDecoder` repacks the weights as they are stored: in float32 they would only take time and memory.
    stored = AutoConfig.from_pretrained(resolve_model(model)).dtype if quick else None
    whole = load_with_adapters(model, folders, stored or dtype, device)
    if quick and engine != "transformers" and PackedDecoder.fits(whole):
        return PackedDecoder(whole)
    if engine == "decoder":
        raise TKPOError(f"the engine decoder does not run {model} so: it needs Qwen2 with LoRA, float32 and a CPU")
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

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.inference_mode()
    def decode(
        self, prompts, adapters, choose, end, max_new_tokens, check, slots=None, shared=None, progress=lambda _: None
    ) -> None:
        for part in self._batches(adapters, slots or len(prompts)):
            own = lambda logits, rows, part=part: choose(logits, [part[row] for row in rows])  # noqa: E731
            if not check():
                own_prompts, own_adapters = ([whole[row] for row in part] for whole in (prompts, adapters))
                self._decode(own_prompts, own_adapters, own, end, max_new_tokens, check)

    def _batches(self, adapters: list[str], slots: int) -> list[list[int]]:
        """The rows that are written together: at most `slots`, each DoRA adapter's apart, as PEFT cannot mix those."""
        configs = self.model.peft_config if isinstance(self.model, PeftModel) else {}
        apart = [name if name in configs and getattr(configs[name], "use_dora", False) else None for name in adapters]
        groups = [[row for row, own in enumerate(apart) if own == name] for name in dict.fromkeys(apart)]
        return [group[start : start + slots] for group in groups for start in range(0, len(group), slots)]

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
