"""Snapshots without real shards, for arithmetic on sizes and counts."""

from collections.abc import Sequence

import numpy as np

from data.shards.sidecar import COLUMNS
from data.shards.snapshot import Snapshot, _id
from data.shards.table import columns_sum


def snapshot(shards: Sequence[int], sides: Sequence[tuple[int, int]] = ((64, 64),), repeats: Sequence[int] = ()) -> Snapshot:
    """`shards`: samples per shard. The samples' (width, height) cycle through `sides`."""
    count = sum(shards)
    columns = {name: np.zeros(count, kind) for name, kind in COLUMNS.items() if not name.startswith(("latents", "text"))}
    columns["width"][:], columns["height"][:] = np.resize(np.array(sides), (count, 2)).T if count else (0, 0)
    columns["key"][:] = np.arange(count)
    head = {
        "sources": [], "folders": {}, "filters": {}, "encodings": {},
        "shards": [
            {"place": f"/nowhere/{i:06d}.tar", "stamp": {"size": 1, "etag": "", "modified": ""}, "sha256": f"{i:064x}", "samples": n,
             "repeat": repeats[i] if repeats else 1}
            for i, n in enumerate(shards)
        ],
    }  # fmt: skip
    return Snapshot({**head, "id": _id(head, columns_sum(columns))}, columns)
