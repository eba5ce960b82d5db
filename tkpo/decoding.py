"""Qwen2's forward for a CPU: every row of a batch by an adapter of its own, base weights in half the bytes.

Writing token by token reads every weight once a step, so that the bytes a weight takes are what a step costs. Base
models are stored in bfloat16; their weights, times a power of two, are float16 numbers as well, and FBGEMM multiplies
float32 inputs with packed float16 weights in float32. The products are those of a float32 model, in another order.

A batch is ragged: linear layers see the tokens of all rows one after another, without padding; only attention tells
rows apart. Rows that have ended leave the batch. What many prompts begin with is read once for each adapter.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu
from transformers import Qwen2ForCausalLM

HALF_SCALE = (
    2.0**10
)  # moves bfloat16 weights into float16's range: exact from 2^-27 to below 2^6, smaller ones to 2^-35
PREFIXES = 64  # beginnings of prompts that are kept read
COMMON_TOKENS = 32  # that prompts must begin with in common to be worth reading them apart
PREFILL_TOKENS = 512  # tokens of prompts that go through the layers together; a longer prompt goes alone
STATIC_ROPE = ("default", "linear", "llama3", "yarn")


class Stopped(Exception):
    """`check` was true: the forward was given up between two layers."""


class PackedDecoder:
    """The layers of a Qwen2 with LoRA adapters, repacked for a CPU; takes the weights out of `model`.

    model: a Qwen2ForCausalLM or the PeftModel around one, for which `fits` is true. An adapter is asked for by its
    PEFT name; any other name is the base model.
    """

    def __init__(self, model: Qwen2ForCausalLM | PeftModel):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        config = base.config
        self.adapters = tuple(model.peft_config) if isinstance(model, PeftModel) else ()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps = config.rms_norm_eps
        self._rotary = base.model.rotary_emb
        self._embedding = base.model.embed_tokens.weight.detach()
        self.head_weight = base.lm_head.weight.detach()  # (V, H), as it is stored
        self._norm = base.model.norm.weight.detach().float()
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # packing runs on one core
            head = pool.submit(_Linear, [base.lm_head])
            self._layers = list(pool.map(_Layer.take, base.model.layers))
            self.head = head.result()

        self.linears = [part for layer in self._layers for part in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        self.stacks = functools.lru_cache(maxsize=4)(self._stack)
        self._prefixes: OrderedDict[tuple[str, tuple[int, ...]], list[tuple[Tensor, Tensor]]] = OrderedDict()

    @staticmethod
    def fits(model: Qwen2ForCausalLM | PeftModel) -> bool:
        """Whether `model` is what this module computes: Qwen2 on the CPU with plain LoRA adapters on its layers."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if type(base) is not Qwen2ForCausalLM or base.device.type != "cpu" or base.config.hidden_act != "silu":
            return False
        if set(base.config.layer_types) != {"full_attention"}:
            return False
        if base.config.rope_parameters["rope_type"] not in STATIC_ROPE:
            return False
        if any(isinstance(module, AuxiliaryTrainingWrapper) for module in base.modules()):
            return False
        tuned = {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}
        return all(
            type(module) is LoraLinear
            and name.startswith("model.layers.")
            and not module.lora_variant
            and not module.merged
            and not module.fan_in_fan_out
            and all(b.bias is None for b in module.lora_B.values())
            for name, module in tuned.items()
        )

    # ---- what callers ask for

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in: the stored weights are unpacked to float32."""
        return torch.float32

    @torch.inference_mode()
    def hidden_states(self, sequences: list[list[int]], adapters: list[str]) -> list[Tensor]:
        """Last hidden states, (T, H) float32 each, of sequences of token ids, each by its own adapter."""
        states = []
        for group in _groups([len(ids) for ids in sequences]):
            lengths = [len(sequences[row]) for row in group]
            states += self._prefill([sequences[row] for row in group], [adapters[row] for row in group]).split(lengths)
        return states

    @torch.inference_mode()
    def decode(
        self,
        prompts: list[list[int]],
        adapters: list[str],
        choose: Callable[[Tensor, list[int]], list[int]],
        end: int,
        max_new_tokens: int,
        check: Callable[[], bool] = lambda: False,
        slots: int | None = None,
        shared: list[int] | None = None,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Write after every prompt, until each row has ended with the token `end` or has `max_new_tokens`.

        prompts: token ids. choose: is given logits (n, V) and the n rows they are of, those that go on, and returns
        their next tokens. check: asked between layers while prompts are read, and before every step; once it is
        true, writing stops. slots: so many rows at a time, default all; where one ends the next begins.
        shared: so many tokens at the beginning of each prompt, but not all of it, will come again with this adapter;
        their keys and values are kept for the next time. What prompts of one adapter begin with in common, an article
        in several styles, is read once in any case, and kept until the last of them is read. progress: told the share
        of the tokens to read that has been read, between layers.
        """
        shared = shared or [0] * len(prompts)
        slots = min(slots or len(prompts), len(prompts))
        reading = _Reading(prompts, adapters, shared, check, progress)
        cache = _Cache(self, slots, max(map(len, prompts)) + max_new_tokens)
        waiting, rows = list(range(len(prompts))), []  # rows[slot] is the row that is written there
        left = [max_new_tokens] * len(prompts)
        last, lora = torch.empty(0, self._norm.numel()), None
        try:
            while waiting or rows:
                next_rows = waiting[: slots - len(rows)]
                for group in _groups([len(prompts[row]) - reading.common(row) for row in next_rows]):
                    new = [next_rows[i] for i in group]
                    last = torch.cat([last, self._read(reading, new, cache, len(rows))])
                    rows += new
                    lora = None
                waiting = waiting[len(next_rows) :]
                if check():
                    return
                tokens = choose(self.head(last), rows)
                for row in rows:
                    left[row] -= 1
                kept = [slot for slot, row in enumerate(rows) if tokens[slot] != end and left[row]]
                if len(kept) < len(rows):
                    rows, tokens = [rows[slot] for slot in kept], [tokens[slot] for slot in kept]
                    cache.keep(kept)
                    lora = None
                lora = lora or _Lora(self, [adapters[row] for row in rows])
                last = self._step(tokens, cache, lora) if rows else last[:0]
        except Stopped:
            return

    def _stack(self, names: tuple[str, ...]) -> dict[_Linear, _Pairs]:
        """Every linear layer's pairs of the named adapters together."""
        return {part: stacked for part in self.linears if (stacked := part.stacked(names))}

    # ---- the forward

    def _read(self, reading: _Reading, rows: list[int], cache: _Cache, slot: int) -> Tensor:
        """Put the rows' prompts into the cache's slots from `slot` on; returns their last hidden states (n, H)."""
        prompts, adapters = ([whole[row] for row in rows] for whole in (reading.prompts, reading.adapters))
        cache.begin(slot, [len(ids) for ids in prompts])
        keys = [
            (name, tuple(ids[: reading.shared[row]])) for row, name, ids in zip(rows, adapters, prompts, strict=True)
        ]
        known = [
            self._common(reading, row, key) if reading.common(row) else self._prefixes.get(key, [])
            for row, key in zip(rows, keys, strict=True)
        ]
        new = [ids[_length(prefix) :] for ids, prefix in zip(prompts, known, strict=True)]
        between = reading.between(sum(map(len, new)), len(self._layers))
        states = self._prefill(new, adapters, between, functools.partial(cache.fill, slot), known, only_last=True)
        for number, (row, key) in enumerate(zip(rows, keys, strict=True)):
            reading.done(row)
            if key[1]:
                if key not in self._prefixes:
                    self._prefixes[key] = cache.beginning(slot + number, len(key[1]))
                self._prefixes.move_to_end(key)
        while len(self._prefixes) > PREFIXES:
            self._prefixes.popitem(last=False)
        return states

    def _common(self, reading: _Reading, row: int, key: tuple[str, tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of what the row's prompt has in common with others, read if it has not been."""
        if (kept := reading.kept(row)) is not None:
            return kept
        ids, before = reading.prompts[row][: reading.common(row)], self._prefixes.get(key, [])
        parts: list[tuple[Tensor, Tensor]] = []
        new = ids[_length(before) :]
        between = reading.between(len(new), len(self._layers))
        self._prefill(
            [new], [key[0]], between, lambda _layer, _number, k, v: parts.append((k.clone(), v.clone())), [before], True
        )
        return reading.keep(row, parts)

    def _prefill(
        self, prompts, adapters, check=lambda: False, store=lambda *_: None, known=None, only_last=False
    ) -> Tensor:
        """Hidden states (sum of lengths, H), or of each prompt's last token alone.

        store: is given (layer, number of the prompt, keys, values). known: for each prompt the keys and values,
        (kv_heads, T, D) a layer, of what comes before it, or [].
        """
        known = known or [[]] * len(prompts)
        lengths = [len(ids) for ids in prompts]
        befores = [_length(prefix) for prefix in known]
        spans = torch.tensor([0, *lengths]).cumsum(0).tolist()
        group = self.heads // self.kv_heads
        masks = [
            torch.ones(n, before + n, dtype=torch.bool).tril(before) if before else None
            for n, before in zip(lengths, befores, strict=True)
        ]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if check():
                raise Stopped
            out = torch.empty_like(q)
            for number, (a, b) in enumerate(itertools.pairwise(spans)):
                own_q, own_k, own_v = (part[a:b].transpose(0, 1) for part in (q, k, v))
                if known[number]:
                    before_k, before_v = known[number][layer]
                    own_k, own_v = torch.cat([before_k, own_k], dim=1), torch.cat([before_v, own_v], dim=1)
                store(layer, number, own_k, own_v)
                own_k, own_v = (part.repeat_interleave(group, dim=0) for part in (own_k, own_v))
                own_q, own_k, own_v = (part.unsqueeze(0) for part in (own_q, own_k, own_v))
                mask = masks[number]
                own_out = scaled_dot_product_attention(own_q, own_k, own_v, mask, is_causal=mask is None)
                out[a:b] = own_out[0].transpose(0, 1)
            return out

        ids = torch.tensor([token for prompt in prompts for token in prompt])
        positions = torch.cat([torch.arange(n, n + length) for n, length in zip(befores, lengths, strict=True)])
        lora = _Lora(self, [name for name, length in zip(adapters, lengths, strict=True) for _ in range(length)])
        return self._forward(ids, positions, attend, lora, torch.tensor(spans[1:]) - 1 if only_last else None)

    def _step(self, tokens: list[int], cache: _Cache, lora: _Lora) -> Tensor:
        """Hidden states (n, H) of one new token a slot."""
        positions = cache.extend()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.add(layer, k, v)
            q = q.view(len(q), self.kv_heads, -1, self.head_dim)  # the query heads of one key head side by side
            return scaled_dot_product_attention(q, keys, values, attn_mask=cache.mask)

        return self._forward(torch.tensor(tokens), positions, attend, lora)

    def _forward(
        self, ids: Tensor, positions: Tensor, attend: Callable, lora: _Lora, wanted: Tensor | None = None
    ) -> Tensor:
        """Hidden states (N, H), or of the `wanted` tokens alone.

        ids, positions: (N,). attend(layer, q (N, heads, D), k, v (N, kv_heads, D)) → N * heads * D numbers.
        """
        x = embedding(ids, self._embedding).float()
        cos, sin = self._rotary(x, positions.unsqueeze(0))
        cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1).clone()
        half = self.head_dim // 2
        sin[..., :half].neg_()  # rotate_half is a swap of halves and this sign
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv(self._normed(x, layer.attention_norm), lora).view(len(x), -1, self.head_dim)
            rotated = qkv[:, : self.heads + self.kv_heads]
            rotated = torch.addcmul(rotated * cos, rotated.roll(half, -1), sin)
            out = attend(number, rotated[:, : self.heads], rotated[:, self.heads :], qkv[:, -self.kv_heads :])
            out = out.reshape(len(x), -1)
            if wanted is not None and layer is self._layers[-1]:
                x, out, lora = x[wanted], out[wanted], lora.of(wanted)
            x += layer.output(out, lora)
            gate, up = layer.gate_up(self._normed(x, layer.mlp_norm), lora).chunk(2, dim=-1)
            x += layer.down(silu(gate).mul_(up), lora)
        return self._normed(x, self._norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.rms_norm(x, weight.shape, weight, self.eps)


@dataclass
class _Layer:
    attention_norm: Tensor
    qkv: _Linear
    output: _Linear
    mlp_norm: Tensor
    gate_up: _Linear
    down: _Linear

    @classmethod
    def take(cls, layer: nn.Module) -> _Layer:
        """Of a Qwen2 layer, which is left without weights: their memory is needed for the next layers' copies."""
        attention, mlp = layer.self_attn, layer.mlp
        taken = cls(
            layer.input_layernorm.weight.detach().float(),
            _Linear([attention.q_proj, attention.k_proj, attention.v_proj]),
            _Linear([attention.o_proj]),
            layer.post_attention_layernorm.weight.detach().float(),
            _Linear([mlp.gate_proj, mlp.up_proj]),
            _Linear([mlp.down_proj]),
        )
        layer.to_empty(device="meta")
        return taken


class _Linear:
    """Linear layers of one input as one product, with the LoRA pairs of their adapters."""

    def __init__(self, modules: list[nn.Module]):
        bases = [m.base_layer if isinstance(m, LoraLinear) else m for m in modules]
        weight = torch.cat([m.weight.detach() for m in bases])
        sizes = [len(m.weight) for m in bases]
        self.in_features = weight.shape[1]
        bias = None
        if any(m.bias is not None for m in bases):
            bias = torch.cat([torch.zeros(len(m.weight)) if m.bias is None else m.bias.detach().float() for m in bases])
        self._product = _half_product(weight, bias) or functools.partial(linear, weight=weight.float(), bias=bias)
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._pairs: dict[tuple[int, int], dict[str, tuple[Tensor, Tensor]]] = {}  # columns → adapter → A, scaled B^T
        for module, *columns in zip(modules, starts[:-1], starts[1:], strict=True):
            if isinstance(module, LoraLinear):
                self._pairs[tuple(columns)] = {
                    name: (
                        module.lora_A[name].weight.detach().float(),
                        module.lora_B[name].weight.detach().float().T * module.scaling[name],
                    )
                    for name in module.lora_A
                }

    def __call__(self, x: Tensor, lora: _Lora | None = None) -> Tensor:
        y = self._product(x)
        if lora and (pairs := lora.pairs(self)):
            inner = linear(x, pairs.a)
            if (mask := lora.mask(pairs)) is not None:
                inner *= mask
            for rows, columns, b in pairs.parts:
                y[:, columns].addmm_(inner[:, rows], b)
        return y

    def stacked(self, names: tuple[str, ...]) -> _Pairs | None:
        """The pairs of the named adapters together; None without any."""
        a, owners, parts = [], [], []
        for columns, pairs in self._pairs.items():
            own = [(i, *pairs[name]) for i, name in enumerate(names) if name in pairs]
            if own:
                first = len(owners)
                a += [pair[1] for pair in own]
                owners += [i for i, down, _ in own for _ in range(len(down))]
                parts.append((slice(first, len(owners)), slice(*columns), torch.cat([pair[2] for pair in own])))
        return _Pairs(torch.cat(a), tuple(owners), parts) if a else None


@dataclass
class _Pairs:
    """LoRA pairs that a linear layer's inputs are multiplied with together.

    a: (R, in). owners: (R,) numbers of the adapters that the rows of `a` belong to. parts: (which of the R numbers
    go on, to which outputs, by which b (their number, outputs)).
    """

    a: Tensor
    owners: tuple[int, ...]
    parts: list[tuple[slice, slice, Tensor]]


class _Lora:
    """The adapters of a batch's tokens: every pair is multiplied with every token, and masked out where not its own.

    With a few adapters of low rank that costs less than taking tokens apart.
    """

    def __init__(self, decoder: PackedDecoder, adapters: list[str]):
        names = tuple(name for name in decoder.adapters if name in set(adapters))
        numbers = {name: i for i, name in enumerate(names)}
        self._own = torch.tensor([numbers.get(name, -1) for name in adapters])
        self._stacks = decoder.stacks(names)
        self._masks: dict[tuple[int, ...], Tensor | None] = {}

    def of(self, tokens: Tensor) -> _Lora:
        """The same for some of the tokens."""
        part = copy.copy(self)
        part._own, part._masks = self._own[tokens], {}
        return part

    def pairs(self, layer: _Linear) -> _Pairs | None:
        return self._stacks.get(layer)

    def mask(self, pairs: _Pairs) -> Tensor | None:
        """(N, R), 1 where a pair is a token's own; None where every pair is every token's."""
        if pairs.owners not in self._masks:
            mask = self._own.unsqueeze(1) == torch.tensor(pairs.owners)
            self._masks[pairs.owners] = None if mask.all() else mask.float()
        return self._masks[pairs.owners]


class _Cache:
    """Keys and values of all layers, (slot, kv head, position, D) each; the slots in use are the first ones.

    mask: (slots in use, 1, 1, positions), -inf where a slot has nothing yet; None where all have as many.
    """

    def __init__(self, decoder: PackedDecoder, slots: int, positions: int):
        shape = (slots, decoder.kv_heads, positions, decoder.head_dim)  # zeros: what a mask hides must be finite
        self._keys, self._values = ([torch.zeros(shape) for _ in decoder._layers] for _ in range(2))
        self._lengths = torch.zeros(0, dtype=torch.long)
        self.mask: Tensor | None = None

    def begin(self, slot: int, lengths: list[int]) -> None:
        """Slots from `slot` on, the first free one, are for prompts of these lengths."""
        self._lengths = torch.cat([self._lengths[:slot], torch.tensor(lengths)])

    def fill(self, slot: int, layer: int, number: int, keys: Tensor, values: Tensor) -> None:
        """keys, values: (kv_heads, T, D) of a prompt, for slot `slot + number`."""
        self._keys[layer][slot + number, :, : keys.shape[1]] = keys
        self._values[layer][slot + number, :, : keys.shape[1]] = values

    def beginning(self, slot: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """A copy of the first `length` keys and values of a slot, (kv_heads, length, D) each, for every layer."""
        part = slot, slice(None), slice(length)
        return [(k[part].clone(), v[part].clone()) for k, v in zip(self._keys, self._values, strict=True)]

    def extend(self) -> Tensor:
        """Room for one more position in each slot; returns the positions (slots in use,)."""
        self._at = self._lengths
        self._lengths = self._at + 1
        self._columns = int(self._lengths.max())
        self._index = torch.arange(len(self._at))
        empty = torch.arange(self._columns) >= self._lengths.unsqueeze(1)
        self.mask = None
        if empty.any():
            self.mask = torch.zeros(empty.shape).masked_fill_(empty, float("-inf"))[:, None, None, :]
        return self._at

    def add(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put (slots, kv_heads, D) at the positions that `extend` made; returns all keys and values so far."""
        for whole, new in ((self._keys[layer], keys), (self._values[layer], values)):
            whole[self._index, :, self._at] = new
        count, columns = len(self._at), self._columns
        return self._keys[layer][:count, :, :columns], self._values[layer][:count, :, :columns]

    def keep(self, slots: list[int]) -> None:
        """Drop all other slots; those kept move up."""
        for target, source in enumerate(slots):
            if target != source:
                length = int(self._lengths[source])
                for whole in (*self._keys, *self._values):
                    whole[target, :, :length] = whole[source, :, :length]
        self._lengths = self._lengths[slots]


class _Reading:
    """The prompts of one `decode`: which of them begin alike, and how much is read."""

    def __init__(self, prompts, adapters, shared: list[int], check, progress):
        self.prompts, self.adapters, self.shared = prompts, adapters, shared
        self._check, self._progress = check, progress
        self._groups = {}  # row → the group of rows that it begins alike with
        self._lengths, self._waiting, self._kept = [], [], []
        for length, rows in _alike(prompts, adapters, shared):
            self._groups |= dict.fromkeys(rows, len(self._lengths))
            self._lengths.append(length)
            self._waiting.append(set(rows))
            self._kept.append(None)
        saved = sum((len(rows) - 1) * length for length, rows in zip(self._lengths, self._waiting, strict=True))
        self._total, self._read = sum(map(len, prompts)) - saved, 0

    def common(self, row: int) -> int:
        """How many tokens the row's prompt begins with that others begin with too."""
        return self._lengths[self._groups[row]] if row in self._groups else 0

    def kept(self, row: int) -> list[tuple[Tensor, Tensor]] | None:
        """Keys and values (kv_heads, T, D) of these tokens for every layer, once they are read."""
        return self._kept[self._groups[row]]

    def keep(self, row: int, parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        self._kept[self._groups[row]] = parts
        return parts

    def done(self, row: int) -> None:
        """The row's prompt is read; after the last row of a group its keys and values are let go."""
        if row in self._groups:
            group = self._groups[row]
            self._waiting[group].discard(row)
            if not self._waiting[group]:
                self._kept[group] = None

    def between(self, tokens: int, layers: int) -> Callable[[], bool]:
        """What is called between the layers that read so many tokens: tells the progress, returns `check`'s answer."""
        before = self._read
        self._read += tokens
        numbers = itertools.count()

        def call() -> bool:
            self._progress(min(1.0, (before + tokens * next(numbers) / layers) / self._total))
            return self._check()

        return call


def _alike(prompts: list[list[int]], adapters: list[str], shared: list[int]) -> Iterator[tuple[int, list[int]]]:
    """(length, rows) of prompts of one adapter that begin with so many tokens in common, as far as it is worth it."""
    order = sorted(range(len(prompts)), key=lambda row: (adapters[row], prompts[row]))
    groups: list[tuple[int, list[int]]] = []
    for row, other in itertools.pairwise(order):
        limit = min(len(prompts[row]), len(prompts[other])) - 1  # the last token is each prompt's own
        length = next((i for i in range(limit) if prompts[row][i] != prompts[other][i]), limit)
        if adapters[row] != adapters[other] or length - max(shared[row], shared[other]) < COMMON_TOKENS:
            continue
        if groups and groups[-1][1][-1] == row:
            groups[-1] = (min(groups[-1][0], length), [*groups[-1][1], other])
        else:
            groups.append((length, [row, other]))
    yield from groups


def _length(prefix: list[tuple[Tensor, Tensor]]) -> int:
    return prefix[0][0].shape[1] if prefix else 0


def _half_product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """x → x W^T + bias with W (out, in) in float16, if W is no other number there and FBGEMM is at hand."""
    if "fbgemm" not in torch.backends.quantized.supported_engines or weight.dtype not in (
        torch.bfloat16,
        torch.float16,
    ):
        return None
    if weight.abs().max().item() * HALF_SCALE > torch.finfo(torch.float16).max:
        return None
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float().mul_(HALF_SCALE), bias)
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x * (1 / HALF_SCALE), packed)


def _groups(lengths: list[int]) -> Iterator[list[int]]:
    """Rows in order, in groups of at most PREFILL_TOKENS tokens or a single row."""
    group, tokens = [], 0
    for row, length in enumerate(lengths):
        if group and tokens + length > PREFILL_TOKENS:
            yield group
            group, tokens = [], 0
        group.append(row)
        tokens += length
    if group:
        yield group
