"""Feeds encoded samples to the training: what fits into memory is encoded once, ahead, and the encoders let go; the rest as it comes."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from dev2pro.errors import DataError
from dev2pro.log import Progress
from dev2pro.models.encodings import TEXT_PARTS, EncodedBatch, PromptEncoder, joined
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.training.distributed import DTYPES, HardwareConfig

TOGETHER = 16  # samples the VAE is given at a time ahead of training; always the same ones, because its last bits depend on the others
Size = tuple[int, int]  # width, height in pixels
MADE = ("latents", "text")  # what stages.encode can store beside a picture
ATTEMPTS = 100  # substitutes tried for one slot, as in the stream


class Batch(Protocol):
    """Samples of one size as the data room gives them: pixels (B, H, W, 3) uint8, or what was stored of them."""

    size: Size
    rows: list[int]
    captions: list[str]
    pixels: Tensor | None
    stored: dict[str, Tensor]


class Source(Protocol):
    """Where they come from: the data room's Stream. `fixed` says that nothing about a sample is drawn: no crop, mirroring or caption."""

    order: Any
    parts: tuple[str, ...]

    @property
    def fixed(self) -> bool:
        """See above."""

    def steps(self, first: int, last: int, slots: Sequence[range]) -> Iterator[Any]:
        """Batches for the slots of every step."""

    def rows(self, rows: Sequence[int], size: Size, batch: int) -> Iterator[Any]:
        """Samples by number."""

    def captions(self) -> tuple[int, Iterator[str]]:
        """About how many different captions there are, and all of them."""


class StreamingFeed:
    """Encodes each batch as it comes from the stream, or takes what was stored beside the pictures."""

    def __init__(self, stream: Source, encoders: Encoders, texts: PromptEncoder) -> None:
        self.stream, self.encoders, self.texts = stream, encoders, texts

    def begin(self, first: int, last: int, slots: Sequence[range]) -> None:
        """Starts the stream at a step."""
        self._batches = self.stream.steps(first, last, slots)

    def get_batch(self, step: int, slots: range) -> EncodedBatch:
        """The samples for the next slots; they come in order."""
        return encode(next(self._batches), self.encoders, self.texts)


class CachedFeed:
    """Looks up what was encoded ahead: sample -> (mean, deviation, caption)."""

    def __init__(self, stream: Source, known: Mapping[int, tuple[Tensor, Tensor, str]], texts: PromptEncoder, side: int) -> None:
        self.order, self.known, self.texts, self.side = stream.order, known, texts, side

    def begin(self, first: int, last: int, slots: Sequence[range]) -> None:
        """There is nothing to start."""

    def get_batch(self, step: int, slots: range) -> EncodedBatch:
        """The samples for any slots of any step; one that could not be read is replaced as the stream would replace it."""
        asked = self.order.step(step)
        found = [self._usable(int(asked.rows[slot]), step, slot) for slot in slots]
        means, deviations, captions = zip(*found, strict=True)
        mean, std = (torch.stack(some).to(self.texts.device) for some in (means, deviations))
        return EncodedBatch(mean, std, *self.texts.encode(captions), (asked.size[1] // self.side, asked.size[0] // self.side))

    def _usable(self, row: int, step: int, slot: int) -> tuple[Tensor, Tensor, str]:
        for attempt in range(ATTEMPTS):
            if row in self.known:
                return self.known[row]
            row = self.order.substitute(step, slot, attempt)
        raise DataError(f"Step {step}: neither its sample nor {ATTEMPTS} substitutes could be used. See the quarantine file, and index again.")


Feed = StreamingFeed | CachedFeed


def prepare(
    model: ModelConfig, stream: Source, heldout: Iterator[Any], hardware: HardwareConfig, accelerator: Accelerator
) -> tuple[Feed, PromptEncoder, EncodedBatch]:
    """The feed, the captions' encoder, and all of `heldout`, batches of one size, encoded.

    What fits into `hardware.encodings_gb` is encoded now and its encoders let go, before a transformer needs the room: all captions if they
    fit, and all latents too if nothing about a sample is drawn. Raises ConfigError for sizes that do not fit the VAE, DataError for stored
    encodings that were made in another way.
    """
    encoders, limit = Encoders(model, DTYPES[hardware.dtype], accelerator.device), hardware.encodings_gb * 1e9
    for size in stream.order.buckets:
        encoders.grid(size)
    stored = {part for part in MADE if part in stream.parts}
    check_stored({part: stream.order.snapshot.encodings[part] for part in stored}, fingerprints(encoders, stream.order.buckets, stored))
    texts = PromptEncoder(model, encoders, limit)
    if not (references := [encode(batch, encoders, texts) for batch in heldout if len(batch.rows)]):
        raise DataError("No held-out picture could be read. Look at the pictures of data.heldout.")
    count, captions = stream.captions()
    text_bytes = 0 if "text" in stored else count * encoders.text_bytes()
    tokens, channels = encoders.token_shape(stream.order.buckets[-1])
    latent_bytes = 2 * 4 * tokens * channels * len(stream.order.snapshot)
    if text_bytes <= limit:
        texts.precompute(captions if text_bytes else [])
    if stream.fixed and text_bytes + latent_bytes <= limit:
        feed: Feed = CachedFeed(stream, _all_latents(stream, encoders, accelerator.is_main_process), texts, encoders.pixels_per_token)
    else:
        feed = StreamingFeed(stream, encoders, texts)
    if isinstance(feed, CachedFeed) or "latents" in stored:
        encoders.free("vae")
    return feed, texts, joined(references)


def fingerprints(encoders: Encoders, sizes: Sequence[Size], parts: Collection[str]) -> dict[str, dict[str, Any]]:
    """How latents and text are made here; what was stored by another VAE, for other sizes and so on is of no use."""
    dtype = str(encoders.dtype).removeprefix("torch.")
    made: dict[str, Callable[[], dict[str, Any]]] = {
        "latents": lambda: {"vae": encoders.weights("vae"), "crop": "center", "sizes": [list(size) for size in sizes]},
        "text": lambda: {"encoders": encoders.weights(*TEXT_PARTS), "max_sequence_length": encoders.max_sequence_length},
    }
    return {part: {"version": 1, "dtype": dtype, **made[part]()} for part in parts}


def check_stored(there: dict[str, dict[str, Any]], here: dict[str, dict[str, Any]]) -> None:
    """Raises DataError where encodings were made in another way than this run would make them."""
    for part, wanted in here.items():
        if differing := [f"{key} is {there[part].get(key)} there and {wanted[key]} here" for key in wanted if there[part].get(key) != wanted[key]]:
            raise DataError(
                f"The stored {part} were made in another way ({'; '.join(differing)}). Encode them again with stages.encode, or drop data.stored."
            )


def _all_latents(stream: Source, encoders: Encoders, main: bool) -> dict[int, tuple[Tensor, Tensor, str]]:
    known: dict[int, tuple[Tensor, Tensor, str]] = {}
    with Progress("encoding pictures", len(stream.order.snapshot), main) as progress:
        for size, rows in stream.order.rows_by_size():
            for batch in stream.rows(rows, size, TOGETHER):
                mean, std = encoders.encode_images(pixels(batch))
                known |= {row: (m, s, c) for row, m, s, c in zip(batch.rows, mean.float().cpu(), std.float().cpu(), batch.captions, strict=True)}
                progress.step(len(known))
    return known


def encode(batch: Batch, encoders: Encoders, texts: PromptEncoder) -> EncodedBatch:
    """What the frozen parts say about a batch, or said when it was stored."""
    stored, device = batch.stored, texts.device
    mean, std = (stored["latents.mean"], stored["latents.std"]) if "latents.mean" in stored else encoders.encode_images(pixels(batch))
    prompt, pooled = (stored["text.prompt"], stored["text.pooled"]) if "text.prompt" in stored else texts.encode(batch.captions)
    return EncodedBatch(
        mean.to(device, torch.float32),
        std.to(device, torch.float32),
        prompt.to(device, texts.dtype),
        pooled.to(device, texts.dtype),
        encoders.grid(batch.size),
        tuple(batch.captions),
    )


def pixels(batch: Batch) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    assert batch.pixels is not None
    return batch.pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
