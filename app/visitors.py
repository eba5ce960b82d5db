"""Who is there: which visitors read the stream of events that carries their outlines, and how much each asks for."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from urllib.parse import parse_qs

UNREAD = 5.0  # seconds after a request within which somebody must read its events
LEFT = 1.0  # seconds after its stream was closed; Gradio's page opens the next one at once
STREAM = re.compile(r"/gradio_api/(?:queue/data|call/(?:v2/)?[^/]+/(?P<event>[^/]+))/?")


@dataclass(frozen=True)
class Visitor:
    """session: of one open page, or one call of the API. address: where it comes from."""

    session: str
    address: str


class Streams:
    """Which sessions have their stream of events open; `watch` wraps the ASGI application that serves them."""

    def __init__(self, now=time.monotonic):
        self._now = now
        self._open: Counter[str] = Counter()
        self._closed: dict[str, float] = {}  # session → when its last stream was closed
        self._lock = threading.Lock()

    def opened(self, session: str) -> None:
        with self._lock:
            self._open[session] += 1

    def closed(self, session: str) -> None:
        with self._lock:
            self._open[session] -= 1
            if self._open[session] <= 0:
                del self._open[session]
            now = self._now()
            self._closed = {s: t for s, t in self._closed.items() if now - t < 60}
            self._closed[session] = now

    def is_gone(self, session: str, since: float) -> bool:
        """Whether nobody reads the events of a request that `session` made at `since` (monotonic seconds)."""
        with self._lock:
            if self._open[session]:
                return False
            closed = self._closed.get(session, 0.0)
        return self._now() > (closed + LEFT if closed >= since else since + UNREAD)

    def watch(self, app):
        """ASGI middleware that notes when a stream of events begins and when its reader is gone."""

        async def watched(scope, receive, send):
            session = _session(scope) if scope["type"] == "http" else None
            if session is None:
                await app(scope, receive, send)
                return
            self.opened(session)
            try:
                await app(scope, receive, send)
            finally:
                self.closed(session)

        return watched


def _session(scope) -> str | None:
    """The session whose events a request asks for, if it asks for any."""
    match = STREAM.fullmatch(scope["path"]) if scope["method"] == "GET" else None
    if not match:
        return None
    return match["event"] or parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]


class Allowance:
    """How many requests an address made in the last minute. Not safe for threads: its owner holds a lock."""

    def __init__(self, per_minute: int, now=time.monotonic):
        self.per_minute = per_minute
        self._now = now
        self._made: dict[str, deque[float]] = {}

    def wait(self, address: str) -> float:
        """Seconds until `address` may ask again; 0 notes a request made now."""
        if not self.per_minute:
            return 0.0
        now = self._now()
        self._made = {a: times for a, times in self._made.items() if now - times[-1] < 60}
        times = self._made.setdefault(address, deque(maxlen=self.per_minute))
        if len(times) == self.per_minute and now - times[0] < 60:
            return 60 - (now - times[0])
        times.append(now)
        return 0.0
