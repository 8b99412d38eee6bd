"""Same-origin middleware of `make serve`: accepts requests of the server's own pages, and refuses those a browser sends for other pages."""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CHANGES = ("POST", "PUT", "PATCH", "DELETE")
HEADERS = {  # of every response
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class SameOrigin:
    """ASGI middleware: 403 for what another origin's page sends, 415 for a body that is not `application/json`; WebSockets too.

    `Origin` and `Sec-Fetch-Site` are set by the browser, not by the page (https://www.w3.org/TR/fetch-metadata/). A request with neither comes from a
    program that no page controls. `origins` ("https://dev2pro.example.com") count as our own, besides the one that `Host` names:
    hosts are checked before this.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str] = ()) -> None:
        self.app, self.origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forwards the request, or responds with 403 or 415."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif self._is_foreign(scope):
            await _answer(403, "This request comes from a page of another origin.")(scope, receive, send)
        elif _has_other_body(scope):
            await _answer(415, "A body must have the content type application/json.")(scope, receive, send)
        else:
            await self.app(scope, receive, _with_security_headers(send))

    def _is_foreign(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        if (origin := headers.get("origin")) is not None:
            return origin not in self.origins and urlsplit(origin).netloc != headers.get("host")
        if headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
            return False
        return not _opens_the_ui(scope, headers)


def _opens_the_ui(scope: Scope, headers: Headers) -> bool:
    """Whether this is a navigation to the UI, by a link; the page with the link can neither read nor frame it."""
    follows = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return scope["type"] == "http" and scope["method"] == "GET" and follows and not scope["path"].startswith("/api")


def _has_other_body(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] not in CHANGES:
        return False
    headers = Headers(scope=scope)
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    return has_body and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json"


def _answer(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"exception_message": f"{reason} See docs/exposing.md."}, status, HEADERS)


def _with_security_headers(send: Send) -> Send:
    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return with_headers
