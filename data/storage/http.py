"""HTTP range requests for http(s) and s3: sends a GET, checks the response and the peer address."""

import email.utils
import functools
import ipaddress
import logging
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from dev2pro import s3
from dev2pro.errors import DataError
from dev2pro.escape import printable
from dev2pro.redact import redact_url
from dev2pro.retry import LONGEST_PAUSE, TransientError

TRANSIENT_STATUSES = {408, 425, 429}  # statuses that are retried, besides those from 500 on
MIN_RATE = 20_000  # bytes per second below which a transfer counts as stuck
URL_LIFETIME = 3600  # seconds an s3 address is signed for
URL_RENEWAL = 300  # seconds after which it is signed again: temporary credentials stay valid for at least 10 minutes more
RANGE = re.compile(r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18})")
STRONG = re.compile(r'"([!#-~]+)"')  # an ETag
ERROR_TEXTS = (  # what urllib3's errors mean; the first that fits
    (urllib3.exceptions.NameResolutionError, "its host's name is not known"),
    (urllib3.exceptions.ConnectTimeoutError, "no connection came about"),
    (urllib3.exceptions.ReadTimeoutError, "the server fell silent"),
    (Exception, "the connection broke"),
)
CHANGED_CURE = "Bring the old file back, or index it again, make a new snapshot and choose another out=."


@dataclass(frozen=True)
class FileInfo:
    """The version of a file: size in bytes, and a strong ETag or a modification time (Last-Modified, or ns)."""

    size: int
    etag: str = ""
    modified: str = ""

    def difference(self, other: "FileInfo") -> str:
        """What differs, as text; "" if nothing does."""
        if self.size != other.size:
            return f"it has {other.size} bytes, not {self.size}"
        for key in ("etag", "modified"):
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine and theirs and (key == "etag" or mine.isdigit() == theirs.isdigit()):  # nanoseconds and Last-Modified do not compare
                return "" if mine == theirs else f"its {key} is {theirs}, not {mine}"
        return ""

    def json(self) -> dict[str, Any]:
        """As JSON values; `FileInfo(**values)` is the inverse."""
        return asdict(self)


class ChangedError(DataError):
    """The file is not the one that was indexed."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{redact_url(url)} changed since it was indexed ({printable(reason)}). {CHANGED_CURE}")


class RangeClient:
    """A connection pool shared by the threads of one process. Times in seconds."""

    def __init__(self, connections: int, connect_timeout: float, idle_timeout: float) -> None:
        self.idle = idle_timeout
        self._timeout = urllib3.Timeout(connect=connect_timeout, read=idle_timeout)
        self._pool = _GuardedPoolManager(num_pools=16, maxsize=connections)
        self._presigned_url = functools.lru_cache(4096)(_sign)

    def get_range(self, url: str, start: int, length: int, info: FileInfo | None = None) -> tuple[bytes, FileInfo]:
        """The range (shorter at the end of the file) and the FileInfo of the file it is from.

        Raises TransientError if a retry may succeed, DataError if not: the file is missing or differs from `info`.
        """
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        if info and info.etag:
            headers["If-Match"] = f'"{info.etag}"'
        try:
            response = self._pool.request(
                "GET", self._request_url(url), headers=headers, redirect=False, retries=False, preload_content=False, decode_content=False,
                timeout=self._timeout,
            )  # fmt: skip
            try:
                actual = self._check_response(url, response, start, info)
                return self._body(response, max(0, min(length, actual.size - start))), actual
            finally:
                response.close()  # a connection whose response was read to its end is already back in the pool
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _translate_http_error(url, error) from None  # its own text may hold a presigned URL

    def _request_url(self, url: str) -> str:
        return self._presigned_url(url, int(time.time() // URL_RENEWAL)) if url.startswith("s3://") else url

    def _check_response(self, url: str, response: urllib3.BaseHTTPResponse, start: int, info: FileInfo | None) -> FileInfo:
        """Checks the response and returns the file's size and version."""
        status, headers, name = response.status, response.headers, redact_url(url)
        if status in TRANSIENT_STATUSES or status >= 500:
            raise TransientError(f"HTTP status {status}", _retry_after(headers))
        if status == 412:
            raise ChangedError(url, "its ETag is another one")
        if 300 <= status < 400:
            raise DataError(f"{name} redirects elsewhere, which is not followed. Give the address where the file itself is.")
        if status == 200:
            raise DataError(f"{name} is on a server that sends whole files only. Serve it by one that knows byte ranges, such as nginx or s3.")
        if status not in (206, 416):
            cure = "Correct the address." if status in (404, 410) else "Check the address and the right to read it."
            raise DataError(f"{name} cannot be had (HTTP status {status}). {cure}")
        content_range = headers.get("Content-Range", "bytes */0" if status == 416 and not start else "")  # 416: nothing lies at `start`
        if not (match := RANGE.fullmatch(content_range)):
            raise TransientError(f"a Content-Range of {content_range[:80]!r}")
        etag = STRONG.fullmatch(headers.get("ETag", ""))
        actual = FileInfo(int(match[2]), etag[1] if etag else "", headers.get("Last-Modified", ""))
        if info and (reason := info.difference(actual)):
            raise ChangedError(url, reason)
        if status == 206 and match[1] != str(start):
            raise TransientError(f"another range than asked for, {content_range[:80]}")
        return actual

    def _body(self, response: urllib3.BaseHTTPResponse, length: int) -> bytes:
        """Reads exactly `length` bytes of the response. Raises TransientError for another length or a rate below MIN_RATE."""
        timeout = self.idle + length / MIN_RATE
        end = time.monotonic() + timeout
        parts, missing = list[bytes](), length
        while missing:
            part = response.read1(min(missing, 1 << 20))
            missing -= len(part)
            if not part or time.monotonic() > end:
                raise TransientError(f"only {length - missing} of {length} bytes came" + (f" in {timeout:.0f} seconds" if part else ""))
            parts.append(part)
        if length and response.read1(1):
            raise TransientError("more bytes than asked for")
        return b"".join(parts)


def _sign(url: str, _when: int) -> str:
    """A presigned URL for an s3 object, valid for URL_LIFETIME."""
    try:
        return s3.client().url(url, expires=URL_LIFETIME)
    except Exception as error:  # botocore has many exceptions for missing credentials
        raise translate_s3_error(url, error) from None


def translate_s3_error(url: str, error: Exception) -> Exception:
    """Turns an error of fsspec's s3 into TransientError or DataError. Names only its class, because its text may hold keys."""
    kind = type(error).__name__
    if s3.is_transient(error):
        return TransientError(f"s3 was not reached, {kind}")
    return DataError(
        f"{redact_url(url)} cannot be had from s3 ({kind}). Check the address, and {s3.CURE} What anybody may read has an https:// address."
    )


def _translate_http_error(url: str, error: Exception) -> Exception:
    if isinstance(error, _Forbidden):
        return DataError(f"{redact_url(url)} leads to {error}, where clouds keep their machines' credentials; nothing is read there.")
    if isinstance(error, urllib3.exceptions.LocationValueError):
        return DataError(f"{redact_url(url)} is no address that can be asked. Correct it.")
    if isinstance(error, urllib3.exceptions.SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError):
        return DataError(f"{redact_url(url)} has a certificate that is not trusted. Check the address and the clock, or install its authority.")
    return TransientError(f"{next(text for kind, text in ERROR_TEXTS if isinstance(error, kind))}, {type(error).__name__}")


def _retry_after(headers: Mapping[str, str]) -> float:
    """Retry-After in seconds, given as a number or as a date."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value) if value.isdecimal() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), LONGEST_PAUSE)


# ---- connections that check the peer's IP address ---------------------------------------------------


METADATA = ipaddress.ip_network("fd00:ec2::/32")  # Amazon's, over IPv6
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)  # its warnings contain presigned URLs, and so do ...
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # ... its debug messages


class _Forbidden(urllib3.exceptions.HTTPError):
    """A link-local address, such as 169.254.169.254."""


def _check_peer(sock: Any) -> Any:
    peer = ipaddress.ip_address(sock.getpeername()[0].partition("%")[0])
    peer = getattr(peer, "ipv4_mapped", None) or peer
    if peer.is_link_local or peer.is_multicast or peer in METADATA:
        sock.close()
        raise _Forbidden(str(peer))
    return sock


class _Http(HTTPConnection):
    def _new_conn(self) -> Any:
        return _check_peer(super()._new_conn())


class _Https(HTTPSConnection):
    def _new_conn(self) -> Any:
        return _check_peer(super()._new_conn())


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class _GuardedPoolManager(urllib3.PoolManager):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
