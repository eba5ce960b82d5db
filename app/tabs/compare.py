"""Tab "Compare methods": one style, one column per method."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from app.examples import Example, Examples
from app.form import QUIET, Forms, QueryForm, Translated, method_choices
from app.jobs import Column
from app.service import OutlineService
from app.tabs.writing import OutlineBoard, Screen, visitor
from app.words import Say

WORDS = {
    "en": {
        "tab_compare": "Compare methods",
        "methods": "Columns",
        "run_compare": "Write the outlines",
        "link": "Copy link to this query",
        "link_done": "Link copied",
        "with_article": "with article",
    },
    "zh": {
        "tab_compare": "比较方法",
        "methods": "列",
        "run_compare": "写提纲",
        "link": "复制此查询的链接",
        "link_done": "链接已复制",
        "with_article": "附文章",
    },
}


class CompareTab:
    """Components and handlers; `connect` joins them once all tabs are there."""

    def __init__(self, shown: Translated, service: OutlineService, examples: Examples):
        self.service, self.examples = service, examples
        methods = service.columns()
        first = examples.first("en")
        with shown.bind(gr.Tab("…", id="compare"), label="tab_compare"):
            self.form = QueryForm(shown, service, "compare", first=first)
            with self.form.chips:
                self.chips = [(self._chip(shown, example), example) for example in examples.all]
            self.methods = gr.CheckboxGroup([], value=methods, elem_id="methods", elem_classes="inline")
            shown.bind(self.methods, label="methods", choices=method_choices(service))
            empty = [Column(method, next(iter(service.axes))) for method in methods]
            stored = first and first.update(service.axes)
            self.out = OutlineBoard(shown, service, "compare", "method", empty, stored)
            with self.out.buttons:
                self.link = shown.bind(gr.Button("…", elem_id="link", elem_classes="quiet"), value="link")

    @staticmethod
    def _chip(shown: Translated, example: Example) -> gr.Button:
        def label(say: Say) -> str:
            more = f" · {say('with_article')}" if example.article else ""
            return f"{example.topic} · {say(f'name_{example.style}')}{more}"

        return shown.bind(gr.Button("…", size="sm", elem_classes="example"), value=label)

    @property
    def query(self) -> list:
        """The fields of a query, in the order of `OutlineService.check`; a link holds them."""
        form = self.form
        return [form.topic, form.article, form.style, form.language, *form.sampling]

    def connect(self, ui: gr.Radio, forms: Forms, tabs: gr.Tabs, preferences) -> None:
        """ui: the page's language. preferences: the tab that a column's tokens open in."""
        out = self.out
        asked = [ui, out.screen, self.methods, *self.query]
        gr.on([out.run.click, self.form.topic.submit], self.write, asked, out.outputs, **QUIET)
        self.link.click(None, [*self.query, self.methods], None, js="(...query) => { tkpo.link(...query) }")
        for chip, example in self.chips:
            outputs = [*forms.fields, *out.outputs[:2]]
            chip.click(self._open(example, forms), [ui, out.screen, self.methods], outputs, **QUIET)
        taken = [tabs, *forms.fields, preferences.outline, preferences.method]
        out.board.click(self._inspect(forms), out.screen, taken, **QUIET).then(
            preferences.compute, preferences.inputs(ui), preferences.outputs, **QUIET
        )

    def write(self, request: gr.Request, ui, screen: Screen, methods, *query) -> Iterator[tuple]:
        """Outlines by the chosen methods that have an adapter for the style."""

        def start():
            checked = self.service.check(*query)
            known = self.service.columns(checked.style)
            return self.service.compare(checked, [m for m in known if m in methods], visitor(request))

        yield from self.out.follow(screen, ui, start)

    def open(self, ui: str, screen: Screen, topic: str, article: str) -> list:
        """The first screen: the stored example, unless a link brought another query along or outlines are asked for."""
        if screen.job or screen.update:
            return [gr.skip(), gr.skip()]
        first = self.examples.first("en")
        stored = first and (first.topic, first.article) == (topic, article)
        return self.out.show(screen, ui, first.update(self.service.axes) if stored else None)

    def _open(self, example: Example, forms: Forms):
        def show(ui: str, screen: Screen, methods: list[str]) -> list:
            values = forms.values(example.topic, example.article, example.style, "auto")
            return [*values, *self.out.show(screen, ui, example.update(self.service.axes, methods or None))]

        return show

    @staticmethod
    def _inspect(forms: Forms):
        def take_over(screen: Screen, event: gr.EventData) -> list:
            update, place = screen.update, event.place
            if not update or not update.query or not 0 <= place < len(update.columns):
                return [gr.skip()] * (len(forms.fields) + 3)
            query, column = update.query, update.columns[place]
            fields = forms.values(query.topic, query.article, query.style, query.lang)
            return [gr.Tabs(selected="preferences"), *fields, column.text, column.method]

        return take_over
