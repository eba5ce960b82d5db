"""The fields that each tab has of its own: topic, article, style and how to write; and what they have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gradio as gr

from app import render
from app.examples import Example
from app.queries import Refused, read_article
from app.service import OutlineService
from app.words import UI_LANGUAGES, Say, Words
from tkpo.attributes import LANGUAGES

DEFAULT_LENGTH = 160
QUIET = {"show_progress": "hidden", "api_visibility": "private"}  # the page's own events are not the API
CARRIED = ("topic", "article", "style", "language")  # fields that go along from tab to tab


def markup(html: str = "", elem_id: str | None = None, script: str | None = None) -> gr.HTML:
    """A part of the page in HTML and CSS of its own. script: runs once it is shown, see `gr.HTML`'s js_on_load."""
    return gr.HTML(html, elem_id=elem_id, js_on_load=script, apply_default_css=False)


class Translated:
    """Which component shows which words, so that the page can change its language."""

    def __init__(self, words: Words):
        self.words = words
        self.components: list = []
        self._keys: list[dict] = []

    def bind(self, component, **keys: str | Callable[[Say], object]):
        """Give a component its words; keys: property → key of the words, or a function of `Say`. Returns it."""
        self.components.append(component)
        self._keys.append(keys)
        for name, value in self.values("en")[-1].items():
            setattr(component, name, value)
        return component

    def values(self, ui: str) -> list[dict]:
        """Property → words for each component, in their order."""
        say = self.words.say(ui)
        return [{n: key(say) if callable(key) else say(key) for n, key in keys.items()} for keys in self._keys]

    def updates(self, ui: str) -> list:
        return [gr.update(**values) for values in self.values(ui)]


class QueryForm:
    """Topic, article and what goes with them; each tab has one of its own.

    tab: begins its elements' ids. styles: whether one is chosen. with_sampling: also how outlines are written.
    first: the example that the fields start with.
    """

    def __init__(
        self,
        shown: Translated,
        service: OutlineService,
        tab: str,
        styles: bool = True,
        with_sampling: bool = True,
        first: Example | None = None,
    ):
        self.shown, self.tab, self.first = shown, tab, first
        with gr.Column(elem_classes="query"):
            topic = first.topic if first else ""
            self.topic = gr.Textbox(topic, max_lines=1, elem_id=f"{tab}-topic", autofocus=tab == "compare")
            shown.bind(self.topic, label="topic", placeholder="topic_hint")
            self.chips = gr.Row(elem_classes="examples", visible=tab == "compare")
            if styles:
                self.style = shown.bind(
                    gr.Radio(
                        [],
                        value=first.style if first else next(iter(service.axes)),
                        elem_id=f"{tab}-style",
                        elem_classes="styles",
                    ),
                    label="style",
                    choices=lambda say: [(say(f"style_{style}"), style) for style in service.axes],
                )
            with gr.Row(elem_classes="folds"):
                with shown.bind(gr.Accordion("…", open=False, elem_classes="fold"), label="article"):
                    self._article()
                with shown.bind(
                    gr.Accordion("…", open=False, elem_classes="fold"),
                    label="advanced" if with_sampling else "language",
                ):
                    self._options(service, with_sampling)

    def _article(self) -> None:
        article = self.first.article if self.first else ""
        self.article = gr.Textbox(article, lines=6, max_lines=12, elem_id=f"{self.tab}-article", show_label=False)
        self.shown.bind(self.article, label="article", placeholder="article_hint")
        self.file = gr.File(file_types=[".txt", ".md"], type="filepath", height=96, elem_id=f"{self.tab}-file")
        self.shown.bind(self.file, label="article_file")
        self.file_said = markup()

    def _options(self, service: OutlineService, with_sampling: bool) -> None:
        tab, bind = self.tab, self.shown.bind
        if with_sampling:
            self.strength = gr.Slider(0, service.limits.strength, value=0, step=0.25, elem_id=f"{tab}-strength")
            bind(self.strength, label="strength", info="strength_info")
        self.language = gr.Radio([], value="auto", elem_id=f"{tab}-language", elem_classes="inline")
        bind(self.language, label="language", choices=_language_choices)
        if with_sampling:
            self.length = gr.Slider(8, 384, value=DEFAULT_LENGTH, step=1, elem_id=f"{tab}-length")
            bind(self.length, label="length", info="length_info")
            self.temperature = gr.Slider(0, 2, value=0, step=0.05, elem_id=f"{tab}-temperature")
            bind(self.temperature, label="temperature", info="temperature_info")
            self.seed = gr.Number(value=0, precision=0, minimum=0, elem_id=f"{tab}-seed")
            bind(self.seed, label="seed", info="seed_info")

    @property
    def sampling(self) -> list:
        """Fields in the order in which `OutlineService.check` takes them after topic, article, style, language."""
        return [self.temperature, self.seed, self.length, self.strength]


class Forms:
    """The forms of all tabs: what is typed into one is in the others too."""

    def __init__(self, *forms: QueryForm):
        self.forms = forms
        self.fields = [getattr(form, name) for name in CARRIED for form in forms if hasattr(form, name)]

    def values(self, topic, article, style, language) -> list:
        """Values for `fields`."""
        given = dict(zip(CARRIED, (topic, article, style, language), strict=True))
        return [given[name] for name in CARRIED for form in self.forms if hasattr(form, name)]

    @property
    def others(self) -> list:
        """The fields of all forms but the first."""
        return [getattr(form, name) for name in CARRIED for form in self.forms[1:] if hasattr(form, name)]

    def copies(self, topic, article, style, language) -> list:
        """Values for `others`."""
        return Forms(*self.forms[1:]).values(topic, article, style, language)

    def carry(self, ui: gr.Radio) -> None:
        """Copy what a visitor enters to the other tabs, in the browser; a dropped file becomes the article of all."""
        for name in CARRIED:
            fields = [getattr(form, name) for form in self.forms if hasattr(form, name)]
            for field in fields:
                others = [other for other in fields if other is not field]
                copies = "x" if len(others) == 1 else f"[{', '.join('x' for _ in others)}]"
                field.input(None, field, others, js=f"(x) => {copies}", **QUIET)
        articles = [form.article for form in self.forms]
        for form in self.forms:
            form.file.upload(
                _read_file(form, len(articles)), [ui, form.file], [*articles, form.file, form.file_said], **QUIET
            )


def _read_file(form: QueryForm, articles: int) -> Callable:
    def read(ui: str, path: str | None) -> list:
        if not path:
            return [gr.skip()] * articles + [gr.skip(), ""]
        try:
            return [read_article(Path(path).read_bytes(), Path(path).name)] * articles + [None, ""]
        except Refused as error:
            return [gr.skip()] * articles + [None, render.refusal(error.message(ui))]

    return read


def _language_choices(say: Say) -> list[tuple[str, str]]:
    return [(say("language_auto"), "auto"), *((UI_LANGUAGES[lang], lang) for lang in LANGUAGES)]


def method_choices(service: OutlineService) -> Callable[[Say], list[tuple[str, str]]]:
    """Choices of a method field: every column that there is."""
    return lambda say: [(say.method(method), method) for method in service.columns()]
