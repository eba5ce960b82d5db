"""What memory a full fine-tuning run will need, before it is started.

Model states (weights, gradients, Adam's moments) come from DeepSpeed's own estimators. The output head and loss
are counted: the real loss runs at the run's size on tensors that have shapes and no values, and every tensor that
lives at the same time is added up. Activations of the layers are not in it; with gradient checkpointing they are
small.
"""

from __future__ import annotations

import importlib.util
import weakref
from dataclasses import dataclass
from functools import cache

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from tkpo.errors import TKPOError
from tkpo.loss import CHUNK_SIZE, TokenTerms, fused_reject_tokens
from tkpo.presets import resolve_model

# Published shapes of the presets that come from the hub, so that nothing is downloaded for an estimate.
_QWEN2 = {"vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 32768}
SHAPES = {
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "qwen2.5-3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
}
HALF = torch.bfloat16


@dataclass
class Estimate:
    """Bytes that one method needs. On each GPU: states, reference (DPO's frozen copy), head; on each node: host."""

    states: float
    reference: float
    head: float
    host: float

    @property
    def gpu(self) -> float:
        return self.states + self.reference + self.head


@dataclass
class Model:
    parameters: int
    largest_layer: int
    vocabulary: int
    hidden: int


def describe(model: str) -> Model:
    """Sizes of a preset, folder or hub id; no weights are read."""
    if model in SHAPES:
        config = Qwen2Config(**_QWEN2, **SHAPES[model])
    else:
        config = AutoConfig.from_pretrained(resolve_model(model))
    if config.model_type != "qwen2":
        raise TKPOError(f"{model} is a {config.model_type} model, TKPO is written for qwen2")
    with torch.device("meta"):
        whole = Qwen2ForCausalLM(config)
    whole.tie_weights()
    layers = (sum(p.numel() for p in m.parameters(recurse=False)) for m in whole.modules())
    parameters = sum(p.numel() for p in whole.parameters())  # a tied weight is there once
    return Model(parameters, max(layers), config.vocab_size, config.hidden_size)


def estimate(
    model: Model,
    gpus: int = 8,
    nodes: int = 1,
    zero: int = 3,
    offload: bool = False,
    length: int = 4096,
    num_rejects: int = 20,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, Estimate]:
    """{"tkpo": …, "dpo": …} for full fine-tuning in 16 bit with float32 Adam, one sample (or pair) a GPU.

    gpus: on each of `nodes`. zero: 0, 2 or 3. offload: optimizer, and with ZeRO-3 parameters, in host memory.
    length: tokens of a sample, taken as all response. TKPOError for a combination that DeepSpeed has not.
    """
    if gpus < 1 or nodes < 1 or length < 1:
        raise TKPOError("--gpus, --nodes and --length must be at least 1")
    states, host = _states(model, gpus, nodes, zero, offload)
    copy = 2 * model.parameters
    on_host = zero == 3 and offload
    reference = 0 if on_host else copy / (gpus * nodes) if zero == 3 else copy
    heads = {
        "tkpo": _tkpo_head(length, model.hidden, model.vocabulary, num_rejects, chunk_size),
        "dpo": _dpo_head(2 * length, model.hidden, model.vocabulary),
    }
    return {
        "tkpo": Estimate(states, 0, heads["tkpo"], host),
        "dpo": Estimate(states, reference, heads["dpo"], host + (copy / nodes if on_host else 0)),
    }


def _states(model: Model, gpus: int, nodes: int, zero: int, offload: bool) -> tuple[float, float]:
    """(bytes on a GPU, bytes on a node's host) of the model states."""
    if importlib.util.find_spec("deepspeed") is None:
        raise TKPOError("an estimate needs DeepSpeed: bash install.sh deepspeed, or: pip install deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as three
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two

    if zero == 3:
        host, gpu, _ = three(
            model.parameters,
            model.largest_layer,
            num_gpus_per_node=gpus,
            num_nodes=nodes,
            cpu_offload=offload,
            cpu_offload_params=offload,
        )
    elif zero == 2:
        host, gpu = two(model.parameters, num_gpus_per_node=gpus, num_nodes=nodes, cpu_offload=offload)
    elif zero == 0 and not offload:
        gpu = 16 * model.parameters  # 2 weights, 2 gradients, 12 master weights and Adam's two moments
        host = 2 * model.parameters * gpus  # each process reads the weights
    else:
        raise TKPOError(
            f"ZeRO-{zero}{' with offload' if offload else ''} is not there: --zero 0, 2 or 3, offload with 2, 3"
        )
    return gpu, host


# ---- the output head, counted ----------------------------------------------------------------------------


def _tkpo_head(tokens: int, hidden: int, vocabulary: int, num_rejects: int, chunk_size: int) -> float:
    """The larger of its two parts, which follow each other."""
    # The draw depends on values, so that it runs, with a hidden size of 1; each further chunk adds the same.
    draws = [_draw(count * chunk_size, vocabulary, num_rejects, chunk_size) for count in (1, 2)]
    draw = draws[0] + (draws[1] - draws[0]) * (tokens / chunk_size - 1)
    return max(draw, _loss(tokens, hidden, vocabulary, num_rejects, chunk_size))


@cache
def _draw(tokens: int, vocabulary: int, num_rejects: int, chunk_size: int) -> int:
    states, weight = _inputs(tokens, 1, vocabulary, "cpu")
    with torch.no_grad(), _Peak() as peak:
        fused_reject_tokens(
            states.unsqueeze(0),
            torch.zeros(1, tokens, dtype=torch.long),
            weight,
            num_rejects,
            chunk_size=chunk_size,
        )
    return peak.bytes


def _loss(tokens: int, hidden: int, vocabulary: int, num_rejects: int, chunk_size: int) -> int:
    states, weight = _inputs(tokens, hidden, vocabulary, "meta")
    candidates = torch.zeros(tokens, 1 + num_rejects, dtype=torch.long, device="meta")
    with _Peak() as peak:
        # Of the whole loss only picking the response positions depends on values: a copy stands for it.
        cross_entropy, log_rewards, _ = TokenTerms.apply(states.clone(), weight, candidates, 0.15, chunk_size)
        (cross_entropy + log_rewards).sum().backward()
    return peak.bytes


def _dpo_head(tokens: int, hidden: int, vocabulary: int) -> int:
    """Log-probabilities as LLaMA-Factory's DPO has them: log-softmax in float32 of the logits of every position."""
    states, weight = _inputs(tokens, hidden, vocabulary, "meta")
    labels = torch.zeros(tokens, 1, dtype=torch.long, device="meta")
    with _Peak() as peak:
        (states @ weight.T).float().log_softmax(-1).gather(-1, labels).sum().backward()
    return peak.bytes


def _inputs(tokens: int, hidden: int, vocabulary: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (tokens, hidden) and the head's weight (vocabulary, hidden), all zero."""
    options = {"dtype": HALF, "device": device, "requires_grad": True}
    return torch.zeros(tokens, hidden, **options), torch.zeros(vocabulary, hidden, **options)


class _Peak(TorchDispatchMode):
    """Adds up the tensors that live at the same time, from those that are made while it is on."""

    def __init__(self):
        super().__init__()
        self.now = self.bytes = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage not in self.seen:
                    self.seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.bytes = max(self.bytes, self.now)
        return made

    def _freed(self, size: int) -> None:
        self.now -= size


def table(name: str, model: Model, found: dict[str, Estimate], about: str) -> str:
    """The estimate as text, in GiB."""
    rows = [
        ("weights, gradients, optimizer", "states"),
        ("frozen reference model", "reference"),
        ("output head and loss", "head"),
        ("together on each GPU", "gpu"),
        ("in each node's host memory", "host"),
    ]
    lines = [
        f"{name}: {model.parameters / 1e9:.2f} billion parameters, {about}",
        f"{'GiB':<32}" + "".join(f"{method.upper():>10}" for method in found),
    ]
    for title, key in rows:
        lines.append(f"{title:<32}" + "".join(f"{getattr(e, key) / 2**30:>10.2f}" for e in found.values()))
    return "\n".join([*lines, "Activations of the layers come on top; --gradient-checkpointing keeps them small."])
