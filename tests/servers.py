"""Real servers on loopback: a web server with byte ranges and injectable faults, and an s3 store (moto).

`PYTHONPATH=. python -m tests.servers FOLDER --latency 0.04 --port 0` prints its address and serves until it is killed.
"""

import argparse
import email.utils
import hashlib
import logging
import os
import re
import socket
import ssl
import struct
import sys
import threading
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from data.storage.transport import ReadConfig

DRIP = 0.05  # seconds between two bytes, and between two of the twenty pieces of a slow answer
SECRET = "verySecretKeyOfTheTests"


@dataclass(frozen=True)
class Fault:
    """The fault of one request. A bare str or int stands for Fault(kind) or Fault(status=...).

    kind: reset, reset middle (half of the body, then RST), short (half of it, then closed in order), stall, stall middle, drip, slow, corrupt,
    whole, wrong range, html (with status 200), more (10 bytes beyond the range), flood (zeros without end), deaf (If-Match is not looked at).
    `headers` replace the server's own, or with None take them away. `delay`: seconds before the answer.
    """

    kind: str = ""
    status: int = 0
    headers: Mapping[str, str | None] = field(default_factory=dict)
    delay: float = 0.0
    body: str = "<html>no</html>"  # of a status


Faults = Callable[[str, int, str], Fault | str | int | None]  # (path, how many requests of this path came before, Range header or "")


class Server:
    """Serves a folder within the block; `latency` (seconds for every request) and `faults` may be changed at any time."""

    def __init__(self, folder: str | Path, latency: float = 0.0, faults: Faults | None = None, **options: Any) -> None:
        self.folder, self.latency, self.faults = Path(folder).resolve(), latency, faults
        self.requests: list[tuple[str, str]] = []  # (path, Range header or "")
        self.connections = 0  # accepted so far
        self.most = 0  # the largest number of concurrent requests
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.under_way, self.counts, self.sockets = 0, Counter[str](), set[socket.socket]()
        self._listen(**options)

    def _listen(self, host: str = "127.0.0.1", port: int = 0, certificate: Path | None = None) -> None:
        """Serves https if a certificate (a file that includes the key) is given."""
        self._listener = _Listener((host, port), _Handler)
        self._listener.owner = self
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._listener.socket = context.wrap_socket(self._listener.socket, server_side=True)
        self.url = f"{'https' if certificate else 'http'}://{host}:{self._listener.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._listener.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopped.set()
        self._listener.shutdown()
        self._listener.server_close()
        with self.lock:
            for connection in self.sockets:
                connection.close()

    def fault(self, path: str, wanted: str) -> Fault:
        """Records a request and returns its fault."""
        with self.lock:
            self.requests.append((path, wanted))
            number, self.counts[path] = self.counts[path], self.counts[path] + 1
        fault = self.faults(path, number, wanted) if self.faults else None
        return fault if isinstance(fault, Fault) else Fault(status=fault) if isinstance(fault, int) else Fault(fault or "")


class _Listener(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256
    owner: Server

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.owner.lock:
            self.owner.connections += 1
            self.owner.sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.owner.lock:
            self.owner.sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Silent: the tests disconnect clients on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm, wbufsize = "HTTP/1.1", True, 1 << 16
    server: _Listener

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.server.owner
        path, wanted = urllib.parse.unquote(self.path.partition("?")[0]), self.headers.get("Range", "")
        with owner.lock:
            owner.under_way += 1
            owner.most = max(owner.most, owner.under_way)
        try:
            fault = owner.fault(path, wanted)
            if (pause := owner.latency + fault.delay) > 0:
                owner.stopped.wait(pause)
            self._answer(owner.folder / path.lstrip("/"), wanted, fault)
        finally:  # the end of the response is sent after this
            with owner.lock:
                owner.under_way -= 1

    def _answer(self, file: Path, wanted: str, fault: Fault) -> None:
        if fault.kind == "reset":
            return self._reset()
        if fault.kind == "stall":
            self.server.owner.stopped.wait()
        if fault.status:
            return self._say(fault.status, fault.body.encode(), fault.headers)
        if fault.kind == "html":
            return self._say(200, b"<html>Please log in</html>", {"Content-Type": "text/html", **fault.headers})
        if not file.is_relative_to(self.server.owner.folder) or ".." in file.parts or not file.is_file():
            return self._say(404, b"not here", fault.headers)
        status = file.stat()
        etag = f'"{hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode()).hexdigest()}"'
        headers = {"ETag": etag, "Last-Modified": email.utils.formatdate(status.st_mtime, usegmt=True), "Accept-Ranges": "bytes"}
        if (if_match := self.headers.get("If-Match")) and if_match not in (etag, "*") and fault.kind != "deaf":
            return self._say(412, b"changed", fault.headers)
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted) if fault.kind != "whole" else None
        start = int(match[1]) if match else 0
        end = min(int(match[2]) + 1 if match and match[2] else status.st_size, status.st_size)
        if match and start >= status.st_size:
            return self._say(416, b"", {"Content-Range": f"bytes */{status.st_size}", **headers, **fault.headers})
        if fault.kind == "wrong range":
            start, end = start + 1, end + 1
        if match:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{status.st_size}"
        with file.open("rb") as content:
            content.seek(start)
            self._send(206 if match else 200, content, end - start, {**headers, **fault.headers}, fault.kind)

    def _send(self, status: int, content: Any, length: int, headers: Mapping[str, str | None], kind: str) -> None:
        stated = {"more": length + 10, "flood": 1 << 40}.get(kind, length)
        self._head(status, {"Content-Length": str(stated), **headers})
        remaining = length // 2 if kind in ("short", "reset middle", "stall middle") else length
        size = {"drip": 1, "slow": -(-length // 20)}.get(kind, 1 << 20)
        while remaining > 0 and (part := content.read(min(remaining, size))):
            remaining -= len(part)
            if kind == "corrupt" and remaining == 0:
                part = part[:-1] + bytes([part[-1] ^ 1])
            self.wfile.write(part)
            if kind in ("drip", "slow"):
                self.wfile.flush()
                self.server.owner.stopped.wait(DRIP)
        self.wfile.write(b"x" * (stated - length) if kind == "more" else b"")
        if kind:
            self.wfile.flush()
        self.close_connection |= kind == "short"
        if kind == "reset middle":
            self._reset()
        if kind == "stall middle":
            self.server.owner.stopped.wait()
        while kind == "flood" and not self.server.owner.stopped.is_set():
            self.wfile.write(bytes(1 << 20))

    def _say(self, status: int, body: bytes, headers: Mapping[str, str | None]) -> None:
        self._head(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def _head(self, status: int, headers: Mapping[str, str | None]) -> None:
        self.send_response(status)
        for name in (name for name, value in headers.items() if value is not None):
            self.send_header(name, headers[name] or "")
        self.end_headers()

    def _reset(self) -> None:
        """A lingering time of 0 makes close send RST."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@dataclass(frozen=True)
class Bucket:
    """An s3 bucket; `url("a.tar")` is the object's URL."""

    name: str
    client: Any  # boto3's

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def put(self, key: str, content: bytes) -> str:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)
        return self.url(key)


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Sets variables (None removes one) and restores them at the end."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # it caches the credentials of its first use


def impatient(**changes: Any) -> ReadConfig:
    """A ReadConfig with short timeouts and few retries."""
    values = {"workers": 0, "threads": 8, "connect_timeout": 0.5, "idle_timeout": 0.5, "hedge": 60.0, "retries": 1, "cache_gb": 0.0, **changes}
    return ReadConfig(**values)


def in_child(work: Callable[[], Any]) -> int:
    """The exit code of a forked process that does `work`."""
    if not (child := os.fork()):
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def s3_environment(url: str) -> dict[str, str | None]:
    """Variables that point s3 at `url` and override the machine's own configuration."""
    keys = {"AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": None, "AWS_PROFILE": None}
    files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
    return {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", **keys, **files}


@contextmanager
def moto(name: str = "shards") -> Iterator[Bucket]:
    """An empty bucket in a new s3 store; the environment points to it within the block."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST"), timeout=10).close()
        with environment(**s3_environment(url)):
            client = boto3.session.Session().client("s3", endpoint_url=url)
            client.create_bucket(Bucket=name)
            yield Bucket(name, client)
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.servers", description=__doc__)
    for name, kind, default in (("folder", str, None), ("--latency", float, 0.0), ("--port", int, 0)):
        parser.add_argument(name, type=kind, default=default)
    options = parser.parse_args()
    with Server(options.folder, options.latency, port=options.port) as server:
        print(server.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
