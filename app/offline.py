"""The page asks no other server for anything: Gradio's template names a script and fonts elsewhere, taken out here."""

from __future__ import annotations

import re

FOREIGN = re.compile(rb"""<script\s[^>]*src="https://[^>]*>\s*</script>|<link\s[^>]*href="https://[^>]*>""")


class NoForeignScripts:
    """ASGI middleware: leaves out tags of HTML answers that load from another server."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        start: dict | None = None
        body = b""

        async def collect(message):
            nonlocal start, body
            if message["type"] == "http.response.start":
                start = message
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                kept = FOREIGN.sub(b"", body)
                headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
                headers.append((b"content-length", str(len(kept)).encode()))
                await send({**start, "headers": headers})
                await send({"type": "http.response.body", "body": kept})

        await self.app(scope, receive, collect)
