"""Tab "Paper": the published numbers beside the tables and figures that `paper/reproduce.py` wrote."""

from __future__ import annotations

import base64
import csv
import io
import re
from html import escape
from pathlib import Path

import gradio as gr
from markdown_it import MarkdownIt

from app.form import QUIET, Translated, markup
from app.words import Say

COMMAND = "python paper/reproduce.py"
LARGEST = 3_000_000  # bytes of one figure that is put into the page

# From the abstract and the bars of the framework figure (± 0.3).
PUBLISHED = {"ROUGE-1": (37.5, 43.4), "BLEU-4": (24.9, 30.3), "published_memory": (229.5, 171.0)}
PUBLISHED_GAIN, PUBLISHED_TIME = 19.28, 56.25

WORDS = {
    "en": {
        "tab_paper": "Paper",
        "paper_lead": "What the paper reports, and what this implementation measured.",
        "published": "Published (abstract and framework figure)",
        "published_gain": "gain of TKPO over DPO, up to",
        "published_time": "TKPO's training time, in per cent of DPO's",
        "published_note": "Qwen2.5-3B-Instruct, full fine-tuning on eight V100 GPUs; read off the figure's bars "
        "(± 0.3). Our runs use a 0.5-billion-parameter model, LoRA and another corpus: compare directions, not "
        "levels.",
        "published_memory": "memory (GiB)",
        "paper_missing": "No tables or figures are here yet. This command computes them:",
        "tables": "Tables",
        "figures": "Figures",
        "about_figure1": "One test article in English (first) and one in Chinese, outlined in every style by each "
        "method; the styles of one article should differ, and the outlines should keep to the article.",
        "about_figure2": "DPO against TKPO. Left: quality on each data set, where higher bars are better. Right: "
        "memory "
        "and time of training relative to DPO, where lower bars are better; hatched bars are the published ones.",
        "about_figure3": "What TKPO's settings do: the temperature τ, the weight λ of the preference term, and "
        "the number "
        "of rejects K, each varied alone. Where the intervals overlap, the setting makes no difference that could be "
        "told apart from chance.",
        "about_figure4": "Quality over training time. Left: cross-entropy on validation outlines as training goes on. "
        "Right: where each method ends; DPO's time includes the SFT run that it starts from.",
        "about_table1": "The two data sets: how many samples each style has, and how long articles and outlines are.",
        "about_table2": "One row per method; higher is better in every column. The first rows of each block were "
        "written without the article: a method that is not above them says nothing of it. *Control* is the share of "
        "outlines that read as the style asked for, *level* the share that keep its level of detail; ± is over "
        "articles and training seeds.",
        "about_table3": "Time and memory of one training step. The columns with × divide by DPO's time: below 1 is "
        "cheaper than DPO.",
        "about_table4": "TKPO with one setting changed per row: compare each row with the first of its block.",
        "about_table5": "The same adapters on one kind of input or one style at a time, one score per row; higher is "
        "better.",
        "about_table6": "Whether outlines loop, repeat themselves, or hold numbers that the article has not; lower is "
        "better for loops, new numbers and count error. R-1 num. to BLEU-4 num. count the numbering as the paper does.",
        "about_table7": "Questions that were fixed before the runs, one score each. A row that ties says that the "
        "results cannot tell the two methods apart.",
    },
    "zh": {
        "tab_paper": "论文",
        "paper_lead": "论文报告的结果，和这个实现测得的结果。",
        "published": "论文数字（摘要与框架图）",
        "published_gain": "TKPO 相对 DPO 的提升，最高",
        "published_time": "TKPO 训练时间占 DPO 的百分比",
        "published_note": "Qwen2.5-3B-Instruct，八块 V100 上全参数微调；数字读自图中柱形（± 0.3）。"
        "我们用的是 5 亿参数模型、LoRA 和另一个语料：请比较方向，而不是数值。",
        "published_memory": "显存（GiB）",
        "paper_missing": "这里还没有表格和图。用这条命令计算：",
        "tables": "表格",
        "figures": "图",
        "about_figure1": "一篇英文（前）和一篇中文测试文章，各方法按每种风格写的提纲；同一文章的不同风格应有差别"
        "，而且不应离开文章。",
        "about_figure2": "DPO 与 TKPO。左：各数据集上的质量，越高越好。右：训练的显存和时间，以 DPO 为 1，越低越好；"
        "斜纹柱是论文的数字。",
        "about_figure3": "TKPO 各项设置的作用：温度 τ、偏好项权重 λ、拒绝词个数 K，每次只变一项。区间重叠处，"
        "差别与偶然无法区分。",
        "about_figure4": "质量与训练时间。左：训练中验证集提纲的交叉熵。右：各方法的终点；DPO 的时间包含它起步的 SFT。",
        "about_table1": "两个数据集：每种风格有多少样本，文章和提纲有多长。",
        "about_table2": "每行一个方法，各列都是越高越好。每块的前几行没有读过文章：不高于它们的方法等于什么也没说。"
        "*control* 是读来像所要风格的提纲的份额，*level* 是详略符合要求的份额；± 来自不同文章和训练种子。",
        "about_table3": "一步训练的时间和内存。带 × 的列是与 DPO 时间之比：小于 1 就比 DPO 省。",
        "about_table4": "每行改变 TKPO 的一项设置：请与各块的第一行比较。",
        "about_table5": "同样的适配器，每次只看一类输入或一种风格，每行一项分数，越高越好。",
        "about_table6": "提纲是否循环、重复，或含有文章里没有的数字；循环、新数字和条数误差越低越好。带 num. "
        "的分数与论文一样，把编号也算在内。",
        "about_table7": "运行之前定下的问题，每个只看一项分数。“ties” 表示结果分不出两个方法的高下。",
    },
}


class PaperTab:
    """Components of the tab; its content is made when somebody opens it. root: the project's folder."""

    def __init__(self, shown: Translated, root: Path):
        self.words, self.root = shown.words, root
        with shown.bind(gr.Tab("…", id="paper"), label="tab_paper") as self.tab:
            self.view = markup(elem_id="paper")

    def connect(self, ui: gr.Radio) -> None:
        self.tab.select(self.page, ui, self.view, **QUIET)

    def page(self, ui: str) -> str:
        return paper_page(self.words.say(ui), self.root)


def paper_page(say: Say, root: Path) -> str:
    """HTML of the tab. root: the project's folder; tables in paper/tables, figures in figures or paper/figures."""
    tables = files(root / "paper" / "tables", (".md", ".csv"))
    figures = [f for folder in ("figures", "paper/figures") for f in files(root / folder, (".png",))]
    parts = [f'<p class="lead">{escape(say("paper_lead"))}</p>', _published(say)]
    if not tables and not figures:
        missing = escape(say("paper_missing"))
        parts.append(f'<p class="note">{missing}</p><pre class="command">{COMMAND}</pre>')
    if figures:
        parts.append(f"<h2>{escape(say('figures'))}</h2>")
        parts += [_figure(say, f) for f in figures if f.stat().st_size <= LARGEST]
    if tables:
        parts.append(f"<h2>{escape(say('tables'))}</h2>")
        parts += [_table(say, f) for f in tables]
    return f'<div class="paper">{"".join(parts)}</div>'


def files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """One file per name, of the first ending that is there."""
    found: dict[str, Path] = {}
    for ending in endings:
        for path in sorted(folder.glob(f"*{ending}")):
            found.setdefault(path.stem, path)
    return [found[stem] for stem in sorted(found)]


def about(say: Say, path: Path) -> str:
    """HTML of the sentence that says how to read a figure or table; "" for one that the page does not know."""
    key = f"about_{path.stem.split('-')[0]}"
    return MarkdownIt("commonmark", {"html": False}).renderInline(say(key)) if key in say else ""


def _title(path: Path) -> str:
    """figure1-zh.png → Figure 1, 中文"""
    numbered = re.fullmatch(r"(figure|table)(\d+)(?:-(en|zh))?", path.stem)
    if not numbered:
        return path.stem.replace("_", " ").replace("-", " ").capitalize()
    kind, number, language = numbered.groups()
    return f"{kind.capitalize()} {number}" + {"en": ", English", "zh": ", 中文", None: ""}[language]


def _table(say: Say, path: Path) -> str:
    """A table under its title and how to read it; a long one is folded."""
    content = path.read_text(encoding="utf-8", errors="replace")
    title, is_open = _title(path), content.count("\n") <= 20
    if path.suffix == ".md":
        if content.startswith("**"):
            first, _, content = content.partition("\n")
            title = first.strip("* ")
        table = MarkdownIt("commonmark", {"html": False}).enable("table").render(content)
    else:
        head, *body = list(csv.reader(io.StringIO(content))) or [[]]
        lines = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in body)
        table = f"<table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{lines}</tbody></table>"
    fold, reading = " open" if is_open else "", about(say, path)
    reading = f'<p class="note reading">{reading}</p>' if reading else ""
    return f'<details{fold}><summary>{escape(title)}</summary>{reading}<div class="wide">{table}</div></details>'


def _cells(row: list[str], tag: str) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)


def _figure(say: Say, path: Path) -> str:
    data, title, caption = base64.b64encode(path.read_bytes()).decode(), escape(_title(path)), about(say, path)
    caption = f"<b>{title}.</b> {caption}" if caption else title
    return f'<figure><img alt="{title}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'


def _published(say: Say) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(say(name) if name in ("published_memory",) else name)}</th>'
        f"<td>{dpo:.1f}</td><td><b>{tkpo:.1f}</b></td><td>{100 * (tkpo / dpo - 1):+.1f} %</td></tr>"
        for name, (dpo, tkpo) in PUBLISHED.items()
    )
    facts = (
        f"<li><b>{PUBLISHED_GAIN} %</b> {escape(say('published_gain'))}</li>"
        f"<li><b>{PUBLISHED_TIME} %</b> {escape(say('published_time'))}</li>"
    )
    return (
        f'<section class="published"><h2>{escape(say("published"))}</h2><ul class="facts">{facts}</ul>'
        "<table><thead><tr><td></td><th>DPO</th><th>TKPO</th><th>Δ</th></tr></thead>"
        f'<tbody>{rows}</tbody></table><p class="note">{escape(say("published_note"))}</p></section>'
    )
