"""The names under which Qwen2 trains with TKPO; the patch itself, for any causal LM, is `tkpo.causal_lm`."""

from __future__ import annotations

from collections.abc import Callable

from transformers import Qwen2ForCausalLM

from tkpo.causal_lm import TKPOOutput, patch
from tkpo.settings import TKPOSettings

__all__ = ["TKPOOutput", "TKPOQwen2ForCausalLM", "TKPOSettings", "patch_qwen2"]


class TKPOQwen2ForCausalLM:
    """Makes a Qwen2ForCausalLM that trains with TKPO once `model.tkpo` is set; it stays a Qwen2ForCausalLM."""

    def __new__(cls, config, settings: TKPOSettings | None = None) -> Qwen2ForCausalLM:
        model = Qwen2ForCausalLM(config)
        patch(model, settings)
        return model

    @classmethod
    def from_pretrained(cls, *args, settings: TKPOSettings | None = None, **kwargs) -> Qwen2ForCausalLM:
        """`Qwen2ForCausalLM.from_pretrained`, patched."""
        model = Qwen2ForCausalLM.from_pretrained(*args, **kwargs)
        patch(model, settings)
        return model


def patch_qwen2(settings: TKPOSettings) -> Callable[[], None]:
    """`patch` for every Qwen2ForCausalLM of this process; returns the function that undoes it."""
    return patch(Qwen2ForCausalLM, settings)
