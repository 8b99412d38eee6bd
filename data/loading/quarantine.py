"""Records unusable samples once each, across restarts. Raises when their number shows that the data set is broken."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from data.shards.snapshot import Snapshot
from dev2pro.errors import DataError
from dev2pro.redact import redact_url

MAX_FAULTS = 50  # samples of one shard, or of the whole set ...
MAX_SHARE = 0.001  # ... or this share of them, if that is more
MAX_SMALL_SHARE = 0.1  # of sets and shards so small that 50 would be most of them


@dataclass(frozen=True)
class Fault:
    """A sample whose bytes match the index but cannot be used, and the slot it was drawn for."""

    shard: str
    shard_sha256: str
    key: str
    key_number: int
    offset: int
    reason: str
    step: int
    slot: int


class Quarantine:
    """A file of JSON lines; `python -m data.snapshot --without` takes it. Without a path it only counts. `faults`: all of them."""

    def __init__(self, snapshot: Snapshot, path: str | None = None) -> None:
        self.path = path
        self._sizes = {shard.sha256: shard.samples for shard in snapshot.shards}
        self.faults: list[Fault] = []
        self._known: set[tuple[str, int]] = set()
        self._reasons: Counter[str] = Counter()
        if path and os.path.exists(path):
            with open(path, "r+") as file:
                whole = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
                file.truncate(sum(len(line.encode()) for line in whole))  # a kill may have truncated the last one
            self._count(Fault(**json.loads(line)) for line in whole)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, faults: Iterable[Fault]) -> None:
        """Appends new faults. Raises DataError if a shard or the data set exceeds the limit."""
        if not (fresh := self._count(faults)):
            return
        if self.path:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(asdict(fault)) + "\n" for fault in fresh)
        per_shard = Counter(sha256 for sha256, _ in self._known)
        for fault in fresh:
            self._check(per_shard[fault.shard_sha256], self._sizes[fault.shard_sha256], redact_url(fault.shard))
        self._check(len(self._known), sum(self._sizes.values()), "the data set")

    def _count(self, faults: Iterable[Fault]) -> list[Fault]:
        fresh = []
        for fault in faults:
            if (name := (fault.shard_sha256, fault.key_number)) not in self._known:
                self._known.add(name)
                self._reasons[fault.reason] += 1
                fresh.append(fault)
        self.faults += fresh
        return fresh

    def _check(self, bad: int, total: int, what: str) -> None:
        if bad > max(1, min(MAX_FAULTS, MAX_SMALL_SHARE * total), MAX_SHARE * total):
            top = "; ".join(f"{count} times: {reason}" for reason, count in self._reasons.most_common(3))
            raise DataError(
                f"{bad} of {total} samples of {what} cannot be used ({top}). So the data is broken, and not a few pictures. "
                f"See {self.path or 'above'}; repair the data and index it again, or leave out what that file names with "
                "`python -m data.snapshot --without`."
            )
