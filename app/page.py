"""The page, from top to bottom, and its API. What happens behind it is in `app.service`."""

import contextlib
import inspect
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from app import render
from app.offline import NoForeignScripts
from app.paper import paper_page
from app.service import Column, Job, OutlineService, Query, Refused, Update, read_article
from app.texts import UI_LANGUAGES, add_styles, text
from tkpo.attributes import LANGUAGES
from tkpo.errors import TKPOError

HERE = Path(__file__).parent
STREAM_EVERY = 0.1  # seconds between two updates of a page
DEFAULT_LENGTH = 160
# Topic, style, article: from the data sets' test split (CC BY 4.0), which no method was trained on.
EXAMPLES = (
    ("daily life in Longyearbyen during the polar night", "literary", None),
    ("how bank runs start and how they stop", "objective", None),
    ("rock-cut churches of Lalibela", "comprehensive", "lalibela.txt"),
    ("小津安二郎的镜头语言", "literary", None),
    ("海绵城市如何应对内涝", "objective", None),
    ("四川泡菜如何起一坛老盐水", "concise", "pickles.txt"),
)
HIDDEN = {"api_name": False}  # the page's own events are not the API


def build(service: OutlineService, root: Path) -> gr.Blocks:
    """The Blocks of the page; `service` may still be loading."""
    add_styles(service.axes)
    styles = list(service.axes)
    texts = Texts()
    jobs: dict[tuple[str, str], Job] = {}  # (session, tab) → what Stop stops

    methods = service.trained()
    first_board = [Column(m, styles[0]) for m in methods]
    first_styles = [Column(methods[-1], s) for s in styles]

    with gr.Blocks(**_page_options(gr.Blocks)) as page:
        # ---- head ----
        with gr.Row(elem_id="masthead"):
            title = gr.HTML(_title("en"), elem_id="title")
            ui = gr.Radio(
                [(name, code) for code, name in UI_LANGUAGES.items()], value="en", elem_id="ui", container=False
            )
            texts.bind(ui, label="ui_language")
        lead = gr.Markdown(text("en", "lead"), elem_id="lead")
        texts.bind(lead, value="lead")
        health = gr.HTML(elem_id="health")

        with gr.Tabs(elem_id="tabs") as tabs:
            # ---- compare methods ----
            with gr.Tab("…", id="compare") as tab:
                texts.bind(tab, label="tab_compare")
                ask = QueryForm(texts, "compare", styles)
                with gr.Row(elem_classes="go"):
                    run = gr.Button("…", variant="primary", elem_id="run")
                    stop = gr.Button("…", elem_id="stop", interactive=False)
                    link = gr.Button("…", elem_id="link", elem_classes="quiet")
                    texts.bind(run, value="run_compare")
                    texts.bind(stop, value="stop")
                    texts.bind(link, value="link")
                said = gr.HTML(elem_id="status")
                board = gr.HTML(render.board("en", first_board), elem_id="board")
                last = gr.State(None, time_to_live=3600)
                inspect_buttons = [
                    gr.Button(f"inspect {i}", elem_id=f"inspect-{i}", elem_classes="offstage")
                    for i in range(len(methods))
                ]

            # ---- compare styles ----
            with gr.Tab("…", id="styles") as tab:
                texts.bind(tab, label="tab_styles")
                s_ask = QueryForm(texts, "styles")
                s_method = gr.Radio([], value=methods[-1], elem_id="styles-method", elem_classes="inline")
                texts.bind(s_method, label="method", choices=lambda u: _method_choices(u, service))
                with gr.Row(elem_classes="go"):
                    s_run = gr.Button("…", variant="primary", elem_id="styles-run")
                    s_stop = gr.Button("…", elem_id="styles-stop", interactive=False)
                    texts.bind(s_run, value="run_styles")
                    texts.bind(s_stop, value="stop")
                s_said = gr.HTML(elem_id="styles-status")
                s_board = gr.HTML(render.board("en", first_styles, by="style"), elem_id="styles-board")
                s_last = gr.State(None, time_to_live=3600)

            # ---- token preferences ----
            with gr.Tab("…", id="preferences") as tab:
                texts.bind(tab, label="tab_preferences")
                p_lead = gr.Markdown(elem_classes="lead")
                texts.bind(p_lead, value="preferences_lead")
                p_ask = QueryForm(texts, "preferences", styles, with_sampling=False)
                p_outline = gr.Textbox(lines=6, max_lines=14, elem_id="preferences-outline")
                texts.bind(p_outline, label="outline", placeholder="outline_hint")
                p_method = gr.Radio([], value=methods[-1], elem_id="preferences-method", elem_classes="inline")
                texts.bind(p_method, label="method", choices=lambda u: _method_choices(u, service))
                with gr.Row(elem_classes="go"):
                    p_run = gr.Button("…", variant="primary", elem_id="preferences-run")
                    texts.bind(p_run, value="run_preferences")
                p_said = gr.HTML(elem_id="preferences-status")
                p_view = gr.HTML(render.tokens("en", None), elem_id="tokens")
                p_last = gr.State(None, time_to_live=3600)

            # ---- paper ----
            with gr.Tab("…", id="paper") as paper_tab:
                texts.bind(paper_tab, label="tab_paper")
                paper = gr.HTML(elem_id="paper")

        foot = gr.Markdown(elem_id="foot")
        texts.bind(foot, value="footer")

        # ---- what the buttons do ----

        def show(tab: str, u: str, job: Job, by: str, session: str) -> Iterator[tuple]:
            """Status and board of a run until it ends; the buttons say whether there is something to stop."""
            old = jobs.pop((session, tab), None)
            if old:
                old.stopped.set()
            jobs[session, tab] = job
            began = time.monotonic()
            try:
                for update in service.read(job):
                    running = update.state not in ("done", "stopped")
                    cells = gr.skip()
                    if update.columns:
                        cells = render.board(u, update.columns, update.state, update.query, by)
                    said = render.status(u, update, elapsed=time.monotonic() - began)
                    kept = gr.skip() if running else update
                    yield said, cells, gr.update(interactive=not running), gr.update(interactive=running), kept
                    if running:
                        time.sleep(STREAM_EVERY)
            finally:
                if jobs.get((session, tab)) is job:
                    del jobs[session, tab]

        def refuse(u: str, error: TKPOError) -> tuple:
            said = render.refusal(error.message(u) if isinstance(error, Refused) else str(error))
            return said, gr.skip(), gr.update(interactive=True), gr.update(interactive=False), gr.skip()

        def on_compare(u, topic, article, style, language, temperature, seed, length, request: gr.Request):
            try:
                query = service.check(topic, article, style, language, temperature, seed, length)
                yield from show("compare", u, service.compare(query), "method", request.session_hash)
            except TKPOError as error:
                yield refuse(u, error)

        def on_styles(u, topic, article, language, temperature, seed, length, method, request: gr.Request):
            try:
                query = service.check(topic, article, None, language, temperature, seed, length)
                yield from show("styles", u, service.styles(query, method), "style", request.session_hash)
            except TKPOError as error:
                yield refuse(u, error)

        def on_preferences(u, topic, article, style, language, outline, method, request: gr.Request):
            try:
                query = service.check(topic, article, style, language)
                job = service.preferences(query, outline, method)
                for update in service.read(job):
                    view = render.tokens(u, update.result) if update.result else gr.skip()
                    yield render.status(u, update, "state_reading"), view, update.result or gr.skip()
            except TKPOError as error:
                said = render.refusal(error.message(u) if isinstance(error, Refused) else str(error))
                yield said, gr.skip(), gr.skip()

        def on_stop(tab: str):
            def stop(request: gr.Request) -> None:
                job = jobs.get((request.session_hash, tab))
                if job:
                    job.stopped.set()

            return stop

        def on_inspect(place: int):
            def take_over(update: Update | None):
                if not update or place >= len(update.columns) or not update.query:
                    return [gr.skip()] * 7
                query, column = update.query, update.columns[place]
                values = (query.topic, query.article, query.style, query.lang, column.text, column.method)
                return [gr.Tabs(selected="preferences"), *values]

            return take_over

        run_outputs = [said, board, run, stop, last]
        ask_inputs = [ask.topic, ask.article, ask.style, ask.language, ask.temperature, ask.seed, ask.length]
        quiet = {"show_progress": "hidden", **HIDDEN}
        gr.on([run.click, ask.topic.submit], on_compare, [ui, *ask_inputs], run_outputs, **quiet)
        stop.click(on_stop("compare"), queue=False, **quiet)
        link.click(None, ask_inputs, None, js="(...query) => { tkpo.link(...query) }")

        s_inputs = [ui, s_ask.topic, s_ask.article, s_ask.language, s_ask.temperature, s_ask.seed, s_ask.length]
        s_outputs = [s_said, s_board, s_run, s_stop, s_last]
        gr.on([s_run.click, s_ask.topic.submit], on_styles, [*s_inputs, s_method], s_outputs, **quiet)
        s_stop.click(on_stop("styles"), queue=False, **quiet)

        p_inputs = [ui, p_ask.topic, p_ask.article, p_ask.style, p_ask.language, p_outline, p_method]
        p_outputs = [p_said, p_view, p_last]
        p_run.click(on_preferences, p_inputs, p_outputs, **quiet)
        taken = [tabs, p_ask.topic, p_ask.article, p_ask.style, p_ask.language, p_outline, p_method]
        for place, button in enumerate(inspect_buttons):
            button.click(on_inspect(place), last, taken, **quiet).then(on_preferences, p_inputs, p_outputs, **quiet)

        for form in (ask, s_ask, p_ask):
            form.file.upload(_read_file, [ui, form.file], [form.article, form.file, form.file_said], **quiet)

        paper_tab.select(lambda u: paper_page(u, root), ui, paper, **quiet)

        # ---- page language, loading, links ----

        def on_language(u, update: Update | None, s_update: Update | None, p_result: dict | None):
            boards = (
                render.board(u, update.columns, update.state, update.query)
                if update and update.columns
                else render.board(u, first_board),
                render.board(u, s_update.columns, s_update.state, s_update.query, "style")
                if s_update and s_update.columns
                else render.board(u, first_styles, by="style"),
                render.tokens(u, p_result),
            )
            return [*texts.updates(u), _title(u), *boards, paper_page(u, root), "", "", ""]

        translated = [*texts.components, title, board, s_board, p_view, paper, said, s_said, p_said]
        ui.change(on_language, [ui, last, s_last, p_last], translated, **quiet)

        def on_load(u: str) -> Iterator[str]:
            while not service.ready and not service.error:
                yield render.loading(u, service.stage, time.monotonic() - service.began)
                time.sleep(1)
            yield render.refusal(text(u, "refused_broken", why=service.error)) if service.error else ""

        link_read = gr.JSON([styles, ["auto", *LANGUAGES], service.limits.article_chars], visible=False)
        page.load(
            None,
            [*ask_inputs, ui, link_read],
            [*ask_inputs, ui],
            js="(...now) => tkpo.read(...now.slice(0, 8), ...now[8])",
        )
        page.load(on_load, ui, health, **quiet)

        _api(service)
    return page


class Texts:
    """Which component shows which words, so that the page can change its language."""

    def __init__(self):
        self.components: list = []
        self._keys: list[dict] = []

    def bind(self, component, **keys) -> None:
        """keys: property → key in `app.texts`, or a function of the page language."""
        self.components.append(component)
        self._keys.append(keys)
        for name, value in self.values("en")[-1].items():
            setattr(component, name, value)

    def values(self, ui: str) -> list[dict]:
        """Property → words for each component, in their order."""
        return [{n: key(ui) if callable(key) else text(ui, key) for n, key in keys.items()} for keys in self._keys]

    def updates(self, ui: str) -> list:
        return [gr.update(**values) for values in self.values(ui)]


class QueryForm:
    """Topic, article and what goes with them; each tab has one of its own. styles: to choose from, if any."""

    def __init__(self, texts: Texts, tab: str, styles: list[str] | None = None, with_sampling: bool = True):
        with gr.Column(elem_classes="query"):
            self.topic = gr.Textbox(max_lines=1, elem_id=f"{tab}-topic", autofocus=tab == "compare")
            texts.bind(self.topic, label="topic", placeholder="topic_hint")
            chips = _examples(texts, styles) if tab == "compare" else []
            if styles:
                self.style = gr.Radio([], value=styles[0], elem_id=f"{tab}-style", elem_classes="styles")
                texts.bind(
                    self.style,
                    label="style",
                    choices=lambda ui: [(text(ui, f"style_{style}"), style) for style in styles],
                )
            with gr.Row(elem_classes="folds"):
                with gr.Accordion("…", open=False, elem_classes="fold") as fold:
                    texts.bind(fold, label="article")
                    self.article = gr.Textbox(lines=6, max_lines=12, elem_id=f"{tab}-article", show_label=False)
                    texts.bind(self.article, label="article", placeholder="article_hint")
                    self.file = gr.File(file_types=[".txt", ".md"], type="filepath", height=96, elem_id=f"{tab}-file")
                    texts.bind(self.file, label="article_file")
                    self.file_said = gr.HTML()
                with gr.Accordion("…", open=False, elem_classes="fold", visible=with_sampling or bool(styles)) as fold:
                    texts.bind(fold, label="advanced" if with_sampling else "language")
                    self.language = gr.Radio([], value="auto", elem_id=f"{tab}-language", elem_classes="inline")
                    texts.bind(self.language, label="language", choices=_language_choices)
                    if with_sampling:
                        self.length = gr.Slider(8, 384, value=DEFAULT_LENGTH, step=1, elem_id=f"{tab}-length")
                        texts.bind(self.length, label="length", info="length_info")
                        self.temperature = gr.Slider(0, 2, value=0, step=0.05, elem_id=f"{tab}-temperature")
                        texts.bind(self.temperature, label="temperature", info="temperature_info")
                        self.seed = gr.Number(value=0, precision=0, minimum=0, elem_id=f"{tab}-seed")
                        texts.bind(self.seed, label="seed", info="seed_info")
        filled = [self.topic, self.style, self.article, self.language] if styles else []
        for button, values in chips:
            button.click(lambda values=values: values, None, filled, show_progress="hidden", **HIDDEN)


def _language_choices(ui: str) -> list[tuple[str, str]]:
    return [(text(ui, "language_auto"), "auto"), *((UI_LANGUAGES[lang], lang) for lang in LANGUAGES)]


def _method_choices(ui: str, service: OutlineService) -> list[tuple[str, str]]:
    return [(render.method_name(ui, method), method) for method in service.methods()]


def _title(ui: str) -> str:
    done = text(ui, "link_done")  # for the page's script
    return f'<h1 data-link-done="{done}"><b>TKPO</b> <span>{text(ui, "title")}</span></h1>'


def _examples(texts: Texts, styles: list[str]) -> list[tuple[gr.Button, tuple]]:
    """Buttons, and what each puts into topic, style, article and language."""
    chips = []
    with gr.Row(elem_classes="examples"):
        for topic, style, file in EXAMPLES:
            style = style if style in styles else styles[len(chips) % len(styles)]
            article = (HERE / "examples" / file).read_text(encoding="utf-8").strip() if file else ""
            button = gr.Button("…", size="sm", elem_classes="example")
            texts.bind(button, value=lambda ui, t=topic, s=style: f"{t} · {text(ui, f'name_{s}')}")
            chips.append((button, (topic, style, article, "auto")))
    return chips


def _read_file(ui: str, path: str | None):
    if not path:
        return gr.skip(), gr.skip(), ""
    try:
        return read_article(Path(path).read_bytes(), Path(path).name), None, ""
    except Refused as error:
        return gr.skip(), None, render.refusal(error.message(ui))


# ---- API -----------------------------------------------------------------------------------------------


def _api(service: OutlineService) -> None:
    """/compare, /styles and /preferences, with the page's checks; a refusal is the error's message."""
    first_style = next(iter(service.axes))

    def compare(
        topic: str,
        article: str = "",
        style: str = first_style,
        language: str = "auto",
        temperature: float = 0.0,
        seed: int = 0,
        length: int = DEFAULT_LENGTH,
    ) -> dict:
        """Outlines of one topic or article in one style by every method; yields them while they grow."""
        with _refusals():
            query = service.check(topic, article, style, language, temperature, seed, length)
            for update in service.read(service.compare(query)):
                yield _outlines(update)
                time.sleep(STREAM_EVERY * (update.state == "writing"))

    def styles(
        topic: str,
        article: str = "",
        method: str = "tkpo",
        language: str = "auto",
        temperature: float = 0.0,
        seed: int = 0,
        length: int = DEFAULT_LENGTH,
    ) -> dict:
        """Outlines of one topic or article by one method in every style; yields them while they grow."""
        with _refusals():
            query = service.check(topic, article, None, language, temperature, seed, length)
            for update in service.read(service.styles(query, method)):
                yield _outlines(update)
                time.sleep(STREAM_EVERY * (update.state == "writing"))

    def preferences(
        topic: str,
        outline: str,
        article: str = "",
        style: str = first_style,
        method: str = "tkpo",
        language: str = "auto",
        seed: int = 0,
    ) -> dict:
        """Each token of an outline under the true and the flipped prompt, with its rejects and r."""
        with _refusals():
            query = service.check(topic, article, style, language, seed=seed)
            for update in service.read(service.preferences(query, outline, method)):
                yield {"state": update.state, "place": update.place, **(update.result or {})}

    for endpoint in (compare, styles, preferences):
        gr.api(endpoint, api_name=endpoint.__name__)


class _refusals:
    """What the library refuses becomes the client's error message."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> None:
        if isinstance(error, TKPOError):
            raise gr.Error(str(error), print_exception=False) from None


def _outlines(update: Update) -> dict:
    query: Query | None = update.query
    outlines = [
        {
            "method": column.method,
            "style": column.style,
            "text": column.text,
            "headings": column.headings,
            "words": column.words,
            "seconds": round(column.seconds, 3),
            "well_formed": column.valid,
            "at_length_limit": column.at_limit,
            "reads_as": column.verdict and column.verdict[0],
            "reads_as_probability": column.verdict and round(column.verdict[1], 4),
        }
        for column in update.columns
    ]
    known = {"language": query.lang, "cut": query.cut} if query else {}
    return {"state": update.state, "place": update.place, "seconds": round(update.seconds, 3), **known} | {
        "outlines": outlines
    }


# ---- start ---------------------------------------------------------------------------------------------


def _page_options(function) -> dict:
    """Title, looks and script, as far as `function` takes them: Gradio 5 wants them in Blocks, Gradio 6 later."""
    sans = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Noto Sans CJK SC", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    theme = gr.themes.Base(
        primary_hue="teal", neutral_hue="stone", font=sans, font_mono=mono, radius_size="sm", text_size="md"
    )
    options = {
        "title": "TKPO: outlines in the style you ask for",
        "theme": theme,
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "head": f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>",
        "analytics_enabled": False,
        "delete_cache": (3600, 3600),
        "footer_links": [],
    }
    accepted = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in accepted}


def serve(service: OutlineService, root: Path, host: str, port: int) -> None:
    """Open the page at once and serve until interrupted; the model loads meanwhile. /health says how far it is."""
    uvicorn.run(application(service, root), host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)


def application(service: OutlineService, root: Path) -> FastAPI:
    """The page, its API and /health as an ASGI application."""
    page = build(service, root)
    # The service has its own queue, which tells visitors their place; Gradio's only bounds the threads.
    page.queue(default_concurrency_limit=64, max_size=512)
    page.max_threads = 96
    # Gradio looks whether a file that a client names was uploaded only in a page that was "launched", not in a mounted
    # one: without this line the file fields would read any file of the machine.
    page.has_launched = True
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> JSONResponse:
        state = {"state": "failed" if service.error else service.stage, "waiting": service.waiting}
        return JSONResponse(state, status_code=503 if service.error else 200)

    if not os.environ.get("SPACE_ID"):  # a Space embeds the page and needs the resizer's script
        app.add_middleware(NoForeignScripts)
    options = {"show_error": False, "max_file_size": "1mb", "ssr_mode": False}
    with contextlib.redirect_stdout(io.StringIO()):  # Gradio 5.50 prints a leftover of its own
        return gr.mount_gradio_app(app, page, "/", **options, **_page_options(gr.mount_gradio_app))
