"""Writes a shard that can be trained on: one tar, complete or not there, and its index."""

import os
from collections.abc import Iterable
from typing import Any

import webdataset

from data import index
from data.shards import sidecar
from data.storage.transport import Transport
from dev2pro.errors import DataError
from dev2pro.redact import redact_url


def write(samples: Iterable[dict[str, Any]], name: str, partial: str, transport: Transport, repeat: int = 1) -> None:
    """Writes samples for webdataset's writer to the path or address `name`, by way of the local file `partial`, and its index.

    The same samples give the same bytes. `repeat`: how often an epoch takes them. Raises DataError if the shard cannot be read back whole.
    """
    with open(partial, "wb") as file:
        with webdataset.TarWriter(file, mtime=0, user="dev2pro", group="dev2pro") as shard:
            for sample in samples:
                shard.write(sample)
        file.flush()
        os.fsync(file.fileno())
    transport.move(partial, name)
    add_index(name, transport, repeat)


def add_index(name: str, transport: Transport, repeat: int = 1) -> None:
    """Writes the index of a shard unless it is there. Raises DataError if a sample cannot be read back."""
    outcome = index.index(name, transport, empty_captions=True, allow_partial=False, repeat=min(repeat, sidecar.MAX_REPEAT))
    if outcome.error or outcome.rejected:
        raise DataError(f"The shard {redact_url(name)} cannot be read back: {outcome.error or outcome.rejected[0]['reason']}")
