"""The same-origin middleware alone; test_foreign_pages.py tests it with a real browser and server."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from flows.serve.gate import SameOrigin
from flows.serve.server import hosts

OWN = "http://127.0.0.1:4200"
JSON = {"content-type": "application/json"}
NAVIGATES = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def status(method: str, path: str = "/api/flow_runs/filter", content: bytes = b"", **headers: str) -> int:
    """The status of a request to http://127.0.0.1:4200, with https://dev2pro.example.com as the public address."""
    route = Route("/{path:path}", lambda _: PlainTextResponse("in"), methods=["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    origins = [OWN, "https://dev2pro.example.com"]
    app = TrustedHostMiddleware(SameOrigin(Starlette(routes=[route]), origins), hosts([*origins]), www_redirect=False)

    async def request() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=OWN) as client:
            answer = await client.request(method, path, content=content, headers={k.replace("_", "-"): v for k, v in headers.items()})
            return answer.status_code

    return asyncio.run(request())


@pytest.mark.parametrize("host", ["127.0.0.1:4200", "localhost:4200", "[::1]:4200", "LOCALHOST", "dev2pro.example.com", "127.0.0.1:8080"])
def test_our_own_names_are_answered(host):
    assert status("GET", host=host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example:4200", "evil.example", "127.0.0.1.evil.example", "localhost.", "dev2pro.example.com.evil.example", "", "x y"]
)
def test_other_names_are_not(host):
    assert status("GET", host=host) == 400


@pytest.mark.parametrize("origin", [OWN, "http://localhost:4200", "https://dev2pro.example.com"])
def test_our_own_pages_change_things(origin):
    host = origin.rpartition("/")[2] if "localhost" in origin else "127.0.0.1:4200"
    assert status("POST", content=b"{}", origin=origin, host=host, sec_fetch_site="same-origin", **JSON) == 200


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "origin", ["http://127.0.0.1:4201", "http://localhost:4200", "https://127.0.0.1:4200.evil.example", "null", "", "https://evil.example"]
)
def test_pages_of_other_origins_do_nothing(method, origin):
    assert status(method, content=b"{}", origin=origin, **JSON) == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_a_browser_sends_for_them_without_an_origin_does_nothing(method, site):
    assert status(method, sec_fetch_site=site, sec_fetch_mode="no-cors", sec_fetch_dest="image") == 403
    assert status(method, sec_fetch_site=site, sec_fetch_mode="navigate", sec_fetch_dest="iframe", path="/v2") == 403
    assert status(method, sec_fetch_site=site, **{k.replace("-", "_"): v for k, v in NAVIGATES.items()}) == 403  # a link to the API


def test_a_link_to_the_ui_is_followed():
    headers = {k.replace("-", "_"): v for k, v in NAVIGATES.items()}
    assert status("GET", "/v2/deployments", sec_fetch_site="cross-site", **headers) == 200
    assert status("POST", "/v2/deployments", sec_fetch_site="cross-site", **headers) == 403


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/json", "json", ""]
)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_a_body_that_is_not_json_is_refused(method, kind):
    assert status(method, content=b"{}", **({"content-type": kind} if kind is not None else {})) == 415


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_and_no_body_are_taken(kind):
    assert status("POST", content=b"{}", **{"content-type": kind}) == 200
    assert status("POST") == 200
    assert status("DELETE") == 200
