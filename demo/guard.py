"""What reaches the page's server and what leaves it: known routes only, small requests, no paths of this machine.

gradio names uploaded files and results by their absolute path on the server. Here that folder has the name `CACHE` for
everybody outside, in both directions.
"""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CACHE = "/crossflow-files"
API = "/gradio_api"
ROUTES = re.compile(
    r"/|/(config|login|logout|theme\.css|robots\.txt|favicon\.ico|manifest\.json)/?|/(assets|static|svelte)/.*"
    rf"|{API}/(info|user|token|login_check|app_id|startup-events|theme\.css|upload|upload_progress|cancel|reset)/?"
    rf"|{API}/(queue/(join|data)|run/predict|heartbeat/\w+|call/\w+(/\w+)?|file=.*)"
)
"""Everything the page and gradio's clients need; gradio serves more, such as a proxy and its own monitoring."""
UPLOAD, LOGIN = f"{API}/upload", "/login"
TEXTS = (b"application/json", b"text/event-stream", b"text/html", b"text/plain")
HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; object-src 'none'; "
        b"base-uri 'self'; form-action 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
"""The browser itself refuses whatever lies on another host."""


class Guard:
    """ASGI middleware around gradio's routes.

    Args:
        cache: the folder of uploads and results.
        max_body: bytes of a request that is no upload.
        max_upload: bytes of one that is.
    """

    def __init__(self, app: App, cache: str, max_body: int, max_upload: int) -> None:
        self.app, self.cache, self.max_body, self.max_upload = app, cache.rstrip("/"), max_body, max_upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles a request, or refuses it with a sentence."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope["path"])
        if not ROUTES.fullmatch(path) or ("file=" in path and not is_public(path.partition("file=")[2])):
            await _refuse(send, 404, "There is nothing here.")
            return
        limit = self.max_upload if path.rstrip("/") == UPLOAD else self.max_body
        body = None
        if scope["method"] not in ("GET", "HEAD"):
            body = await _read(receive, limit)
            if body is None:
                await _refuse(send, 413, f"A request here may have {limit:,} bytes; send less.")
                return
            if limit == self.max_body and path.rstrip("/") != LOGIN:
                if problem := problem_of(body):
                    await _refuse(send, 422, problem)
                    return
                body = body.replace(CACHE.encode(), self.cache.encode())
        await self.app(self._inside(scope, body), receive if body is None else _once(body, receive), self._veiled(send))

    def _inside(self, scope: Scope, body: bytes | None) -> Scope:
        """The request with the cache under its own path."""
        if body is not None:
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        path = scope["path"].replace(f"file={CACHE}/", f"file={self.cache}/", 1)
        return scope if path == scope["path"] else {**scope, "path": path, "raw_path": quote(path).encode()}

    def _veiled(self, send: Send) -> Send:
        """Sends answers whose texts have the cache under its public name, with the headers of every answer."""
        start: Message = {}
        is_text = False

        async def veiled(message: Message) -> None:
            nonlocal is_text
            if message["type"] == "http.response.start":
                start.update(message)  # sent with the first part of the body, which says how long the answer is
                return
            if start:
                headers = [(name.lower(), value) for name, value in start["headers"]]
                is_text = any(name == b"content-type" and value.startswith(TEXTS) for name, value in headers)
            if is_text and message["type"] == "http.response.body":
                content = message.get("body", b"").replace(self.cache.encode(), CACHE.encode())
                message = {**message, "body": content}
            if start:
                if is_text:
                    headers = [header for header in headers if header[0] != b"content-length"]
                    if not message.get("more_body", False):
                        headers.append((b"content-length", str(len(message["body"])).encode()))
                await send({**start, "headers": [*headers, *HEADERS]})
                start.clear()
            await send(message)

        return veiled


def is_public(path: object) -> bool:
    """Whether a path names a file of the cache by its public name."""
    return isinstance(path, str) and path.startswith(f"{CACHE}/") and ".." not in path and "\0" not in path


def problem_of(body: bytes) -> str | None:
    """What is wrong with a request in JSON, in a sentence; None where nothing is.

    Files may be those of the cache alone: gradio would download a URL and decode a picture inside the request.
    """
    try:
        pending = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return "The request is not valid JSON."
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.get("path") is not None and not is_public(value["path"]):
                return "A file must be uploaded first; places on a server or elsewhere are not read."
            if str(value.get("url") or "").startswith("data:"):
                return "A picture must be uploaded as a file."
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return None


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The body of a request; None where it is longer than `limit` bytes."""
    content = bytearray()
    while True:
        message = await receive()
        content += message.get("body", b"")
        if len(content) > limit:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return bytes(content)


def _once(body: bytes, receive: Receive) -> Receive:
    """Receives a body that has been read, then what follows it."""
    parts = [body]

    async def again() -> Message:
        return {"type": "http.request", "body": parts.pop(), "more_body": False} if parts else await receive()

    return again


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"detail": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
