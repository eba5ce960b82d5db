"""Tab "Token preferences": what the loss sees of each token of an outline."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from app import render
from app.examples import Example
from app.form import QUIET, QueryForm, Translated, markup, method_choices
from app.queries import reason
from app.service import OutlineService
from app.tabs.writing import visitor
from app.tokens import tokens
from tkpo.errors import TKPOError

WORDS = {
    "en": {
        "tab_preferences": "Token preferences",
        "preferences_lead": "Training with TKPO looks at every token of an outline twice: under the **true** prompt, "
        "and under the same prompt with the style word **flipped**. Tokens that the true style makes likelier are "
        "blue, tokens that the flipped style would rather have are orange. The loss then draws reject tokens from "
        "the flipped prompt and asks the outline's own token to beat them: *r* near 1 means it does.",
        "run_preferences": "Show token preferences",
        "outline": "Outline to look at",
        "outline_hint": "1. A heading\n2. Another heading",
        "true_prompt": "true prompt ({style})",
        "flipped_prompt": "flipped prompt ({style})",
        "likelier": "likelier under “{style}”",
        "mean_reward": "mean r",
        "mean_reward_explained": "r is the share of the outline's own token in a softmax over it and its reject "
        "tokens, averaged over all tokens: 1 where it beats every reject by far.",
        "preference_term": "preference loss",
        "preference_term_explained": "−ln of the mean r: the part that TKPO adds to the cross-entropy, 0 at best.",
        "cross_entropy": "cross-entropy",
        "cross_entropy_explained": "Mean −ln of the probability of the outline's own tokens under the true prompt, "
        "in nats per token: what plain fine-tuning (SFT) lowers.",
        "accuracy": "beats every reject",
        "accuracy_explained": "Share of the tokens that are likelier under the true prompt than each of their rejects.",
        "choose_token": "Choose a token: click it, or use the arrow keys.",
        "token_number": "token {number} of {count}",
        "rejects": "The {shown} likeliest of {drawn} reject tokens drawn from the flipped prompt",
        "reward_help": "{baseline} would be a tie with all {count} rejects",
        "end_token": "end of the outline",
        "preferences_cut": "The last {cut} tokens were left out.",
        "empty_preferences": "Each token of the outline will be coloured here.",
    },
    "zh": {
        "tab_preferences": "词元偏好",
        "preferences_lead": "TKPO 训练时把提纲的每个词元看两遍：一遍在**原**提示下，一遍在风格词被**翻转**的提示下。"
        "原风格下更可能的词元是蓝色，翻转风格更想要的词元是橙色。损失函数从翻转提示中抽取拒绝词，"
        "要求提纲自己的词元胜过它们：*r* 接近 1 就是胜了。",
        "run_preferences": "显示词元偏好",
        "outline": "要看的提纲",
        "outline_hint": "1. 一个标题\n2. 另一个标题",
        "true_prompt": "原提示（{style}）",
        "flipped_prompt": "翻转提示（{style}）",
        "likelier": "“{style}”下更可能",
        "mean_reward": "平均 r",
        "mean_reward_explained": "r 是提纲自己的词元在它与拒绝词的 softmax 中所占的份额，对所有词元取平均；远胜全"
        "部拒绝词时为 1。",
        "preference_term": "偏好损失",
        "preference_term_explained": "平均 r 的 −ln：TKPO 在交叉熵之外增加的一项，最好为 0。",
        "cross_entropy": "交叉熵",
        "cross_entropy_explained": "原提示下提纲自己词元概率的 −ln 的平均，单位是每词元奈特；普通微调（SFT）降低"
        "的就是它。",
        "accuracy": "胜过全部拒绝词",
        "accuracy_explained": "在原提示下比每个拒绝词都更可能的词元所占的份额。",
        "choose_token": "选一个词元：点击，或用方向键。",
        "token_number": "第 {number} 个词元，共 {count} 个",
        "rejects": "从翻转提示抽取的 {drawn} 个拒绝词中最可能的 {shown} 个",
        "reward_help": "{baseline} 表示与 {count} 个拒绝词打平",
        "end_token": "提纲结束",
        "preferences_cut": "最后 {cut} 个词元没有计算。",
        "empty_preferences": "提纲的每个词元会在这里着色。",
    },
}


class Looked:
    """What one visitor's tab shows: the result of the last look, the language of its outline, the page's language."""

    def __init__(self, result: dict | None = None, lang: str | None = None, stored: bool = False):
        self.ui = "en"
        self.result, self.lang, self.stored = result, lang, stored


class PreferencesTab:
    """Components and handlers; `connect` joins them once all tabs are there."""

    def __init__(self, shown: Translated, service: OutlineService, first: Example | None = None):
        self.words, self.service = shown.words, service
        method = service.columns()[-1]
        start = Looked(first.preferences, first.lang, True) if first and first.preferences else Looked()
        with shown.bind(gr.Tab("…", id="preferences"), label="tab_preferences"):
            shown.bind(gr.Markdown(elem_classes="lead"), value="preferences_lead")
            self.form = QueryForm(shown, service, "preferences", with_sampling=False, first=first)
            outline = first.outline if start.result else ""
            self.outline = gr.Textbox(value=outline, lines=6, max_lines=14, elem_id="preferences-outline")
            shown.bind(self.outline, label="outline", placeholder="outline_hint")
            chosen = first.inspected if start.result else method
            self.method = gr.Radio([], value=chosen, elem_id="preferences-method", elem_classes="inline")
            shown.bind(self.method, label="method", choices=method_choices(service))
            with gr.Row(elem_classes="go"):
                self.run = gr.Button("…", variant="primary", elem_id="preferences-run")
                shown.bind(self.run, value="run_preferences")
            self.said = markup(self._said(start), elem_id="preferences-status")
            self.view = markup(tokens(self.words.say("en"), start.result, start.lang), elem_id="tokens")
            self.looked = gr.State(start, time_to_live=3600)
        self.outputs = [self.said, self.view]

    def inputs(self, ui: gr.Radio) -> list:
        form = self.form
        return [ui, self.looked, self.outline, self.method, form.topic, form.article, form.style, form.language]

    def connect(self, ui: gr.Radio) -> None:
        self.run.click(self.compute, self.inputs(ui), self.outputs, **QUIET)

    def compute(self, request: gr.Request, ui, looked: Looked, outline, method, *query) -> Iterator[tuple]:
        """Both prompts over the outline, token by token."""
        looked.ui = ui
        try:
            checked = self.service.check(*query)
            job = self.service.preferences(checked, outline, method, visitor(request))
            for update in self.service.read(job):
                say, view = self.words.say(looked.ui), gr.skip()
                if update.result:
                    looked.result, looked.lang, looked.stored = update.result, checked.lang, False
                    view = tokens(say, update.result, checked.lang)
                yield render.status(say, update, "state_computing"), view
        except TKPOError as error:
            yield render.refusal(reason(error, looked.ui)), gr.skip()

    def translate(self, looked: Looked, ui: str) -> list:
        """Status and tokens in another language."""
        looked.ui = ui
        return [self._said(looked), tokens(self.words.say(ui), looked.result, looked.lang)]

    def _said(self, looked: Looked) -> str:
        return render.stored(self.words.say(looked.ui)) if looked.result and looked.stored else ""
