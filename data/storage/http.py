"""One GET of a byte range over http(s) or from s3: asks, judges the answer, and looks where the connection leads."""

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

from data.storage import urls
from dev2pro import s3
from dev2pro.errors import DataError
from dev2pro.retry import LONGEST_PAUSE, TransientError

PASSING = {408, 425, 429}  # statuses that may be others next time, besides those from 500 on
SLOWEST = 20_000  # bytes per second below which a transfer counts as stuck
SIGNED_FOR = 3600  # seconds an s3 address is signed for
SIGNED_ANEW = 300  # seconds after which it is signed again: credentials that are lent for a while are good for 10 minutes more at least
RANGE = re.compile(r"bytes (?:([0-9]{1,18})-[0-9]{1,18}|\*)/([0-9]{1,18})")
STRONG = re.compile(r'"([!#-~]+)"')  # an ETag
TROUBLES = (  # what urllib3's errors mean; the first that fits
    (urllib3.exceptions.NameResolutionError, "its host's name is not known"),
    (urllib3.exceptions.ConnectTimeoutError, "no connection came about"),
    (urllib3.exceptions.ReadTimeoutError, "the server fell silent"),
    (Exception, "the connection broke"),
)
OTHER = "Bring the old file back, or index it again, make a new snapshot and choose another out=."


@dataclass(frozen=True)
class FileInfo:
    """What tells one file from another in the same place: bytes, and a strong ETag or a time of change (Last-Modified, or ns)."""

    size: int
    etag: str = ""
    modified: str = ""

    def difference(self, other: "FileInfo") -> str:
        """What is not the same, or nothing."""
        if self.size != other.size:
            return f"it has {other.size} bytes, not {self.size}"
        for key in ("etag", "modified"):
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine and theirs and (key == "etag" or mine.isdigit() == theirs.isdigit()):  # nanoseconds here and Last-Modified there do not compare
                return "" if mine == theirs else f"its {key} is {theirs}, not {mine}"
        return ""

    def json(self) -> dict[str, Any]:
        """As JSON values; `Stamp(**values)` is the way back."""
        return asdict(self)


class ChangedError(DataError):
    """A file that is no longer the one that was indexed."""

    def __init__(self, place: str, why: str) -> None:
        super().__init__(f"{urls.redact_url(place)} changed since it was indexed ({urls.printable(why)}). {OTHER}")


class RangeClient:
    """Connections that are kept and shared by the threads of one process. Times in seconds."""

    def __init__(self, connections: int, connect_timeout: float, idle_timeout: float) -> None:
        self.idle = idle_timeout
        self._patience = urllib3.Timeout(connect=connect_timeout, read=idle_timeout)
        self._pool = _Guarded(num_pools=16, maxsize=connections)
        self._signed = functools.lru_cache(4096)(_sign)

    def get_range(self, place: str, start: int, length: int, stamp: FileInfo | None = None) -> tuple[bytes, FileInfo]:
        """The range, shorter at the end of the file, and the stamp of the file it is from.

        Raises Passing where another try may do better, DataError where it will not: a file that is not there or not the stamped one.
        """
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        if stamp and stamp.etag:
            headers["If-Match"] = f'"{stamp.etag}"'
        try:
            answer = self._pool.request(
                "GET", self._address(place), headers=headers, redirect=False, retries=False, preload_content=False, decode_content=False,
                timeout=self._patience,
            )  # fmt: skip
            try:
                found = self._check_response(place, answer, start, stamp)
                return self._body(answer, max(0, min(length, found.size - start))), found
            finally:
                answer.close()  # by now a connection whose answer was read to its end is back among those that are kept
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _translate_error(place, error) from None  # its own text may hold a signed address

    def _address(self, place: str) -> str:
        return self._signed(place, int(time.time() // SIGNED_ANEW)) if place.startswith("s3://") else place

    def _check_response(self, place: str, answer: urllib3.BaseHTTPResponse, start: int, stamp: FileInfo | None) -> FileInfo:
        """The stamp of the file, if the answer is what was asked for."""
        status, said, name = answer.status, answer.headers, urls.redact_url(place)
        if status in PASSING or status >= 500:
            raise TransientError(f"HTTP status {status}", _asked_pause(said))
        if status == 412:
            raise ChangedError(place, "its ETag is another one")
        if 300 <= status < 400:
            raise DataError(f"{name} redirects elsewhere, which is not followed. Give the address where the file itself is.")
        if status == 200:
            raise DataError(f"{name} is on a server that sends whole files only. Serve it by one that knows byte ranges, such as nginx or s3.")
        if status not in (206, 416):
            cure = "Correct the address." if status in (404, 410) else "Check the address and the right to read it."
            raise DataError(f"{name} cannot be had (HTTP status {status}). {cure}")
        given = said.get("Content-Range", "bytes */0" if status == 416 and not start else "")  # 416: nothing lies at `start`
        if not (of := RANGE.fullmatch(given)):
            raise TransientError(f"a Content-Range of {given[:80]!r}")
        etag = STRONG.fullmatch(said.get("ETag", ""))
        found = FileInfo(int(of[2]), etag[1] if etag else "", said.get("Last-Modified", ""))
        if stamp and (why := stamp.difference(found)):
            raise ChangedError(place, why)
        if status == 206 and of[1] != str(start):
            raise TransientError(f"another range than asked for, {given[:80]}")
        return found

    def _body(self, answer: urllib3.BaseHTTPResponse, length: int) -> bytes:
        """The `length` bytes that an answer must have, never more, and not slower than SLOWEST."""
        patience = self.idle + length / SLOWEST
        end = time.monotonic() + patience
        parts, missing = list[bytes](), length
        while missing:
            part = answer.read1(min(missing, 1 << 20))
            missing -= len(part)
            if not part or time.monotonic() > end:
                raise TransientError(f"only {length - missing} of {length} bytes came" + (f" in {patience:.0f} seconds" if part else ""))
            parts.append(part)
        if length and answer.read1(1):
            raise TransientError("more bytes than asked for")
        return b"".join(parts)


def _sign(place: str, _when: int) -> str:
    """An address for an s3 object, good for SIGNED_FOR."""
    try:
        return s3.client().url(place, expires=SIGNED_FOR)
    except Exception as error:  # botocore has many kinds of missing credentials
        raise s3_trouble(place, error) from None


def s3_trouble(place: str, error: Exception) -> Exception:
    """What an error of fsspec's s3 means: Passing, or DataError. Its own text may name keys, so only its kind is told."""
    kind = type(error).__name__
    if s3.is_transient(error):
        return TransientError(f"s3 was not reached, {kind}")
    return DataError(
        f"{urls.redact_url(place)} cannot be had from s3 ({kind}). Check the address, and {s3.CURE} What anybody may read has an https:// address."
    )


def _translate_error(place: str, error: Exception) -> Exception:
    if isinstance(error, _Forbidden):
        return DataError(f"{urls.redact_url(place)} leads to {error}, where clouds keep their machines' credentials; nothing is read there.")
    if isinstance(error, urllib3.exceptions.LocationValueError):
        return DataError(f"{urls.redact_url(place)} is no address that can be asked. Correct it.")
    if isinstance(error, urllib3.exceptions.SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError):
        return DataError(
            f"{urls.redact_url(place)} has a certificate that is not trusted. Check the address and the clock, or install its authority."
        )
    return TransientError(f"{next(words for kind, words in TROUBLES if isinstance(error, kind))}, {type(error).__name__}")


def _asked_pause(said: Mapping[str, str]) -> float:
    """Retry-After in seconds, given as a number or as a date."""
    asked = said.get("Retry-After", "")
    try:
        seconds = float(asked) if asked.isdecimal() else email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(0.0, seconds), LONGEST_PAUSE)


# ---- connections whose other end was looked at, whatever its name resolved to ---------------------------------------------------


METADATA = ipaddress.ip_network("fd00:ec2::/32")  # Amazon's, over IPv6
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)  # its warnings show signed addresses, and so do ...
logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # ... its notes for debugging


class _Forbidden(urllib3.exceptions.HTTPError):
    """A link-local address, such as 169.254.169.254."""


def _looked_at(sock: Any) -> Any:
    peer = ipaddress.ip_address(sock.getpeername()[0].partition("%")[0])
    peer = getattr(peer, "ipv4_mapped", None) or peer
    if peer.is_link_local or peer.is_multicast or peer in METADATA:
        sock.close()
        raise _Forbidden(str(peer))
    return sock


class _Http(HTTPConnection):
    def _new_conn(self) -> Any:
        return _looked_at(super()._new_conn())


class _Https(HTTPSConnection):
    def _new_conn(self) -> Any:
        return _looked_at(super()._new_conn())


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _Https


class _Guarded(urllib3.PoolManager):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}
