"""What tables and figures call things, and the published numbers beside which they stand."""

from tkpo import methods

LANGUAGES = {"en": "English", "zh": "Chinese"}
CONTENT_FREE = {
    "numbers_only": "numbers only",
    "random_outline": "random outline of the style",
    "constant_outline": "one constant outline",
}
ORDER = ("base", "sft", "simpo", "orpo", "dpo", "tkpo", "contrast")
METHODS = CONTENT_FREE | {name: "zero-shot" if name == "base" else methods.METHODS[name].label for name in ORDER}
SEEDLESS = ("base", *CONTENT_FREE)  # have no training whose seed could matter
# Table 2; text scores with numbers and indentation taken off.
SCORES = {
    "rouge1": "R-1",
    "rouge2": "R-2",
    "rougeL": "R-L",
    "bleu4": "BLEU-4",
    "control": "control",
    "log_odds": "log-odds",
    "level": "level",
    "valid": "valid",
}
# Table 6.
STRUCTURE = {
    "loop": "loops",
    "distinct2": "distinct-2",
    "unsupported_number": "new numbers",
    "heading_count_error": "count error",
    "sub_headings": "sub-headings",
    "rouge1_numbered": "R-1 num.",
    "rougeL_numbered": "R-L num.",
    "bleu4_numbered": "BLEU-4 num.",
}
SYMBOLS = {"preference_weight": "λ", "tau": "τ", "num_rejects": "K"}
MISSING = "†"

PUBLISHED_TIME = 0.5625  # TKPO's training time over DPO's, from the paper's abstract
# Read off the bars of the paper's framework figure, ± 0.3; memory in GiB over eight GPUs. Numbering counted.
PUBLISHED_BARS = {
    "dpo": {"rouge1": 37.5, "bleu4": 24.9, "memory": 229.5},
    "tkpo": {"rouge1": 43.4, "bleu4": 30.3, "memory": 171.0},
}


def dataset_title(dataset: str) -> str:
    """Of one data set, or of several that were trained on together."""
    return "all styles" if "," in dataset else dataset.replace("_", " ")


def row_name(method: str, label: str) -> str:
    """What a table calls a method, or a labelled grid's runs of it."""
    return METHODS[method] + (f", {label}" if label else "")
