"""The page's first sentence: what to look for, and what TKPO costs and needs, with the numbers of Tables 2 and 3."""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import mean

from app.words import Say

WORDS = {
    "en": {
        "lead": "Type a topic or paste an article, choose a style, and look whether each outline *reads as that "
        "style*: "
        "the same small model, before training and after three kinds of it.",
        "cost": "**TKPO** needs no pairs of good and bad outlines: it flips the style word in the prompt and "
        "learns to "
        "prefer its own words over those that the *other* style would bring.",
        "time": "A training step took {time} % of DPO's time (Table 3).",
        "control": "Of the test outlines, {tkpo} % read as the style asked for; with DPO {dpo} %, with the base model "
        "{base} % (Table 2).",
    },
    "zh": {
        "lead": "输入主题或粘贴文章，选一种风格，看每份提纲*读来是不是那种风格*：同一个小模型，训练之前，和三种训"
        "练之后。",
        "cost": "**TKPO** 不需要成对的好坏提纲：它翻转提示里的风格词，让模型偏好自己的用词，而不是*另一种*风格会"
        "带来的词。",
        "time": "一步训练用时是 DPO 的 {time} %（表 3）。",
        "control": "测试提纲中有 {tkpo} % 读来是所要的风格；DPO 是 {dpo} %，基础模型是 {base} %（表 2）。",
    },
}


def headline(say: Say, tables: Path) -> str:
    """Markdown. tables: folder of the paper's tables; what they do not say is left out."""
    parts = [say("lead"), say("cost")]
    if (time := training_time(tables / "table3.csv")) is not None:
        parts.append(say("time", time=f"{100 * time:.0f}"))
    control = control_accuracy(tables / "table2.csv")
    if {"TKPO", "DPO", "zero-shot"} <= control.keys():
        numbers = {"tkpo": control["TKPO"], "dpo": control["DPO"], "base": control["zero-shot"]}
        parts.append(say("control", **{name: f"{value:.0f}" for name, value in numbers.items()}))
    return ("" if say.ui == "zh" else " ").join(parts)


def training_time(file: Path) -> float | None:
    """A step of TKPO as a share of DPO's: the mean of Table 3's machines; None if it does not say."""
    shares = [_number(row.get("× DPO")) for row in _rows(file) if row.get("method") == "TKPO"]
    shares = [share for share in shares if share is not None]
    return mean(shares) if shares else None


def control_accuracy(file: Path) -> dict[str, float]:
    """Method → per cent of its outlines that read as asked, averaged over Table 2's data sets and languages."""
    found: dict[str, list[float]] = {}
    for row in _rows(file):
        value = _number(row.get("control"))
        if value is not None:
            found.setdefault(row["method"], []).append(value)
    most = max(map(len, found.values()), default=0)
    return {method: mean(values) for method, values in found.items() if len(values) == most}


def _rows(file: Path) -> list[dict]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _number(cell: str | None) -> float | None:
    """The number that a cell begins with: "97.9 ± 1.8" → 97.9."""
    try:
        return float((cell or "").split()[0])
    except (ValueError, IndexError):
        return None
