"""Tab "Compare styles": one method, one column per style."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from app.form import QUIET, QueryForm, Translated, method_choices
from app.jobs import Column
from app.service import OutlineService
from app.tabs.writing import OutlineBoard, Screen, visitor

WORDS = {
    "en": {"tab_styles": "Compare styles", "run_styles": "Write every style"},
    "zh": {"tab_styles": "比较风格", "run_styles": "每种风格写一份"},
}


class StylesTab:
    """Components and handlers; `connect` joins them once all tabs are there."""

    def __init__(self, shown: Translated, service: OutlineService, first=None):
        self.service = service
        method = service.columns()[-1]
        with shown.bind(gr.Tab("…", id="styles"), label="tab_styles"):
            self.form = QueryForm(shown, service, "styles", styles=False, first=first)
            self.method = gr.Radio([], value=method, elem_id="styles-method", elem_classes="inline")
            shown.bind(self.method, label="method", choices=method_choices(service))
            self.out = OutlineBoard(shown, service, "styles", "style", [Column(method, s) for s in service.axes])

    def connect(self, ui: gr.Radio) -> None:
        form, out = self.form, self.out
        asked = [ui, out.screen, self.method, form.topic, form.article, form.language, *form.sampling]
        gr.on([out.run.click, form.topic.submit], self.write, asked, out.outputs, **QUIET)

    def write(self, request: gr.Request, ui, screen: Screen, method, topic, article, language, *sampling) -> Iterator:
        """An outline in every style by the chosen method."""

        def start():
            query = self.service.check(topic, article, None, language, *sampling)
            return self.service.styles(query, method, visitor(request))

        yield from self.out.follow(screen, ui, start)
