"""Where data may lie: on this machine, behind http(s), or in s3; and how such a place is named, found and shown without secrets."""

import glob
import itertools
import math
import os
import re
from urllib.parse import urlsplit

import botocore.exceptions
import braceexpand
import fsspec

from dev2pro.errors import DataError, TryAgainError

REMOTE = ("http", "https", "s3")
MOST = 1_000_000  # places that braces may name
_RANGE = re.compile(r"\{(-?[0-9]{1,4000})\.\.(-?[0-9]{1,4000})(?:\.\.-?([0-9]{1,4000}))?\}")  # braces with numbers from and to
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def remote(place: str) -> bool:
    """Whether a checked place is an address and not a path on this machine."""
    return bool(_ADDRESS.match(place))


def check(place: str) -> str:
    """The place as it is kept: an address, or an absolute path. Raises DataError for addresses that are not read.

    A name such as `pipe:cat x` or `a.tar::pipe:ls` is a path like any other: no part of a place is ever run.
    """
    found = _ADDRESS.match(place)
    if not found:
        return os.path.abspath(place)
    scheme = found[1].lower()
    if scheme == "file":
        return os.path.abspath(place[len("file://") :])
    if scheme not in REMOTE:
        raise DataError(
            f"{shown(place)} cannot be read: of addresses only {', '.join(f'{s}://' for s in REMOTE)} are. Copy it there, or to this machine."
        )
    try:
        parts = urlsplit(place)
    except ValueError:  # its text may hold the password
        raise DataError(f"{shown(place)} is no address. Correct it.") from None
    if scheme != "s3" and (parts.query or parts.fragment):
        raise DataError(
            f"{shown(place)} has a query, which would put its secret into every snapshot, and may run out. "
            "Give s3://bucket/key with the credentials in the environment, or an address that needs none."
        )
    if "@" in parts.netloc:
        raise DataError(f"{shown(place)} holds a password. Give it without; dev2pro keeps no secrets in snapshots.")
    return scheme + place[len(scheme) :]


def shown(place: str) -> str:
    """The place for messages: without password, query and fragment, and without characters that a terminal would obey."""
    if _ADDRESS.match(place):
        scheme, rest = place.split("://", 1)
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
        if re.match(r"[^/]*(@|:(?!\d*(/|$)))", rest):  # a name or a password, which may itself hold a slash
            rest = rest.rpartition("@")[2]
        place = f"{scheme}://{rest}"
    return printable(place)


def printable(text: str) -> str:
    """The text with control characters spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expand(pattern: str, what: str) -> list[str]:
    """Every place a pattern names, in order: {000..012} braces anywhere, * and ? on this machine and in s3.

    `what` names the setting in the DataError that is raised when nothing matches, or nothing one of the braces' names.
    """
    many = math.prod(abs(int(last) - int(first)) // max(1, int(step or 1)) + 1 for first, last, step in _RANGE.findall(pattern)) > MOST
    try:
        patterns = [] if many else list(itertools.islice(braceexpand.braceexpand(pattern), MOST + 1))  # which holds all of a range at once
    except ValueError:  # braces that do not balance: a plain path may hold one
        patterns = [pattern]
    if os.path.exists(pattern):
        patterns = [pattern]
    elif many or len(patterns) > MOST:
        raise DataError(f"{what}: {shown(pattern)} names more than {MOST:,} places. Correct the numbers in its braces.")
    found = {one: _matches(one) for one in patterns}
    for one, places in found.items():
        if not places:
            among = f", one of {shown(pattern)}" if one != pattern else ""
            raise DataError(f"{what}: nothing matches {shown(one)}{among}. Correct the path or address, or bring the file back.")
    return [place for places in found.values() for place in places]


def _matches(pattern: str) -> list[str]:
    place = check(pattern)
    if not remote(place):
        return [place] if os.path.lexists(place) else sorted(glob.glob(place))
    if place.startswith("s3://"):
        return _listed(place) if re.search(r"[*?\[]", place) else [place]
    if "*" in place:
        raise DataError(f"{shown(pattern)} cannot be listed: http has no folders. Name the shards with braces, such as {{000000..000099}}.tar.")
    return [place]


def passing(error: Exception) -> bool:
    """Whether an error of fsspec's s3 may not come again: the store was not reached, or could not answer."""
    kinds = (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError, botocore.exceptions.CredentialRetrievalError, OSError)
    return isinstance(error, kinds) and not isinstance(error, (FileNotFoundError, PermissionError))


def _listed(place: str) -> list[str]:
    try:
        return [f"s3://{name}" for name in sorted(fsspec.filesystem("s3").glob(place))]
    except Exception as error:  # botocore's are many, and their texts may name keys
        raise (TryAgainError if passing(error) else DataError)(
            f"{shown(place)} cannot be listed ({type(error).__name__}). Check the address, the network, and AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; AWS_ENDPOINT_URL for other stores than Amazon's."
        ) from None
