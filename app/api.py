"""The API: /compare, /styles and /preferences, with the page's checks; a refusal is the error's message."""

from __future__ import annotations

import time
from collections.abc import Iterator

import gradio as gr

from app.form import DEFAULT_LENGTH
from app.jobs import Update
from app.queries import Query
from app.service import OutlineService
from app.tabs.writing import STREAM_EVERY, visitor
from tkpo.errors import TKPOError


def publish(service: OutlineService) -> None:
    """Add the endpoints to the Blocks that are being built."""
    first_style = next(iter(service.axes))

    def compare(
        topic: str,
        request: gr.Request,
        article: str = "",
        style: str = first_style,
        language: str = "auto",
        temperature: float = 0.0,
        seed: int = 0,
        length: int = DEFAULT_LENGTH,
        methods: list[str] | None = None,
        style_strength: float = 0.0,
    ) -> dict:
        """Outlines of one topic or article in one style by several methods; yields them while they grow."""
        with _refusals():
            query = service.check(topic, article, style, language, temperature, seed, length, style_strength)
            yield from _outlines(service, service.compare(query, methods, visitor(request)))

    def styles(
        topic: str,
        request: gr.Request,
        article: str = "",
        method: str = "tkpo",
        language: str = "auto",
        temperature: float = 0.0,
        seed: int = 0,
        length: int = DEFAULT_LENGTH,
        style_strength: float = 0.0,
    ) -> dict:
        """Outlines of one topic or article by one method in every style; yields them while they grow."""
        with _refusals():
            query = service.check(topic, article, None, language, temperature, seed, length, style_strength)
            yield from _outlines(service, service.styles(query, method, visitor(request)))

    def preferences(
        topic: str,
        outline: str,
        request: gr.Request,
        article: str = "",
        style: str = first_style,
        method: str = "tkpo",
        language: str = "auto",
        seed: int = 0,
    ) -> dict:
        """Each token of an outline under the true and the flipped prompt, with its rejects and r."""
        with _refusals():
            query = service.check(topic, article, style, language, seed=seed)
            for update in service.read(service.preferences(query, outline, method, visitor(request))):
                yield {"state": update.state, "place": update.place, **(update.result or {})}

    for endpoint in (compare, styles, preferences):
        gr.api(endpoint, api_name=endpoint.__name__)


class _refusals:
    """What the library refuses becomes the client's error message."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, TKPOError):
            raise gr.Error(str(error), print_exception=False) from None


def _outlines(service: OutlineService, job) -> Iterator[dict]:
    for update in service.read(job):
        yield as_dict(update)
        time.sleep(STREAM_EVERY * (update.state == "writing"))


def as_dict(update: Update) -> dict:
    """An update as clients get it."""
    query: Query | None = update.query
    outlines = []
    for column in update.columns:
        verdict = column.verdict
        outlines.append(
            {
                "method": column.method,
                "style": column.style,
                "text": column.text,
                "headings": verdict and verdict.headings,
                "sub_headings": verdict and verdict.sub_headings,
                "words": verdict and verdict.words,
                "seconds": round(column.seconds, 3),
                "well_formed": verdict and verdict.well_formed,
                "level_as_asked": verdict and verdict.level,
                "repeats": verdict and verdict.repeats,
                "at_length_limit": column.at_limit,
                "reads_as": verdict and verdict.reads_as,
                "reads_as_probability": _rounded(verdict and verdict.probability),
                "style_log_odds": _rounded(verdict and verdict.log_odds),
            }
        )
    known = {"language": query.lang, "cut": query.cut} if query else {}
    return {"state": update.state, "place": update.place, "seconds": round(update.seconds, 3), **known} | {
        "outlines": outlines
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
