"""What the two tabs that write outlines have in common: buttons, status line, board, and how they follow a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import gradio as gr

from app import render
from app.form import QUIET, Translated, markup
from app.jobs import Column, Job, Update
from app.queries import reason
from app.service import OutlineService
from app.visitors import Visitor
from tkpo.errors import TKPOError

STREAM_EVERY = 0.1  # seconds between two updates of a page
# A column's button tells the server which column it stands in.
INSPECT = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-inspect]");
  if (button) trigger("click", { place: Number(button.dataset.inspect) });
});"""


class Screen:
    """What one visitor's tab shows: its job if one runs, its newest update, and the page's language."""

    def __init__(self):
        self.ui = "en"
        self.job: Job | None = None
        self.update: Update | None = None

    def stop(self) -> None:
        if self.job:
            self.job.stopped.set()


class OutlineBoard:
    """Run and Stop, a status line, and columns of outlines.

    tab: begins its elements' ids. by: what tells columns apart, "method" or "style". empty: the columns before
    anything is written. first: what is shown at the start, if there is something.
    """

    def __init__(
        self,
        shown: Translated,
        service: OutlineService,
        tab: str,
        by: str,
        empty: list[Column],
        first: Update | None = None,
    ):
        self.words, self.service, self.by = shown.words, service, by
        self.empty = Update("empty", columns=empty)
        prefix = "" if tab == "compare" else f"{tab}-"
        say = self.words.say("en")
        with gr.Row(elem_classes="go") as self.buttons:
            self.run = shown.bind(gr.Button("…", variant="primary", elem_id=f"{prefix}run"), value=f"run_{tab}")
            self.halt = shown.bind(gr.Button("…", elem_id=f"{prefix}stop", interactive=False), value="stop")
        self.said = markup(render.status(say, first) if first else "", elem_id=f"{prefix}status")
        self.board = markup(
            render.board(say, first or self.empty, by),
            elem_id=f"{prefix}board",
            script=INSPECT if by == "method" else None,
        )
        self.screen = gr.State(Screen(), time_to_live=3600, delete_callback=Screen.stop)
        self.outputs = [self.said, self.board, self.run, self.halt]
        self.halt.click(Screen.stop, self.screen, queue=False, **QUIET)

    def follow(self, screen: Screen, ui: str, start: Callable[[], Job]) -> Iterator[tuple]:
        """Values of `outputs` from the moment a visitor asks until the outlines are written.

        start: submits the job, or refuses with TKPOError. The words are those of the page's language at each moment.
        """
        screen.ui = ui
        screen.stop()
        try:
            screen.job = job = start()
            screen.update = None
            yield from self._steps(screen, job)
        except TKPOError as error:
            yield (
                render.refusal(reason(error, screen.ui)),
                gr.skip(),
                gr.update(interactive=True),
                gr.update(interactive=False),
            )

    def _steps(self, screen: Screen, job: Job) -> Iterator[tuple]:
        shown = None
        try:
            for update in self.service.read(job, pulse=True):
                if shown == (update, screen.ui):
                    continue
                shown, say = (update, screen.ui), self.words.say(screen.ui)
                screen.update = update if update.columns else screen.update
                if update.is_over and screen.job is job:
                    screen.job = None
                cells = render.board(say, update, self.by) if update.columns else gr.skip()
                buttons = gr.update(interactive=update.is_over), gr.update(interactive=not update.is_over)
                yield render.status(say, update), cells, *buttons
                if update.state == "writing":
                    time.sleep(STREAM_EVERY)
        finally:
            if screen.job is job:
                screen.job = None

    def show(self, screen: Screen, ui: str, update: Update | None) -> list:
        """Status and board for an update that no job made, None for the empty board; a running job is stopped."""
        screen.stop()
        screen.ui, screen.update = ui, update
        say = self.words.say(ui)
        return [render.status(say, update) if update else "", render.board(say, update or self.empty, self.by)]

    def translate(self, screen: Screen, ui: str) -> list:
        """Status and board in another language; a job that runs goes on in it by itself."""
        screen.ui = ui
        if screen.job:
            return [gr.skip(), gr.skip()]
        say, update = self.words.say(ui), screen.update
        return [render.status(say, update) if update else "", render.board(say, update or self.empty, self.by)]


def visitor(request: gr.Request) -> Visitor:
    """Who sent a request."""
    return Visitor(request.session_hash or "", request.client.host if request.client else "")
