"""Everything behind the page and none of the page: checks, the queue, and outlines of several adapters as a stream.

One worker thread owns the model. It loads it, then takes jobs in the order they came; whoever asked reads the
job's newest update and may leave at any time: a job nobody reads any more stops by itself.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from app.texts import text
from tkpo.attributes import LANGUAGES, Axis, detect_language, load_axes
from tkpo.data import load_records, make_record
from tkpo.errors import TKPOError
from tkpo.outline import length, parse

logger = logging.getLogger(__name__)

BASE = "base"
IDLE = 2.0  # seconds without a request after which the next style is read ahead
SPECIAL = re.compile(r"<\|([^|<>]{0,40})\|>")  # would be read as control tokens of the chat
NOT_TEXT = {"Cc", "Cs", "Cn", "Co"}  # Unicode categories: control, lone surrogate, unassigned, private
BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # could reorder the page's own words
HEADING = re.compile(r"\s*\d+(\.\d+)*[.、)]?\s*\S")


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for. Characters, tokens, seconds."""

    topic_chars: int = 200
    article_chars: int = 20_000
    article_tokens: int = 1024
    outline_chars: int = 6_000
    outline_tokens: int = 384
    waiting: int = 20
    patience: float = 20.0  # a job whose reader was silent for so long is stopped


class Refused(TKPOError):
    """A request that cannot be served; `key` and `values` name the message in `app.texts`, in either language."""

    def __init__(self, key: str, **values):
        self.key, self.values = key, values
        super().__init__(self.message("en"))

    def message(self, ui: str) -> str:
        return text(ui, f"refused_{self.key}", **self.values)


@dataclass(frozen=True)
class Query:
    """A checked request. axes: style → its axis; cut: what was left out of the article, or None."""

    topic: str
    article: str
    style: str
    axes: dict[str, Axis]
    lang: str
    temperature: float
    seed: int
    tokens: int
    cut: dict | None = None

    def record(self, style: str | None = None) -> dict:
        style = style or self.style
        return make_record(self.axes[style], style, self.topic, self.article or None, self.lang)


@dataclass
class Column:
    """One outline as far as it is written, and what is known about it. seconds: from the start to its last word."""

    method: str
    style: str
    text: str = ""
    seconds: float = 0.0
    headings: int = 0
    words: int = 0
    valid: bool = False
    at_limit: bool = False
    verdict: tuple[str, float] | None = None


@dataclass
class Update:
    """state: loading, waiting, writing, done or stopped. place: requests that are served before this one."""

    state: str
    place: int = 0
    stage: str = ""
    columns: list[Column] = field(default_factory=list)
    result: object = None
    seconds: float = 0.0
    query: Query | None = None


class Job:
    """One request: the worker publishes updates, the reader takes the newest one."""

    def __init__(self, work: Callable[[Job], Update], patience: float):
        self.work = work
        self.patience = patience
        self.stopped = threading.Event()
        self.changed = threading.Condition()
        self.update = Update("waiting")
        self.version = 0
        self.finished = False
        self.error: BaseException | None = None
        self.last_read = time.monotonic()

    def publish(self, update: Update, finished: bool = False) -> None:
        with self.changed:
            self.update, self.finished = update, finished
            self.version += 1
            self.changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self.changed:
            self.error, self.finished = error, True
            self.changed.notify_all()

    def newest(self, seen: int) -> tuple[BaseException | None, bool, Update, int]:
        """(error, finished, update, its version), as soon as there is one after version `seen`, or after a moment."""
        with self.changed:
            self.changed.wait_for(lambda: self.finished or self.version > seen, timeout=0.25)
            self.last_read = time.monotonic()
            return self.error, self.finished, self.update, self.version

    def should_stop(self) -> bool:
        return self.stopped.is_set() or time.monotonic() - self.last_read > self.patience


class OutlineService:
    """Outlines, styles and token preferences for many visitors of one model.

    model: preset, folder or hub id. adapters: "axis/method" (or "method", for all axes) → adapter folder.
    axes_file: YAML table of the axes whose styles are offered; default: the shipped one.
    `start` returns at once; requests made while the model loads wait for it.
    """

    def __init__(
        self,
        model: str,
        adapters: dict[str, Path],
        dtype="auto",
        device=None,
        limits: Limits | None = None,
        axes_file: str | Path | None = None,
    ):
        self.limits = limits or Limits()
        self.axes = style_axes(axes_file)
        self.generator = None
        self.stage, self.error = "starting", None
        self.began = time.monotonic()
        self.adapters = {name: str(folder) for name, folder in adapters.items()}
        self._model, self._dtype, self._device = model, dtype, device
        self._classifiers: dict[tuple[str, str], object] = {}
        self._classified = threading.Event()
        self._jobs: deque[Job] = deque()
        self._unread: deque[tuple[str, str]] = deque()  # (style, language): not yet read ahead
        self._lock = threading.Condition()
        self._current: Job | None = None

    # ---- what there is ----

    def methods(self, style: str | None = None) -> list[str]:
        """Methods with an adapter for a style (default: for any), in the order they were given; base is the last."""
        axes = {axis.name for axis in ([self.axes[style]] if style else self.axes.values())}
        names = [name.rpartition("/")[2] for name in self.adapters if "/" not in name or name.split("/")[0] in axes]
        return [*dict.fromkeys(names), BASE]

    def trained(self, style: str | None = None) -> list[str]:
        """`methods` without base, which stands alone where there is no other."""
        return self.methods(style)[:-1] or [BASE]

    def adapter(self, method: str, style: str) -> str:
        """Name of the adapter of `method` for the axis of `style`. Refused if there is none."""
        if method == BASE:
            return BASE
        for name in (f"{self.axes[style].name}/{method}", method):
            if name in self.adapters:
                return name
        raise Refused("method", method=str(method)[:60], known=", ".join(self.methods(style)))

    @property
    def ready(self) -> bool:
        return self.stage == "ready"

    @property
    def waiting(self) -> int:
        """Requests that are waiting or being served."""
        return len(self._jobs) + (self._current is not None)

    # ---- requests ----

    def check(self, topic="", article="", style=None, language="auto", temperature=0.0, seed=0, length=160) -> Query:
        """A Query from whatever a page or a client sent; Refused says what is wrong with it.

        No style is the first one.
        """
        style = next(iter(self.axes)) if style is None else style
        topic = " ".join(self._clean(topic, "topic").split())
        article = self._clean(article, "article").strip()
        if len(topic) > self.limits.topic_chars:
            raise Refused("topic_long", found=len(topic), limit=self.limits.topic_chars)
        if len(article) > self.limits.article_chars:
            raise Refused("article_long", found=len(article), limit=self.limits.article_chars)
        if not topic and not article:
            raise Refused("empty")
        if not topic:
            topic = " ".join(article.split("\n", 1)[0].split())[:80]
        self._known("style", style, self.axes)
        self._known("language", language, ("auto", *LANGUAGES))
        lang = detect_language(f"{topic} {article}") if language == "auto" else language
        self._known("language", lang, self.axes[style].phrases[style])
        temperature = self._number("temperature", temperature, 0, 2)
        seed = int(self._number("seed", seed, 0, 2**31 - 1, whole=True))
        tokens = int(self._number("length", length, 8, self.limits.outline_tokens, whole=True))
        return Query(topic, article, style, self.axes, lang, temperature, seed, tokens)

    def compare(self, query: Query, methods: list[str] | None = None) -> Job:
        """One style, several methods (default: all that have an adapter): updates carry one column a method."""
        return self._outlines(query, [(method, query.style) for method in methods or self.trained(query.style)])

    def styles(self, query: Query, method: str) -> Job:
        """One method, every style: updates carry one column a style."""
        return self._outlines(query, [(method, style) for style in self.axes])

    def preferences(self, query: Query, outline: object, method: str) -> Job:
        """The update's result is what `app.preferences.token_preferences` returns for this outline."""
        outline = self._clean(outline, "outline").strip()
        if not outline:
            raise Refused("no_outline")
        if len(outline) > self.limits.outline_chars:
            raise Refused("outline_long", found=len(outline), limit=self.limits.outline_chars)
        adapter = self.adapter(self._word("method", method), query.style)

        def work(job: Job) -> Update:
            from app.preferences import token_preferences

            began = time.monotonic()
            job.publish(Update("writing", query=query))
            cut = self._cut(query)
            limit = self.limits.outline_tokens
            result = token_preferences(
                self.generator, cut.record(), cut.axes[cut.style], outline, adapter, cut.seed, limit, job.should_stop
            )
            state = "done" if result else "stopped"
            return Update(state, result=result, seconds=time.monotonic() - began, query=cut)

        return self._submit(work)

    def read(self, job: Job) -> Iterator[Update]:
        """The job's updates, newest first come, until it is done; closing the iterator stops the job.

        Raises what the job failed with: Refused, or TKPOError.
        """
        seen, shown = -1, None
        try:
            while True:
                error, finished, update, version = job.newest(seen)
                fresh, seen = version > seen, version
                if error:
                    raise error
                if update.state == "waiting":
                    update = self._waiting_update(job)
                    fresh = update != shown
                if fresh:
                    shown = update
                    yield update
                if finished:
                    return
        finally:
            job.stopped.set()
            with self._lock:
                if job in self._jobs:
                    self._jobs.remove(job)

    def _waiting_update(self, job: Job) -> Update:
        with self._lock:
            place = self._jobs.index(job) + (self._current is not None) if job in self._jobs else 0
        if not self.ready:
            return Update("loading", place, self.stage)
        return Update("waiting", place)

    # ---- checks ----

    def _clean(self, value: object, name: str) -> str:
        """Text without control characters and chat tokens; Refused unless `value` is text."""
        if value is None:
            return ""
        if not isinstance(value, str):
            raise Refused("not_text", field=name, kind=type(value).__name__)
        if len(value) > 50 * self.limits.article_chars:  # not worth looking at
            raise Refused("article_long", found=len(value), limit=self.limits.article_chars)
        value = unicodedata.normalize("NFC", value.replace("\r\n", "\n").replace("\r", "\n"))
        value = "".join(c for c in value if c in "\n\t" or (unicodedata.category(c) not in NOT_TEXT and c not in BIDI))
        return SPECIAL.sub(lambda match: f"‹{match[1]}›", value)

    @staticmethod
    def _word(name: str, value: object) -> str:
        if not isinstance(value, str):
            raise Refused("not_text", field=name, kind=type(value).__name__)
        return value

    def _known(self, name: str, value: object, known) -> None:
        if self._word(name, value) not in known:
            raise Refused(name, **{name: value[:60]}, known=", ".join(known))

    @staticmethod
    def _number(name: str, value: object, low: float, high: float, whole: bool = False) -> float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not ok or not low <= value <= high or (whole and value != int(value)):
            raise Refused("number", field=name, found=str(value)[:40], low=low, high=high)
        return value

    def _cut(self, query: Query) -> Query:
        """The query with as much of its article as the token limit admits, and what was cut."""
        if not query.article:
            return query
        spans = self.generator.tokenizer(query.article, add_special_tokens=False, return_offsets_mapping=True)
        spans = spans["offset_mapping"]
        limit = self.limits.article_tokens
        if len(spans) <= limit:
            return query
        kept = query.article[: spans[limit - 1][1]]
        rest = query.article[len(kept) :].split()
        cut = {"tokens": len(spans), "limit": limit, "chars": len(kept), "rest": " ".join(rest)[:60]}
        return replace(query, article=kept, cut=cut)

    # ---- work ----

    def _outlines(self, query: Query, rows: list[tuple[str, str]]) -> Job:
        adapters = [self.adapter(self._word("method", method), style) for method, style in rows]

        def work(job: Job) -> Update:
            columns = [Column(method, style) for method, style in rows]
            began = time.monotonic()
            job.publish(Update("writing", columns=columns, query=query))
            cut = self._cut(query)
            stream = self.generator.stream(
                [cut.record(style) for _, style in rows],
                adapters,
                max_new_tokens=cut.tokens,
                temperature=cut.temperature,
                seed=cut.seed,
                should_stop=job.should_stop,
            )
            for texts in stream:  # Outlines: texts, with what is known of each
                seconds = time.monotonic() - began
                columns = [
                    column if column.text == written else replace(column, text=written, seconds=seconds)
                    for column, written in zip(columns, texts, strict=True)
                ]
                job.publish(Update("writing", columns=columns, seconds=seconds, query=cut))
            state = "stopped" if job.should_stop() else "done"
            for column, finished in zip(columns, texts.finished, strict=True):
                column.at_limit = state == "done" and not finished
            columns = [self._judge(column, cut) for column in columns]
            return Update(state, columns=columns, seconds=time.monotonic() - began, query=cut)

        return self._submit(work)

    def _judge(self, column: Column, query: Query) -> Column:
        """Counts, the format's check and the style classifier's verdict."""
        column = replace(column, words=length(column.text, query.lang))
        try:
            outline = parse(column.text)
            column.headings, column.valid = outline.n_headings + outline.n_sub_headings, True
        except ValueError:
            column.headings = sum(bool(HEADING.match(line)) for line in column.text.split("\n"))
        self._classified.wait(30)  # only the first visitor after a start may have to
        classifier = self._classifiers.get((self.axes[column.style].name, query.lang))
        if classifier and column.text:
            column.verdict = max(classifier.predict_proba(column.text).items(), key=lambda item: item[1])
        return column

    def _submit(self, work: Callable[[Job], Update]) -> Job:
        if self.error:
            raise Refused("broken", why=self.error)
        job = Job(work, self.limits.patience)
        with self._lock:
            place = len(self._jobs) + (self._current is not None)
            if place >= self.limits.waiting:
                raise Refused("busy", place=place + 1)
            self._jobs.append(job)
            self._lock.notify_all()
        return job

    def start(self) -> OutlineService:
        """Load the model and serve, in a thread of its own; returns self."""
        threading.Thread(target=self._fit_classifiers, name="classifiers", daemon=True).start()
        threading.Thread(target=self._serve, name="model", daemon=True).start()
        return self

    def _serve(self) -> None:
        try:
            self._load()
        except TKPOError as error:
            self.error = str(error)
        except Exception as error:
            logger.exception("the model could not be loaded")
            self.error = f"{type(error).__name__}: {error}"
        if self.error:
            logger.error("the model could not be loaded: %s", self.error)
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._jobs, timeout=IDLE if self._unread else None)
                job = self._current = self._jobs.popleft() if self._jobs else None
            if not job:
                self._read_ahead()
                continue
            try:
                if self.error:
                    raise Refused("broken", why=self.error)
                if job.should_stop():
                    job.publish(Update("stopped"), finished=True)
                else:
                    update = job.work(job)
                    with self._lock:
                        self._current = None  # before the reader hears of the end, so that places are right
                    job.publish(update, finished=True)
            except TKPOError as error:
                job.fail(error)
            except Exception:  # the visitor gets a sentence, the log the traceback, and the next visitor is served
                logger.exception("a request failed")
                job.fail(Refused("internal"))
            finally:
                with self._lock:
                    self._current = None

    def _load(self) -> None:
        from tkpo.generation import OutlineGenerator
        from tkpo.presets import resolve_model

        self.stage = "fetching"
        resolve_model(self._model)
        self.stage = "reading"
        generator = OutlineGenerator(self._model, self.adapters, self._dtype, self._device)
        self.generator = generator
        self.stage = "warming"
        self._unread.extend((style, lang) for style, axis in self.axes.items() for lang in axis.phrases[style])
        self._read_ahead()
        self.stage = "ready"
        logger.info("ready after %.1f s", time.monotonic() - self.began)

    def _read_ahead(self) -> None:
        """Have the beginning of one more style's and language's prompts read, which the generator then keeps."""
        style, lang = self._unread.popleft()
        try:
            record = self.check(topic="Salt", style=style, language=lang).record()
            adapters = [self.adapter(method, style) for method in self.trained(style)]
            self.generator.generate([record] * len(adapters), adapters, max_new_tokens=2)
        except Exception:  # nobody waits for it; a request will tell its visitor
            logger.exception("a style could not be read ahead")

    def _fit_classifiers(self) -> None:
        """From the training split's references, as in the evaluation; without the data set no verdict is given."""
        from tkpo.metrics import StyleClassifier

        for axis in dict.fromkeys(axis.name for axis in self.axes.values()):
            try:
                for lang in LANGUAGES:
                    records = load_records(axis, "train", lang, folder=Path(__file__).parent.parent / "data")
                    outlines = [r["output"] for r in records], [r["attribute"] for r in records]
                    self._classifiers[axis, lang] = StyleClassifier(lang).fit(*outlines)
            except TKPOError as error:
                logger.warning("no style verdicts for %s: %s", axis, error)
        self._classified.set()


def style_axes(axes_file: str | Path | None = None) -> dict[str, Axis]:
    """Style → its axis, in the table's order; a style that two axes have belongs to the first."""
    found: dict[str, Axis] = {}
    for axis in load_axes(axes_file).values():
        for style in axis.attributes:
            found.setdefault(style, axis)
    return found


def read_article(data: bytes, name: str) -> str:
    """The text of a dropped .txt or .md file in UTF-8, UTF-16 or GB 18030; Refused if it is none of these."""
    if not name.lower().endswith((".txt", ".md")):
        raise Refused("file_type", name=Path(name).name[:80])
    if len(data) > 200_000:
        raise Refused("file_large", name=Path(name).name[:80], found=len(data) // 1000)
    encodings = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        try:
            found = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        strange = sum(unicodedata.category(c) in NOT_TEXT and c not in "\r\n\t\f" for c in found)
        if not strange:
            if not found.strip():
                raise Refused("file_empty", name=Path(name).name[:80])
            return found.replace("\r\n", "\n").strip()
    raise Refused("file_binary", name=Path(name).name[:80])
