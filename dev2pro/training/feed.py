"""Feeds encoded samples to training: what fits into host memory is encoded once, in advance and by all ranks, and the encoders are freed; the
rest is encoded batch by batch."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dev2pro.errors import DataError
from dev2pro.log import Progress
from dev2pro.models.encodings import TEXT_PARTS, EncodedBatch, PromptEncoder, concatenate
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.models.transfer import to_device
from dev2pro.training.distributed import HardwareConfig

PICTURES = 16  # read and encoded together where pictures are encoded once; always the same ones, because the last bits depend on the others
Size = tuple[int, int]  # width, height in pixels
STORABLE = ("latents", "text")  # what stages.encode can store beside a picture
CPU = torch.device("cpu")
ATTEMPTS = 100  # substitutes tried for one slot, as in the stream


class Batch(Protocol):
    """Samples of one size as `data/` yields them: pixels (B, H, W, 3) uint8, or their stored encodings."""

    size: Size
    rows: list[int]
    captions: list[str]
    pixels: Tensor | None
    stored: dict[str, Tensor]


class Source(Protocol):
    """The source of batches: `data/`'s Stream. `fixed`: nothing about a sample is random, no crop, mirroring or caption.

    `background`: the colour behind transparent pixels, "" for white.
    """

    order: Any
    background: str
    parts: tuple[str, ...]
    quarantine: Any

    @property
    def fixed(self) -> bool:
        """See above."""

    def steps(self, first: int, last: int, slots: Sequence[range]) -> Iterator[Any]:
        """Batches for the slots of every step."""

    def rows(self, rows: Sequence[int], size: Size, batch: int) -> Iterator[Any]:
        """Samples by number."""

    def captions(self) -> tuple[int, Iterator[str]]:
        """The approximate number of different captions, and all of them."""


class StreamingFeed:
    """Encodes each batch of the stream, or uses encodings stored in the shards."""

    def __init__(self, stream: Source, encoders: Encoders, prompt_encoder: PromptEncoder) -> None:
        self.stream, self.encoders, self.prompt_encoder = stream, encoders, prompt_encoder

    def begin(self, first: int, last: int, slots: Sequence[range]) -> None:
        """Starts the stream at a step."""
        self._batches = self.stream.steps(first, last, slots)

    def get_batch(self, step: int, slots: range) -> EncodedBatch:
        """The samples for the next slots; call in order."""
        return encode(next(self._batches), self.encoders, self.prompt_encoder)


class CachedFeed:
    """Looks up encodings computed in advance: sample -> (mean, deviation, caption)."""

    def __init__(self, stream: Source, encodings: Mapping[int, tuple[Tensor, Tensor, str]], prompt_encoder: PromptEncoder, side: int) -> None:
        self.order, self.encodings, self.prompt_encoder, self.side = stream.order, encodings, prompt_encoder, side

    def begin(self, first: int, last: int, slots: Sequence[range]) -> None:
        """Does nothing."""

    def get_batch(self, step: int, slots: range) -> EncodedBatch:
        """The samples for any slots of any step; an unreadable sample gets the same substitute as in the stream."""
        requested = self.order.step(step)
        samples = [self._find_readable(int(requested.rows[slot]), step, slot) for slot in slots]
        means, deviations, captions = zip(*samples, strict=True)
        mean, std = (to_device(torch.stack(tensors), self.prompt_encoder.device) for tensors in (means, deviations))
        grid = (requested.size[1] // self.side, requested.size[0] // self.side)
        return EncodedBatch(mean, std, *self.prompt_encoder.encode(captions), grid, captions)

    def _find_readable(self, row: int, step: int, slot: int) -> tuple[Tensor, Tensor, str]:
        for attempt in range(ATTEMPTS):
            if row in self.encodings:
                return self.encodings[row]
            row = self.order.substitute(step, slot, attempt)
        raise DataError(f"Step {step}: neither its sample nor {ATTEMPTS} substitutes could be used. See the quarantine file, and index again.")


Feed = StreamingFeed | CachedFeed


def prepare(
    model: ModelConfig, stream: Source, heldout: Iterator[Any], hardware: HardwareConfig, accelerator: Accelerator,
    rewrite: Callable[[str], str] | None = None,
) -> tuple[Feed, PromptEncoder, EncodedBatch]:  # fmt: skip
    """Returns the feed, the prompt encoder, and all of `heldout`, batches of one size, encoded. The loss also needs `rewrite` of every caption.

    What fits into `hardware.encodings_gb` is encoded now and its encoders are freed, before the transformer is loaded: all captions if they
    fit, and all latents too if nothing about a sample is random. Text comes first, so that T5 leaves the device before the VAE comes.
    Raises ConfigError for sizes that do not fit the VAE, DataError for stored encodings of other models or settings.
    """
    encoders, limit = Encoders(model, hardware.encoders, accelerator.device, int8=hardware.int8_encoders), hardware.encodings_gb * 1e9
    for size in stream.order.buckets:
        encoders.grid(size)
    stored = {part for part in STORABLE if part in stream.parts}
    check_stored(
        {part: stream.order.snapshot.encodings[part] for part in stored}, fingerprints(encoders, stream.order.buckets, stored, stream.background)
    )
    if not (references := [batch for batch in heldout if len(batch.rows)]):
        raise DataError("No held-out picture could be read. Look at the pictures of data.heldout.")
    prompt_encoder = PromptEncoder(model, encoders, limit)
    reference_text = [_text(batch, prompt_encoder) for batch in references]
    count, captions = stream.captions()
    needed: list[Callable[[str], str]] = [*([] if "text" in stored else [str]), *([rewrite] if rewrite else [])]  # of every caption
    text_bytes = len(needed) * count * encoders.text_bytes()
    tokens, channels = encoders.token_shape(stream.order.buckets[-1])
    latent_bytes = 2 * 4 * tokens * channels * len(stream.order.snapshot)
    if text_bytes <= limit:
        prompt_encoder.precompute((text(caption) for caption in captions for text in needed) if needed else [], accelerator)
    encoded = concatenate([_join(batch, _latents(batch, encoders), text, encoders) for batch, text in zip(references, reference_text, strict=True)])
    if stream.fixed and text_bytes + latent_bytes <= limit:
        feed: Feed = CachedFeed(stream, _encode_all(stream, encoders, accelerator), prompt_encoder, encoders.pixels_per_token)
    else:
        feed = StreamingFeed(stream, encoders, prompt_encoder)
    if isinstance(feed, CachedFeed) or "latents" in stored:
        encoders.free("vae")
    return feed, prompt_encoder, encoded


def fingerprints(encoders: Encoders, sizes: Sequence[Size], parts: Collection[str], background: str = "") -> dict[str, dict[str, Any]]:
    """What identifies latents and text encodings of this run: encoder weights, sizes, dtype, a background but white. Stored encodings must match.

    Call it before anything is encoded, which may round weights.
    """
    dtype = str(encoders.dtype).removeprefix("torch.")
    recipes: dict[str, Callable[[], dict[str, Any]]] = {
        "latents": lambda: {
            "vae": encoders.weights("vae"),
            "crop": "center",
            "sizes": [list(size) for size in sizes],
            **({"background": background} if background else {}),
        },
        "text": lambda: {
            "encoders": encoders.weights(*TEXT_PARTS),
            "max_sequence_length": encoders.max_sequence_length,
            **({"int8": True} if encoders.int8 else {}),
        },
    }
    return {part: {"version": 1, "dtype": dtype, **recipes[part]()} for part in parts}


def check_stored(stored: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    """Raises DataError if stored encodings differ from those of this run."""
    for part, wanted in expected.items():
        keys = [key for key in {**wanted, **stored[part]} if stored[part].get(key) != wanted.get(key)]
        if differing := [f"{key} is {stored[part].get(key)} there and {wanted.get(key)} here" for key in keys]:
            raise DataError(
                f"The stored {part} were made in another way ({'; '.join(differing)}). Encode them again with stages.encode, or drop data.stored."
            )


def _encode_all(stream: Source, encoders: Encoders, accelerator: Accelerator) -> dict[int, tuple[Tensor, Tensor, str]]:
    """sample -> (mean, deviation, caption), on the CPU. The ranks take the batches in turn and send them to each other; all get all of them."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    encodings: dict[int, tuple[Tensor, Tensor, str]] = {}
    with Progress("encoding pictures", len(stream.order.snapshot), accelerator.is_main_process) as progress:
        for size, rows in stream.order.rows_by_size():
            mine = [row for number, row in enumerate(rows) if number // PICTURES % ranks == rank]
            batches = stream.rows(mine, size, PICTURES) if mine else iter(())
            for _ in range(-(-len(rows) // (PICTURES * ranks))):
                encodings |= _exchange(next(batches, None), size, encoders, accelerator)
                progress.step(len(encodings))
    stream.quarantine.add(gather_object(stream.quarantine.faults))
    return encodings


def _exchange(batch: Batch | None, size: Size, encoders: Encoders, accelerator: Accelerator) -> dict[int, tuple[Tensor, Tensor, str]]:
    """What `_encode_all` returns, of the batches of all ranks. A rank without a batch sends none, but it must call."""
    sent = torch.zeros(PICTURES, 2, *encoders.token_shape(size), device=encoders.device)
    if batch:
        sent[: len(batch.rows)] = torch.stack(_latents(batch, encoders), 1)
    received = accelerator.gather(sent).cpu().split(PICTURES)
    labels = gather_object([(batch.rows, batch.captions) if batch else ([], [])])
    return {
        row: (mean, std, caption)
        for (rows, captions), latents in zip(labels, received, strict=True)
        for row, caption, (mean, std) in zip(rows, captions, latents, strict=False)
    }


def encode(batch: Batch, encoders: Encoders, prompt_encoder: PromptEncoder) -> EncodedBatch:
    """Encodes a batch, or takes its stored encodings."""
    return _join(batch, _latents(batch, encoders), _text(batch, prompt_encoder), encoders)


def _latents(batch: Batch, encoders: Encoders) -> tuple[Tensor, Tensor]:
    """Mean and deviation (B, S, C) float32 on the device."""
    if "latents.mean" in batch.stored:
        mean, std = (to_device(batch.stored[name], encoders.device) for name in ("latents.mean", "latents.std"))
    else:
        mean, std = encoders.encode_images(pixels(batch, encoders.device))
    return mean.float(), std.float()


def _text(batch: Batch, prompt_encoder: PromptEncoder) -> tuple[Tensor, Tensor]:
    """Prompts (B, L, D) and pooled prompts (B, P) on the device."""
    if "text.prompt" not in batch.stored:
        return prompt_encoder.encode(batch.captions)
    prompt, pooled = (to_device(batch.stored[name], prompt_encoder.device).to(prompt_encoder.dtype) for name in ("text.prompt", "text.pooled"))
    return prompt, pooled


def _join(batch: Batch, latents: tuple[Tensor, Tensor], text: tuple[Tensor, Tensor], encoders: Encoders) -> EncodedBatch:
    return EncodedBatch(*latents, *text, encoders.grid(batch.size), tuple(batch.captions))


def pixels(batch: Batch, device: torch.device = CPU) -> Tensor:
    """(B, 3, H, W) in [-1, 1] on `device`, where the bytes become floats."""
    assert batch.pixels is not None
    return to_device(batch.pixels, device).permute(0, 3, 1, 2).float() / 127.5 - 1
