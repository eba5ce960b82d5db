"""TKPO: token-level preference self-alignment optimization for multi-style outline generation."""

import importlib

__version__ = "0.2.0"

# Public name → module, imported when first used: `import tkpo` alone stays quick.
_EXPORTS = {
    "preference_loss": "loss",
    "draw_reject_tokens": "loss",
    "tkpo_loss": "loss",
    "fused_reject_tokens": "loss",
    "TKPOSettings": "settings",
    "TKPOQwen2ForCausalLM": "modeling_qwen2",
    "patch_qwen2": "modeling_qwen2",
    "PromptFlipper": "flip",
    "TKPOConfig": "training",
    "TKPOTrainer": "training",
    "RunConfig": "run_config",
    "run": "runs",
    "OutlineGenerator": "generation",
    "make_record": "data",
    "get_axis": "attributes",
    "load_model": "presets",
    "load_tokenizer": "presets",
    "TKPOError": "errors",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"tkpo.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'tkpo' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_EXPORTS})
