"""Notes the samples that could not be used, each once and across restarts, and stops when there are so many that the data is broken."""

import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from data.shards.snapshot import Snapshot
from data.storage import urls
from dev2pro.errors import DataError

MOST = 50  # samples of one shard, or of the whole set ...
SHARE = 0.001  # ... or this share of them, if that is more
SMALL_SHARE = 0.1  # of sets and shards so small that 50 would be most of them


@dataclass(frozen=True)
class Fault:
    """A sample whose bytes are as indexed and cannot be used, and the slot it was meant for."""

    shard: str
    shard_sha256: str
    key: str
    key_number: int
    offset: int
    reason: str
    step: int
    slot: int


class Quarantine:
    """A file of JSON lines; `python -m data.snapshot --without` takes it. Without a path it only counts."""

    def __init__(self, snapshot: Snapshot, path: str | None = None) -> None:
        self.path = path
        self._sizes = {shard.sha256: shard.samples for shard in snapshot.shards}
        self._known: set[tuple[str, int]] = set()
        self._reasons: Counter[str] = Counter()
        if path and os.path.exists(path):
            with open(path, "r+") as file:
                whole = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
                file.truncate(sum(len(line.encode()) for line in whole))  # a kill may have cut off the last one
            self._count(Fault(**json.loads(line)) for line in whole)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, faults: Iterable[Fault]) -> None:
        """Notes what is new. Raises DataError when a shard or the set has too many."""
        if not (fresh := self._count(faults)):
            return
        if self.path:
            with open(self.path, "a") as file:
                file.writelines(json.dumps(asdict(one)) + "\n" for one in fresh)
        per_shard = Counter(sha256 for sha256, _ in self._known)
        for one in fresh:
            self._check(per_shard[one.shard_sha256], self._sizes[one.shard_sha256], urls.redact_url(one.shard))
        self._check(len(self._known), sum(self._sizes.values()), "the data set")

    def _count(self, faults: Iterable[Fault]) -> list[Fault]:
        fresh = []
        for one in faults:
            if (name := (one.shard_sha256, one.key_number)) not in self._known:
                self._known.add(name)
                self._reasons[one.reason] += 1
                fresh.append(one)
        return fresh

    def _check(self, bad: int, of: int, what: str) -> None:
        if bad > max(1, min(MOST, SMALL_SHARE * of), SHARE * of):
            top = "; ".join(f"{count} times: {reason}" for reason, count in self._reasons.most_common(3))
            raise DataError(
                f"{bad} of {of} samples of {what} cannot be used ({top}). So the data is broken, and not a few pictures. "
                f"See {self.path or 'above'}; repair the data and index it again, or leave out what that file names with "
                "`python -m data.snapshot --without`."
            )
