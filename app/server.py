"""The page, its API and /health as a web server: headers, deadlines for slow clients, and the port."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import socket
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.examples import Examples
from app.page import build
from app.service import OutlineService
from app.theme import theme
from tkpo.errors import TKPOError

HERE = Path(__file__).parent
REQUEST_SECONDS = 20.0  # within which a client must have sent its whole request
DEAD_SECONDS = 20  # after which a peer that acknowledges nothing is given up
# What Gradio's template loads from other servers: a script for Spaces, and fonts.
FOREIGN = re.compile(rb"""<script\s[^>]*src="https://[^>]*>\s*</script>|<link\s[^>]*href="https://[^>]*>""")
SCRIPT = b'<script src="page.js"></script>'  # the page's own
INLINE = re.compile(rb"<script\b(?![^>]*\bsrc=)[^>]*>(.*?)</script>", re.S)


def application(service: OutlineService, root: Path, examples: Examples | None = None) -> FastAPI:
    """The page, its API, /health and /citation as an ASGI application. root: the project's folder."""
    page = build(service, root, examples or Examples([]))
    # The service has its own queue, which tells visitors their place; Gradio's only bounds the threads.
    page.queue(default_concurrency_limit=64, max_size=512, api_open=False)
    page.max_threads = 96
    # Gradio looks whether a file that a client names was uploaded only in a page that was "launched", not in a mounted
    # one: without this line the file fields would read any file of the machine.
    page.has_launched = True
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/health")
    def health() -> JSONResponse:
        state = {"state": service.state, "stage": service.stage, "waiting": service.waiting}
        return JSONResponse(state, status_code=503 if service.error else 200)

    @app.get("/citation")
    def citation() -> PlainTextResponse:
        return PlainTextResponse((root / "CITATION.cff").read_text(encoding="utf-8"))

    @app.get("/page.js")
    def script() -> FileResponse:
        return FileResponse(HERE / "page.js", media_type="text/javascript")

    for path in ("/openapi.json", "/gradio_api/openapi.json", "/monitoring", "/monitoring/{rest:path}"):
        app.add_api_route(path, lambda: JSONResponse({"detail": "Not Found"}, status_code=404))
    app.add_middleware(lambda inner: SafePage(service.streams.watch(inner), bool(os.environ.get("SPACE_ID"))))
    return gr.mount_gradio_app(
        app,
        page,
        "/",
        show_error=False,
        max_file_size="1mb",
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        app_kwargs={"openapi_url": None},
        theme=theme(),
        css=(HERE / "page.css").read_text(encoding="utf-8"),
    )


class SafePage:
    """ASGI middleware: security headers everywhere, and a page that asks no other server for anything.

    on_space: the page is shown in a frame of huggingface.co and keeps the script that fits the frame to it.
    """

    def __init__(self, app, on_space: bool = False):
        self.app, self.on_space = app, on_space

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: dict | None = None
        body = b""

        async def guarded(message):
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                if not _is_html(message):
                    await send({**message, "headers": [*_kept(message), *self._headers(b"")]})
                return
            if not _is_html(start):
                await send(message)
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                page = body if self.on_space else FOREIGN.sub(b"", body)
                page = page.replace(b"</head>", SCRIPT + b"</head>", 1)
                headers = [*_kept(start), (b"content-length", str(len(page)).encode()), *self._headers(page)]
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": page})

        await self.app(scope, receive, guarded)

    def _headers(self, page: bytes) -> list[tuple[bytes, bytes]]:
        """Scripts run from this server, and inline only those of `page`, by their hashes.

        'unsafe-eval' and inline styles stay: Gradio compiles the page's small event handlers in the browser, and
        Svelte sets styles.
        """
        hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in INLINE.findall(page))
        scripts = "".join(f" 'sha256-{value}'" for value in hashes)
        spaces = " https://huggingface.co https://*.hf.space" if self.on_space else ""
        resizer = " https://cdnjs.cloudflare.com" if self.on_space else ""
        policy = (
            f"default-src 'self'; script-src 'self' 'unsafe-eval'{resizer}{scripts}; style-src 'self' 'unsafe-inline'; "
            "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob:; worker-src 'self' blob:; "
            f"object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'{spaces}"
        )
        return [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"same-origin"),
        ]


def _kept(message: dict) -> list[tuple[bytes, bytes]]:
    ours = {b"content-security-policy", b"x-content-type-options", b"referrer-policy"}
    if _is_html(message):
        ours.add(b"content-length")
    return [(name, value) for name, value in message["headers"] if name.lower() not in ours]


def _is_html(message: dict) -> bool:
    return any(n.lower() == b"content-type" and v.startswith(b"text/html") for n, v in message["headers"])


class PromptRequests(H11Protocol):
    """HTTP/1.1 that closes a connection whose client does not finish its request in time; replies may take long."""

    deadline = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self._expect()

    def data_received(self, data):
        super().data_received(data)
        if self._is_served():
            self._forget()
        elif self.deadline is None:
            self._expect()

    def on_response_complete(self):
        super().on_response_complete()
        self._forget()

    def connection_lost(self, exc):
        self._forget()
        super().connection_lost(exc)

    def _is_served(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _expect(self):
        self.deadline = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _forget(self):
        if self.deadline:
            self.deadline.cancel()
            self.deadline = None

    def _give_up(self):
        self.deadline = None
        if not self._is_served() and not self.transport.is_closing():
            self.transport.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; TKPOError if the port cannot be had. port 0: any free one."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * DEAD_SECONDS)
        listening.bind(address)
        listening.listen(128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TKPOError(f"cannot listen on {host}:{port}: {reason}; choose another with --host and --port") from error
    return listening


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve until interrupted."""
    config = uvicorn.Config(
        app,
        http=PromptRequests,
        log_level="warning",
        timeout_graceful_shutdown=2,
        # A Space's visitors come through its proxy, whose word on their addresses is taken.
        forwarded_allow_ips="*" if os.environ.get("SPACE_ID") else None,
    )
    uvicorn.Server(config).run(sockets=[listening])
