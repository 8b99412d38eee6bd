"""A proxy in front of a real web server: forwards and records requests, and can fail or delay any of them."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Rule = Callable[[str, str, int], str | int | float | None]
"""(method, path, how many requests came before) -> an HTTP status, "reset" or "cut" (half of the answer, then RST), or seconds to wait first."""

HOPS = {"connection", "transfer-encoding", "keep-alive"}


class Proxy:
    """Proxies the server at `url` within the block; `rule` may be changed at any time."""

    def __init__(self, url: str, rule: Rule | None = None) -> None:
        self.target, self.rule = urlsplit(url).netloc, rule
        self.requests: list[tuple[str, str]] = []  # (method, path without query)
        self.lock = threading.Lock()
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.owner = self
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def count(self, *methods: str) -> int:
        """The number of requests with these methods."""
        with self.lock:
            return sum(method in methods for method, _ in self.requests)

    def wait(self, method: str, many: int) -> None:
        """Waits for `many` requests of a method."""
        end = time.monotonic() + 60
        while self.count(method) < many:
            assert time.monotonic() < end, self.requests
            time.sleep(0.005)


class _Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 64
    owner: Proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: the tests kill clients on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: _Listener

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        owner, path = self.server.owner, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with owner.lock:
            number = len(owner.requests)
            owner.requests.append((self.command, path))
        verdict = owner.rule(self.command, path, number) if owner.rule else None
        if isinstance(verdict, float):
            time.sleep(verdict)
        if verdict == "reset":
            return self._reset()
        if isinstance(verdict, int):
            return self._answer(verdict, [], b"")
        behind = http.client.HTTPConnection(owner.target, timeout=30)
        behind.request(self.command, self.path, body, dict(self.headers.items()))
        answer = behind.getresponse()
        content = answer.read()
        behind.close()
        return self._answer(answer.status, answer.getheaders(), content, cut=verdict == "cut")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in HOPS and (name.lower() != "content-length" or self.command == "HEAD"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._reset()

    def _reset(self) -> None:
        """A lingering time of 0 makes close send RST."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
