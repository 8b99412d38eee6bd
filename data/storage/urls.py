"""Where data may lie: on this machine, behind http(s), or in s3; and how such a place is named, found and shown without secrets."""

import glob
import itertools
import math
import os
import re
from urllib.parse import urlsplit

import braceexpand

from dev2pro import s3
from dev2pro.errors import DataError, TryAgainError
from dev2pro.escape import printable as printable
from dev2pro.s3 import ADDRESS, redact_url

REMOTE = ("http", "https", "s3")
MOST = 1_000_000  # places that braces may name
_RANGE = re.compile(r"\{(-?[0-9]{1,4000})\.\.(-?[0-9]{1,4000})(?:\.\.-?([0-9]{1,4000}))?\}")  # braces with numbers from and to


def is_remote(place: str) -> bool:
    """Whether a checked place is an address and not a path on this machine."""
    return bool(ADDRESS.match(place))


def normalize(place: str) -> str:
    """The place as it is kept: an address, or an absolute path. Raises DataError for addresses that are not read.

    A name such as `pipe:cat x` or `a.tar::pipe:ls` is a path like any other: no part of a place is ever run.
    """
    found = ADDRESS.match(place)
    if not found:
        return os.path.abspath(place)
    scheme = found[1].lower()
    if scheme == "file":
        return os.path.abspath(place[len("file://") :])
    if scheme not in REMOTE:
        raise DataError(
            f"{redact_url(place)} cannot be read: of addresses only {', '.join(f'{s}://' for s in REMOTE)} are. Copy it there, or to this machine."
        )
    try:
        parts = urlsplit(place)
    except ValueError:  # its text may hold the password
        raise DataError(f"{redact_url(place)} is no address. Correct it.") from None
    if scheme != "s3" and (parts.query or parts.fragment):
        raise DataError(
            f"{redact_url(place)} has a query, which would put its secret into every snapshot, and may run out. "
            "Give s3://bucket/key with the credentials in the environment, or an address that needs none."
        )
    if "@" in parts.netloc:
        raise DataError(f"{redact_url(place)} holds a password. Give it without; dev2pro keeps no secrets in snapshots.")
    return scheme + place[len(scheme) :]


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
        raise DataError(f"{what}: {redact_url(pattern)} names more than {MOST:,} places. Correct the numbers in its braces.")
    found = {one: _matches(one) for one in patterns}
    for one, places in found.items():
        if not places:
            among = f", one of {redact_url(pattern)}" if one != pattern else ""
            raise DataError(f"{what}: nothing matches {redact_url(one)}{among}. Correct the path or address, or bring the file back.")
    return [place for places in found.values() for place in places]


def _matches(pattern: str) -> list[str]:
    place = normalize(pattern)
    if not is_remote(place):
        return [place] if os.path.lexists(place) else sorted(glob.glob(place))
    if place.startswith("s3://"):
        return _listed(place) if re.search(r"[*?\[]", place) else [place]
    if "*" in place:
        raise DataError(f"{redact_url(pattern)} cannot be listed: http has no folders. Name the shards with braces, such as {{000000..000099}}.tar.")
    return [place]


def _listed(place: str) -> list[str]:
    try:
        return [f"s3://{name}" for name in sorted(s3.client().glob(place))]
    except Exception as error:  # botocore's are many, and their texts may name keys
        raise (TryAgainError if s3.is_transient(error) else DataError)(
            f"{redact_url(place)} cannot be listed ({type(error).__name__}). Check the address, the network, and {s3.CURE}"
        ) from None
