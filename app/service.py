"""Everything behind the page and none of the page: the queue, and outlines of several adapters as a stream.

One worker thread owns the model. It loads it, then takes jobs in the order they came; whoever asked reads the job's
newest update and may leave at any time: a job that nobody reads any more is dropped, whether it waits or runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from app.jobs import Column, Job, Update
from app.queries import Limits, Query, Refused, check_query, check_text, clean, cut_article, style_axes
from app.verdicts import Judge
from app.visitors import Allowance, Streams, Visitor
from tkpo.errors import TKPOError

logger = logging.getLogger(__name__)

BASE = "base"
DATA = Path(__file__).parent.parent / "data"
IDLE = 2.0  # seconds without a request after which the next style is read ahead
SWEEP = 0.25  # seconds between two looks for jobs whose visitor has left
JUDGE_SECONDS = 30.0  # that a finished outline waits for its verdict at most
RETRY = 10.0  # seconds after a failed load before a request may start the next one


class OutlineService:
    """Outlines, styles and token preferences for many visitors of one model.

    model: preset, folder or hub id. adapters: "axis/method" (or "method", for all axes) → adapter folder.
    axes_file: YAML table of the axes whose styles are offered; default: the shipped one.
    `start` returns at once; requests made while the model loads wait for it. `streams` must watch the ASGI
    application of visitors who are named in requests.
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
        self.stage, self.error = "starting", None  # error: for the log, not for visitors
        self.began = time.monotonic()
        self.model = model
        self.adapters = {name: str(folder) for name, folder in adapters.items()}
        self.judge = Judge(self.axes, DATA)
        self.streams = Streams()
        self._dtype, self._device, self._axes_file = dtype, device, axes_file
        self.to_load = True  # a load is due: at the start, and when somebody asks after one that failed
        self._failed = 0.0
        self._jobs: deque[Job] = deque()
        self._unread: deque[tuple[str, str]] = deque()  # (style, language): not yet read ahead
        self._lock = threading.Condition()
        self._current: Job | None = None
        self._allowance = Allowance(self.limits.per_minute)

    # ---- what there is ----

    def methods(self, style: str | None = None) -> list[str]:
        """Methods with an adapter for a style (default: for any), in the order they were given; base is the last."""
        axes = {axis.name for axis in ([self.axes[style]] if style else self.axes.values())}
        names = [name.rpartition("/")[2] for name in self.adapters if "/" not in name or name.split("/")[0] in axes]
        return [*dict.fromkeys(names), BASE]

    def trained(self, style: str | None = None) -> list[str]:
        """`methods` without base, which stands alone where there is no other."""
        return self.methods(style)[:-1] or [BASE]

    def columns(self, style: str | None = None) -> list[str]:
        """`methods` in the order of the page's columns: what every method starts from is the first."""
        return [BASE, *self.methods(style)[:-1]]

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
    def state(self) -> str:
        """loading, ready or failed."""
        return "failed" if self.error else "ready" if self.ready else "loading"

    @property
    def waiting(self) -> int:
        """Requests that are waiting or being served."""
        return len(self._jobs) + (self._current is not None)

    # ---- requests ----

    def check(
        self, topic="", article="", style=None, language="auto", temperature=0.0, seed=0, length=160, strength=0.0
    ):
        """`check_query` with this service's limits and styles."""
        return check_query(self.limits, self.axes, topic, article, style, language, temperature, seed, length, strength)

    def compare(self, query: Query, methods: list[str] | None = None, visitor: Visitor | None = None) -> Job:
        """One style, several methods (default: all that have an adapter): updates carry one column per method."""
        if methods is not None and (not isinstance(methods, (list, tuple)) or not methods):
            raise Refused("no_method", known=", ".join(self.methods(query.style)))
        names = dict.fromkeys(check_text("method", m) for m in methods) if methods else self.trained(query.style)
        return self._outlines(query, [(name, query.style) for name in names], visitor)

    def styles(self, query: Query, method: str, visitor: Visitor | None = None) -> Job:
        """One method, every style: updates carry one column per style."""
        return self._outlines(query, [(method, style) for style in self.axes], visitor)

    def preferences(self, query: Query, outline: object, method: str, visitor: Visitor | None = None) -> Job:
        """The update's result is what `app.preferences.token_preferences` returns for this outline."""
        outline = clean(outline, "outline", self.limits).strip()
        if not outline:
            raise Refused("no_outline")
        if len(outline) > self.limits.outline_chars:
            raise Refused("outline_long", found=len(outline), limit=self.limits.outline_chars)
        adapter = self.adapter(check_text("method", method), query.style)

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

        return self._submit(work, visitor)

    def read(self, job: Job, pulse: bool = False) -> Iterator[Update]:
        """The job's updates, newest first come, until it is done; closing the iterator stops the job.

        pulse: yield the newest update again every quarter of a second in which nothing happened.
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
                if fresh or pulse:
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
            return Update("loading", place, self.stage, seconds=int(time.monotonic() - self.began))
        return Update("waiting", place)

    def _cut(self, query: Query) -> Query:
        return cut_article(query, self.generator.tokenizer, self.limits.article_tokens)

    # ---- work ----

    def _outlines(self, query: Query, rows: list[tuple[str, str]], visitor: Visitor | None) -> Job:
        adapters = [self.adapter(check_text("method", method), style) for method, style in rows]

        def work(job: Job) -> Update:
            columns = [Column(method, style) for method, style in rows]
            began = time.monotonic()
            job.publish(Update("reading", columns=columns, query=query))
            cut = self._cut(query)
            stream = self.generator.stream(
                [cut.record(style) for _, style in rows],
                adapters,
                max_new_tokens=cut.tokens,
                temperature=cut.temperature,
                seed=cut.seed,
                style_strength=cut.strength,
                should_stop=job.should_stop,
                reading=True,
            )
            finished = [False] * len(rows)
            for texts in stream:  # Outlines: texts, with what is known of each
                seconds = time.monotonic() - began
                if texts.read < 1:
                    job.publish(Update("reading", columns=columns, seconds=seconds, query=cut, read=texts.read))
                    continue
                columns = [
                    column if column.text == written else replace(column, text=written, seconds=seconds)
                    for column, written in zip(columns, texts, strict=True)
                ]
                finished = texts.finished
                job.publish(Update("writing", columns=columns, seconds=seconds, query=cut))
            state = "stopped" if job.should_stop() else "done"
            self._await_judge(job)
            columns = [
                replace(
                    column,
                    at_limit=state == "done" and not ended,
                    verdict=self.judge.judge(column.text, column.style, cut.lang, cut.article),
                )
                for column, ended in zip(columns, finished, strict=True)
            ]
            return Update(state, columns=columns, seconds=time.monotonic() - began, query=cut)

        return self._submit(work, visitor)

    def _await_judge(self, job: Job) -> None:
        """Until outlines can be judged, or nobody waits for it: only the first visitor after a start may have to."""
        end = time.monotonic() + JUDGE_SECONDS
        while not self.judge.ready.wait(0.1) and time.monotonic() < end and not job.should_stop():
            pass

    def _submit(self, work: Callable[[Job], Update], visitor: Visitor | None) -> Job:
        began = time.monotonic()
        is_gone = (lambda: self.streams.is_gone(visitor.session, began)) if visitor else (lambda: False)
        job = Job(work, self.limits.patience, visitor, is_gone)
        with self._lock:
            if self.error and time.monotonic() - self._failed < RETRY:
                raise Refused("broken")
            self._drop_abandoned()
            if visitor:
                self._check_share(visitor)
            place = self.waiting
            if place >= self.limits.waiting:
                raise Refused("busy", place=place + 1)
            if self.error:
                self.error, self.stage, self.began, self.to_load = None, "starting", time.monotonic(), True
            self._jobs.append(job)
            self._lock.notify_all()
        return job

    def _check_share(self, visitor: Visitor) -> None:
        """Refused if the visitor has as many jobs, or made as many requests, as one may."""
        limit = self.limits.jobs_per_visitor
        running = [job.visitor for job in (*self._jobs, self._current) if job and job.visitor and not job.should_stop()]
        for mine in ([v.session == visitor.session for v in running], [v.address == visitor.address for v in running]):
            if limit and sum(mine) >= limit:
                raise Refused("too_many", limit=limit)
        if seconds := self._allowance.wait(visitor.address):
            raise Refused("too_often", limit=self.limits.per_minute, seconds=int(seconds) + 1)

    def _drop_abandoned(self) -> None:
        """Take jobs that nobody waits for out of the queue; the lock is held."""
        for job in [job for job in self._jobs if job.should_stop()]:
            self._jobs.remove(job)
            job.publish(Update("stopped"), finished=True)

    # ---- threads ----

    def start(self) -> OutlineService:
        """Load the model and serve, in threads of its own; returns self."""
        self.judge.start()
        threading.Thread(target=self._serve, name="model", daemon=True).start()
        threading.Thread(target=self._sweep, name="sweep", daemon=True).start()
        return self

    def _sweep(self) -> None:
        while True:
            time.sleep(SWEEP)
            with self._lock:
                self._drop_abandoned()

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._jobs or self.to_load, timeout=IDLE if self._unread else None)
            if self.to_load:
                self._try_to_load()
            with self._lock:
                job = self._current = self._jobs.popleft() if self._jobs else None
            try:
                if job:
                    self._do(job)
                elif self._unread:
                    self._read_ahead()
            finally:
                with self._lock:
                    self._current = None

    def _do(self, job: Job) -> None:
        try:
            if self.error:
                raise Refused("broken")
            if job.should_stop():
                job.publish(Update("stopped"), finished=True)
                return
            update = job.work(job)
            with self._lock:
                self._current = None  # before the reader hears of the end, so that places are right
            job.publish(update, finished=True)
        except TKPOError as error:
            job.fail(error)
        except Exception:  # the visitor gets a sentence, the log the traceback, and the next visitor is served
            logger.exception("a request failed")
            job.fail(Refused("internal"))

    def _try_to_load(self) -> None:
        """Load; where that fails, `error` says why, which the log has and visitors are not told."""
        error, self.to_load = None, False
        try:
            self._load()
        except TKPOError as failure:
            error = str(failure)
        except Exception as failure:
            logger.exception("the model could not be loaded")
            error = f"{type(failure).__name__}: {failure}"
        if error:
            logger.error("the model could not be loaded: %s", error)
            with self._lock:
                self.error, self._failed = error, time.monotonic()

    def _load(self) -> None:
        from tkpo.generation import OutlineGenerator
        from tkpo.presets import resolve_model

        self.stage = "fetching"
        resolve_model(self.model)
        self.stage = "reading"
        self.generator = OutlineGenerator(
            self.model, self.adapters, self._dtype, self._device, axes_file=self._axes_file
        )
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
            adapters = [self.adapter(method, style) for method in self.columns(style)]
            self.generator.generate([record] * len(adapters), adapters, max_new_tokens=2)
        except Exception:  # nobody waits for it; a request will tell its visitor
            logger.exception("a style could not be read ahead")
