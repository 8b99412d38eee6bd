"""What a data set holds before anything is trained on it: counts, what is left out or altered, sizes, crops, captions, duplicates."""

import os
from typing import Any

import numpy as np

from data import captions, overlap
from data.loading.buckets import Size, nearest_bucket
from data.names import Names
from data.overlap import Overlap, Pairs
from data.shards import notes, sidecar
from data.shards.snapshot import Snapshot
from data.storage import urls
from data.storage.transport import ReadConfig, Transport
from dev2pro.errors import StageError
from dev2pro.escape import printable

MOST_INDEXES = 200  # shards whose indexes are read for what they reject
NAMED = 12  # pairs and examples in the report
ENLARGED, CROPPED = 1.5, 0.25  # factor and share from which a picture is counted
BARS = 12  # of a histogram


def collect(train: Snapshot, heldout: Snapshot | None, found: Overlap | None, read: ReadConfig, sizes: list[Size], assigned: np.ndarray | None,
            caption_facts: dict[str, Any], near: Pairs | None = None) -> dict[str, Any]:  # fmt: skip
    """The facts as JSON values. `assigned`: the number of each picture's bucket, if not the nearest of `sizes`; `near`: lookalikes in training."""
    names, columns = Names(train, read), train.columns
    assigned = nearest_bucket(columns["width"], columns["height"], sizes) if assigned is None else assigned
    left_out, altered = _left_out(train, read)
    same = overlap.duplicates(train)
    facts = {
        "pictures": len(train), "heldout": len(heldout or ()), "sources": _sources(train, names), "left_out": left_out, "altered": altered,
        "captions": {key: value for key, value in caption_facts.items() if key != "lengths"},
        "duplicates": _pairs(same, names, names), "lookalikes": _pairs(near or {}, names, names), "crops": _crops(columns, sizes, assigned, names),
        "overlap": None,
        "histograms": {
            "sides": _histogram(np.sqrt(columns["width"].astype(float) * columns["height"])),
            "buckets": [[f"{w}×{h}", int(np.sum(assigned == number))] for number, (w, h) in enumerate(sizes) if np.any(assigned == number)],
            "captions": _histogram(*np.array(caption_facts["lengths"]).T) if caption_facts["lengths"] else [],
        },
    }  # fmt: skip
    if heldout is not None and found is not None:
        held_names = Names(heldout, read)
        facts["overlap"] = {"same": _pairs(found.same, held_names, names), "near": _pairs(found.near, held_names, names), "left": found.left}
    return {**facts, "findings": _findings(facts, caption_facts)}


def _findings(facts: dict[str, Any], caption_facts: dict[str, Any]) -> list[str]:
    """Everything that stands out, one sentence each, the most important first."""
    said, of, crossed = list[str](), f"of {facts['pictures']:,}", facts["overlap"]
    if crossed and crossed["same"]["count"]:
        said.append(f"held-out pictures that are also trained on, which a stage refuses: {_named(crossed['same'], 'is', facts['heldout'])}.")
    if crossed and crossed["near"]["count"]:
        said.append(
            f"held-out pictures that look like one that is trained on: {_named(crossed['near'], 'looks like', facts['heldout'])}. "
            "If they are copies, the held-out loss says too little; take them out of one."
        )
    if crossed and crossed["left"]:
        said.append(crossed["left"])
    said += captions.sentences(caption_facts)
    for what, verb in (("duplicates", "is"), ("lookalikes", "looks like")):
        if facts[what]["count"]:
            words = {"duplicates": "pictures that are there twice, byte for byte", "lookalikes": "pictures that look like another one"}[what]
            said.append(f"{words}: {_named(facts[what], verb, facts['pictures'])}.")
    crops = facts["crops"]
    if crops["enlarged"]["count"]:
        worst = crops["enlarged"]["examples"][0]
        said.append(
            f"pictures enlarged by more than {ENLARGED:g}: {crops['enlarged']['count']:,} {of} (most: {worst['name']}, by {worst['value']:.3g})."
        )
    if crops["cropped"]["count"]:
        worst = crops["cropped"]["examples"][0]
        said.append(
            f"pictures that lose more than {CROPPED:.0%} to the crop: {crops['cropped']['count']:,} {of} ({worst['name']}, {worst['value']:.0%})."
        )
    return said


def _named(pairs: dict[str, Any], verb: str, total: int) -> str:
    named = [f"{p['name']} {verb} {p['other']}" if p["name"] != p["other"] else p["name"] for p in pairs["examples"][: overlap.NAMED]]
    return f"{pairs['count']:,} of {total:,} ({'; '.join(named)})"


def _pairs(pairs: Pairs, names: Names, others: Names) -> dict[str, Any]:
    examples = [{"name": names(row), "other": others(other), "rows": [row, other]} for row, other in [*pairs.items()][:NAMED]]
    return {"count": len(pairs), "examples": examples}


def _sources(snapshot: Snapshot, names: Names) -> list[list[Any]]:
    """[folder or shard, pictures], the first NAMED and the rest together."""
    counts = dict[str, int]()
    for shard in snapshot.shards:
        place = printable(names.place(shard.url))
        counts[place] = counts.get(place, 0) + shard.samples
    listed = [[place, count] for place, count in counts.items()]
    rest = sum([*counts.values()][NAMED:])
    return listed[:NAMED] + ([[f"{len(listed) - NAMED:,} more", rest]] if rest else [])


def _crops(columns: Any, sizes: list[Size], assigned: np.ndarray, names: Names) -> dict[str, Any]:
    """Shares of the pictures that the crop cuts off, and by how much small ones are enlarged."""
    width, height = (columns[side].astype(float) for side in ("width", "height"))
    target = np.array(sizes)[assigned]
    scale = np.maximum(target[:, 0] / width, target[:, 1] / height)
    lost = 1 - target[:, 0] * target[:, 1] / (scale * width * scale * height)

    def worst(values: np.ndarray, limit: float) -> dict[str, Any]:
        rows = np.argsort(-values, kind="stable")[:NAMED]
        examples = [{"name": names(int(row)), "value": round(float(values[row]), 3)} for row in rows if values[row] > limit]
        return {"count": int(np.sum(values > limit)), "examples": examples}

    shares = [[f"{low}–{low + 10}%", int(np.sum((lost * 100 >= low) & (lost * 100 < low + 10)))] for low in range(0, 100, 10)]
    last = max((i for i, (_, count) in enumerate(shares) if count), default=0)
    return {"mean": round(float(lost.mean()), 4), "shares": shares[: last + 1], "cropped": worst(lost, CROPPED), "enlarged": worst(scale, ENLARGED)}


def _histogram(values: np.ndarray, weights: np.ndarray | None = None) -> list[list[Any]]:
    """[label, count] of up to BARS equal parts between round numbers."""
    low, high = int(values.min()), int(values.max())
    step = next(s for s in (m * 10**e for e in range(9) for m in (1, 2, 5)) if (high - low // s * s) // s < BARS)
    first = low // step * step
    counts = np.bincount((values.astype(int) - first) // step, weights, minlength=1)
    return [
        [f"{edge:,}" if step == 1 else f"{edge:,}–{edge + step - 1:,}", int(count)]
        for edge, count in zip(range(first, high + 1, step), counts, strict=False)
    ]


def _left_out(snapshot: Snapshot, read: ReadConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What was left out, and what was altered, of packed folders and of shards (their indexes): what, count, names, why."""
    left_out = [_note(f"files ending {kind}", note) for files in snapshot.left_out.values() for kind, note in files.items()]
    altered = [_note(notes.words(kind, "data.background"), note) for kind, note in snapshot.altered.items()]
    local = [shard for shard in snapshot.shards if not urls.is_remote(shard.url)]
    transport, rejected, filtered = Transport(read), dict[str, list[str]](), 0
    for shard in local[:MOST_INDEXES]:
        try:
            index = sidecar.read(shard.url, transport)
        except StageError:  # it lies somewhere else
            continue
        filtered += len(index) - shard.samples
        for bad in index.head["rejected"]:
            rejected.setdefault(str(bad["reason"]), []).append(f"{os.path.basename(shard.url)}/{bad['key']}")
    left_out += [{"what": "samples that the index rejects", "count": len(keys), "names": keys[:NAMED], "why": why} for why, keys in rejected.items()]
    if filtered:
        left_out.append({"what": "samples outside the snapshot's filters", "count": filtered, "names": [], "why": ""})
    return left_out, altered


def _note(what: str, note: dict[str, Any]) -> dict[str, Any]:
    names, why = [printable(name) for name in note["names"]], printable(note.get("why", ""))
    return {"what": printable(what), "count": note["count"], "names": names, "why": why}
