"""What tables and figures call things, and the published numbers beside which they stand."""

from tkpo import methods

LANGUAGES = {"en": "English", "zh": "Chinese"}
METHODS = {"base": "zero-shot"} | {
    name: methods.METHODS[name].label for name in ("sft", "simpo", "orpo", "dpo", "tkpo")
}
SCORES = {
    "rouge-1": "R-1",
    "rouge-2": "R-2",
    "rouge-l": "R-L",
    "bleu-4": "BLEU-4",
    "control_accuracy": "control",
    "structure_valid": "valid",
    "obeys_detail": "level",
}
SYMBOLS = {"preference_weight": "λ", "tau": "τ", "num_rejects": "K"}
MISSING = "†"

PUBLISHED_TIME = 0.5625  # TKPO's training time over DPO's, from the paper's abstract
# Read off the bars of the paper's framework figure, ± 0.3; memory in GiB over eight GPUs.
PUBLISHED_BARS = {
    "dpo": {"rouge-1": 37.5, "bleu-4": 24.9, "memory": 229.5},
    "tkpo": {"rouge-1": 43.4, "bleu-4": 30.3, "memory": 171.0},
}


def dataset_title(dataset: str) -> str:
    return dataset.replace("_", " ")


def row_name(method: str, label: str) -> str:
    """What a table calls a method, or a labelled grid's runs of it."""
    return METHODS[method] + (f", {label}" if label else "")
