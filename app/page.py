"""The page from top to bottom: head, tabs, foot, and what concerns all of them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path

import gradio as gr

from app import api, headline, render
from app.examples import Examples
from app.form import QUIET, Forms, Translated, markup
from app.queries import Refused
from app.service import OutlineService
from app.tabs import compare, paper, preferences, styles
from app.texts import COMMON
from app.words import UI_LANGUAGES, Say, Words
from tkpo.attributes import LANGUAGES

TABLES = (COMMON, headline.WORDS, compare.WORDS, styles.WORDS, preferences.WORDS, paper.WORDS)
PAPER_URL = "https://doi.org/10.18653/v1/2025.findings-acl.823"


def build(service: OutlineService, root: Path, examples: Examples) -> gr.Blocks:
    """The Blocks of the page; `service` may still be loading. root: the project's folder."""
    with gr.Blocks(
        analytics_enabled=False, delete_cache=(3600, 3600), title="TKPO: outlines in the style you ask for"
    ) as page:
        Page(service, root, examples).connect(page)
        api.publish(service)
    return page


def page_words(axes) -> Words:
    """All words of the page. axes: style → its axis."""
    return Words(TABLES, axes)


class Page:
    """Head, tabs and foot; `connect` joins what concerns them all: language, links, the first screen."""

    def __init__(self, service: OutlineService, root: Path, examples: Examples):
        self.service, self.root = service, root
        self.shown = shown = Translated(page_words(service.axes))
        first = examples.first("en")
        with gr.Row(elem_id="masthead"):
            self.title = markup(_title(shown.words.say("en")), elem_id="title")
            languages = [(name, code) for code, name in UI_LANGUAGES.items()]
            self.ui = gr.Radio(languages, value="en", elem_id="ui", container=False)
            shown.bind(self.ui, label="ui_language")
        tables = root / "paper" / "tables"
        shown.bind(gr.Markdown(elem_id="lead"), value=lambda say: headline.headline(say, tables))
        self.health = markup(elem_id="health")
        with gr.Tabs(elem_id="tabs") as self.tabs:
            self.compare = compare.CompareTab(shown, service, examples)
            self.styles = styles.StylesTab(shown, service, first)
            self.preferences = preferences.PreferencesTab(shown, service, first)
            self.paper = paper.PaperTab(shown, root)
        self.foot = shown.bind(markup(elem_id="foot"), value=self._foot)

    def connect(self, page: gr.Blocks) -> None:
        forms = Forms(self.compare.form, self.styles.form, self.preferences.form)
        forms.carry(self.ui)
        self.compare.connect(self.ui, forms, self.tabs, self.preferences)
        self.styles.connect(self.ui)
        self.preferences.connect(self.ui)
        self.paper.connect(self.ui)
        self._connect_language()
        self._connect_links(page, forms)
        page.load(self.loading, self.ui, self.health, **QUIET)

    def _connect_language(self) -> None:
        boards = [self.compare.out, self.styles.out]
        inputs = [self.ui, *(out.screen for out in boards), self.preferences.looked]
        translated = [
            self.title,
            *(c for out in boards for c in out.outputs[:2]),
            *self.preferences.outputs,
            self.paper.view,
        ]
        self.ui.change(self.translate, inputs, [*self.shown.components, *translated], **QUIET)

    def translate(self, ui: str, compared, styled, looked) -> list:
        """Every word of the page in another language; outlines that are being written go on."""
        parts = [self.compare.out.translate(compared, ui), self.styles.out.translate(styled, ui)]
        parts.append(self.preferences.translate(looked, ui))
        title = _title(self.shown.words.say(ui))
        return [*self.shown.updates(ui), title, *(value for part in parts for value in part), self.paper.page(ui)]

    def _connect_links(self, page: gr.Blocks, forms: Forms) -> None:
        """What a link's fragment says fills in the query, and then decides what the first screen shows."""
        asked = [*self.compare.query, self.compare.methods, self.ui]
        known = {
            "style": list(self.service.axes),
            "language": ["auto", *LANGUAGES],
            "methods": self.service.columns(),
            "ui": list(UI_LANGUAGES),
            "article": self.service.limits.article_chars,
            "strength": self.service.limits.strength,
        }
        read = page.load(None, gr.JSON(known, visible=False), asked, js="(known) => tkpo.read(known)", **QUIET)
        read.then(forms.copies, asked[:4], forms.others, **QUIET).then(
            self.compare.open, [self.ui, self.compare.out.screen, *asked[:2]], self.compare.out.outputs[:2], **QUIET
        )

    def loading(self, ui: str) -> Iterator[str]:
        """How far the model is, until it is there or could not be loaded."""
        service = self.service
        while service.state == "loading":
            yield render.loading(self.shown.words.say(ui), service.stage, time.monotonic() - service.began)
            time.sleep(1)
        yield render.refusal(Refused("broken").message(ui)) if service.error else ""

    def _foot(self, say: Say) -> str:
        """Where paper, code and citation are, and what the page's judgements are worth."""
        links = f'<a href="{PAPER_URL}" target="_blank" rel="noopener">{escape(say("link_paper"))}</a>'
        if code := code_url():
            links += f'<a href="{escape(code)}" target="_blank" rel="noopener">{escape(say("link_code"))}</a>'
        links += f'<a href="citation" target="_blank">{escape(say("link_citation"))}</a>'
        return f'<p>{escape(say("footer"))}</p><p class="links">{links}</p>'


def code_url() -> str | None:
    """Where the code that runs here can be read: TKPO_CODE_URL, or the Space's own files."""
    if space := os.environ.get("SPACE_ID"):
        return f"https://huggingface.co/spaces/{space}/tree/main"
    return os.environ.get("TKPO_CODE_URL")


def _title(say: Say) -> str:
    """The heading; its `lang` is what the page's script gives to the whole document."""
    done = escape(say("link_done"))
    return f'<h1 lang="{say.html_lang}" data-link-done="{done}"><b>TKPO</b> <span>{escape(say("title"))}</span></h1>'
