"""Paths and URLs of data (local, http(s), s3): normalizes, expands and redacts them."""

import itertools
import math
import os
import re
from urllib.parse import urlsplit

import braceexpand

from dev2pro import patterns, s3
from dev2pro.errors import DataError, TryAgainError
from dev2pro.redact import URL, redact_url

REMOTE = ("http", "https", "s3")
MAX_URLS = 1_000_000  # that braces may expand to
_RANGE = re.compile(r"\{(-?[0-9]{1,4000})\.\.(-?[0-9]{1,4000})(?:\.\.-?([0-9]{1,4000}))?\}")  # braces with numbers from and to


def is_remote(url: str) -> bool:
    """Whether a normalized location is a URL and not a local path."""
    return bool(URL.match(url))


def normalize(url: str) -> str:
    """Normalizes to a URL or an absolute path. Raises DataError for URLs that are not supported.

    A name such as `pipe:cat x` or `a.tar::pipe:ls` is a path like any other: no part of it is executed.
    """
    match = URL.match(url)
    if not match:
        return os.path.abspath(url)
    scheme = match[1].lower()
    if scheme == "file":
        return os.path.abspath(url[len("file://") :])
    if scheme not in REMOTE:
        raise DataError(
            f"{redact_url(url)} cannot be read: of addresses only {', '.join(f'{s}://' for s in REMOTE)} are. Copy it there, or to this machine."
        )
    try:
        parts = urlsplit(url)
    except ValueError:  # its text may hold the password
        raise DataError(f"{redact_url(url)} is no address. Correct it.") from None
    if scheme != "s3" and (parts.query or parts.fragment):
        raise DataError(
            f"{redact_url(url)} has a query, which would put its secret into every snapshot, and may run out. "
            "Give s3://bucket/key with the credentials in the environment, or an address that needs none."
        )
    if "@" in parts.netloc:
        raise DataError(f"{redact_url(url)} holds a password. Give it without; dev2pro keeps no secrets in snapshots.")
    return scheme + url[len(scheme) :]


def expand(pattern: str, what: str) -> list[str]:
    """Every path or URL that a pattern names, in order: {000..012} braces anywhere, * and ? for local files and s3.

    A path that exists, and every leading folder that does, is itself, whatever characters its name has.
    Raises DataError, with the setting `what` in its message, if the pattern or one of its expanded braces matches nothing.
    """
    if os.path.lexists(pattern):
        return [normalize(pattern)]
    above, rest = patterns.existing(pattern)
    many = math.prod(abs(int(last) - int(first)) // max(1, int(step or 1)) + 1 for first, last, step in _RANGE.findall(rest)) > MAX_URLS
    try:  # it materializes a whole range
        singles = [] if many else [above + single for single in itertools.islice(braceexpand.braceexpand(rest), MAX_URLS + 1)]
    except ValueError:  # braces that do not balance: a plain path may hold one
        singles = [pattern]
    if many or len(singles) > MAX_URLS:
        raise DataError(f"{what}: {redact_url(pattern)} names more than {MAX_URLS:,} places. Correct the numbers in its braces.")
    matches = {single: _matches(single) for single in singles}
    for single, locations in matches.items():
        if not locations:
            among = f", one of {redact_url(pattern)}" if single != pattern else ""
            raise DataError(f"{what}: nothing matches {redact_url(single)}{among}. Correct the path or address, or bring the file back.")
    return [location for locations in matches.values() for location in locations]


def _matches(pattern: str) -> list[str]:
    url = normalize(pattern)
    if not is_remote(url):
        return patterns.matches(url)
    if url.startswith("s3://"):
        return _list_s3(url) if re.search(r"[*?\[]", url) else [url]
    if "*" in url:
        raise DataError(f"{redact_url(pattern)} cannot be listed: http has no folders. Name the shards with braces, such as {{000000..000099}}.tar.")
    return [url]


def _list_s3(url: str) -> list[str]:
    try:
        return [f"s3://{name}" for name in sorted(s3.client().glob(url))]
    except Exception as error:  # botocore's are many, and their texts may name keys
        raise (TryAgainError if s3.is_transient(error) else DataError)(
            f"{redact_url(url)} cannot be listed ({type(error).__name__}). Check the address, the network, and {s3.CURE}"
        ) from None
