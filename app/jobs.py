"""One request from its place in the queue to its end: the worker publishes updates, the reader takes the newest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from app.queries import Query
from app.verdicts import Verdict
from app.visitors import Visitor


@dataclass
class Column:
    """One outline as far as it is written, and what is known about it. seconds: from the start to its last word."""

    method: str
    style: str
    text: str = ""
    seconds: float = 0.0
    at_limit: bool = False
    verdict: Verdict | None = None


@dataclass
class Update:
    """state: loading, waiting, reading, writing, done or stopped. place: requests that are served before this one.

    read: share (0 to 1) of the prompts that the model has read, while the state is "reading".
    stored: the columns were written earlier, by the same adapters.
    """

    state: str
    place: int = 0
    stage: str = ""
    columns: list[Column] = field(default_factory=list)
    result: object = None
    seconds: float = 0.0
    query: Query | None = None
    read: float = 0.0
    stored: bool = False

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "stopped")


class Job:
    """One request. work: what the worker calls, its return value is the last update.

    patience: seconds without a reader after which the job stops. visitor: who asked, if known; is_gone: whether
    nobody listens to that visitor's session any more.
    """

    def __init__(
        self,
        work: Callable[[Job], Update],
        patience: float,
        visitor: Visitor | None = None,
        is_gone: Callable[[], bool] = lambda: False,
    ):
        self.work = work
        self.patience = patience
        self.visitor = visitor
        self.stopped = threading.Event()
        self.changed = threading.Condition()
        self.update = Update("waiting")
        self.version = 0
        self.finished = False
        self.error: BaseException | None = None
        self.last_read = time.monotonic()
        self._is_gone = is_gone

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
        """Whether its visitor stopped it, left, or was silent for too long."""
        return self.stopped.is_set() or time.monotonic() - self.last_read > self.patience or self._is_gone()
