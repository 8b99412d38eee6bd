"""The feed over the real stream and encoders: what is encoded in advance, what per batch, and that both are equal."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.sources import DataConfig, RunSnapshots
from data.storage.transport import ReadConfig
from dev2pro.artifacts import record
from dev2pro.errors import ConfigError, DataError
from dev2pro.models import flux1
from dev2pro.models.encodings import noise_batch
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.training import distributed, feed
from dev2pro.training.distributed import HardwareConfig
from dev2pro.training.feed import CachedFeed, StreamingFeed
from dev2pro.training.prefetch import Prefetcher, tensors

HARDWARE = HardwareConfig(device="cpu", threads=1)


@pytest.fixture
def model(tiny) -> ModelConfig:
    return ModelConfig(path=str(tiny), usual_guidance=3.5, max_sequence_length=8)


@pytest.fixture
def config(tiny_data, tmp_path) -> DataConfig:
    return DataConfig(
        name="x", train=[f"{tiny_data}/shard.tar"], heldout=[f"{tiny_data}/heldout.tar"], resolution=32, bucket_step=8,
        read=ReadConfig(workers=0, cache=f"{tmp_path}/cache"),
    )  # fmt: skip


def prepared(model: ModelConfig, config: DataConfig, out: Path, gb: float = 1.0, batch: int = 4):
    snapshots = RunSnapshots(config, str(out), resuming=False)
    hardware = replace(HARDWARE, encodings_gb=gb)
    return feed.prepare(model, snapshots.stream(0, batch), snapshots.reference(2), hardware, distributed.accelerator(hardware))


def test_a_cached_feed_gives_the_same_samples_as_a_streaming_one(model, config, tmp_path):
    cached, _, _ = prepared(model, config, tmp_path)
    streaming, prompt_encoder, _ = prepared(model, config, tmp_path, gb=1e-5)  # room for two captions
    assert isinstance(cached, CachedFeed)
    assert isinstance(streaming, StreamingFeed)
    assert prompt_encoder._encoders.pipeline.text_encoder_2 is not None  # both stay where captions do not fit
    slots = [range(0, 3), range(3, 4)]
    for prepared_feed in (cached, streaming):
        prepared_feed.begin(0, 4, slots)
    for step in range(4):
        for some in slots:
            precomputed, now = cached.get_batch(step, some), streaming.get_batch(step, some)
            for name in ("mean", "std"):
                torch.testing.assert_close(getattr(precomputed, name), getattr(now, name), rtol=0, atol=1e-5)
            assert torch.equal(precomputed.prompt, now.prompt)
            assert torch.equal(precomputed.pooled, now.pooled)
            assert precomputed.grid == now.grid == (4, 4)


@pytest.mark.parametrize("drawn", [{"flip": True}, {"crop": "random"}])
def test_random_samples_are_streamed_with_precomputed_captions(model, config, tmp_path, drawn):
    prepared_feed, _, _ = prepared(model, replace(config, **drawn), tmp_path)
    assert isinstance(prepared_feed, StreamingFeed)
    assert prepared_feed.encoders.pipeline.text_encoder is None  # the captions fit, so the text encoders are gone
    assert prepared_feed.encoders.pipeline.text_encoder_2 is None
    assert prepared_feed.encoders.pipeline.vae is not None
    prepared_feed.begin(2, 3, [range(4)])
    assert prepared_feed.get_batch(2, range(4)).mean.shape == (4, 16, 16)


def test_the_held_out_pictures_are_encoded_in_their_order(model, config, tmp_path, tiny_data):
    _, prompt_encoder, reference = prepared(model, config, tmp_path)
    assert len(reference) == 2
    assert torch.equal(reference.prompt, prompt_encoder.encode(["a handwritten four", "a handwritten five"])[0])


def test_a_sample_that_could_not_be_read_is_replaced_as_the_stream_would(model, config, tmp_path):
    prepared_feed, _, _ = prepared(model, config, tmp_path)
    stream = RunSnapshots(config, str(tmp_path), resuming=False).stream(0, 4)
    gone = int(stream.order.step(0).rows[1])
    broken = CachedFeed(stream, {row: one for row, one in prepared_feed.encodings.items() if row != gone}, prepared_feed.prompt_encoder, 8)
    row = next(row for row in (stream.order.substitute(0, 1, attempt) for attempt in range(100)) if row != gone)
    assert torch.equal(broken.get_batch(0, range(1, 2)).mean[0], prepared_feed.encodings[row][0])
    with pytest.raises(DataError, match="neither its sample nor 100 substitutes"):
        CachedFeed(stream, {}, prepared_feed.prompt_encoder, 8).get_batch(0, range(1))


def test_every_kind_of_size_must_fit_the_vae(model, config, tmp_path):
    with pytest.raises(ConfigError, match="30 pixels do not fit this model"):
        prepared(model, replace(config, resolution=30), tmp_path)
    with pytest.raises(ConfigError, match="pixels do not fit this model"):
        prepared(model, replace(config, resolution=24, bucket_step=4, aspect=2.0), tmp_path)


def test_text_is_encoded_and_its_encoders_are_freed_before_the_first_picture(model, config, tmp_path, monkeypatch):
    """So that T5 and VAE are never on the device together."""
    done = []
    for name in ("encode_text", "encode_images", "free"):
        method = getattr(Encoders, name)
        note = lambda self, *args, name=name, method=method: done.append(args if name == "free" else name) or method(self, *args)  # noqa: E731
        monkeypatch.setattr(Encoders, name, note)
    prepared(model, config, tmp_path)
    free = done.index(("text_encoder", "text_encoder_2"))
    assert set(done[:free]) == {"encode_text"}
    assert set(done[free + 1 : -1]) == {"encode_images"}
    assert done[-1] == ("vae",)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_that_is_prepared_ahead_gives_the_same_micro_batches(model, config, tmp_path, workers):
    """Read, encoded and noised in the prefetcher's thread, as on a GPU."""
    drawn = replace(config, flip=True, crop="random", read=replace(config.read, workers=workers))
    seen, scheduler = [], flux1.scheduler_settings(model.path)
    for ahead in (False, True):
        streaming, prompt_encoder, _ = prepared(model, drawn, tmp_path, gb=1e-5)
        assert isinstance(streaming, StreamingFeed)

        def make(step: int, slots: range, streaming=streaming, prompt_encoder=prompt_encoder):
            return noise_batch(streaming.get_batch(step, slots), prompt_encoder.empty, scheduler, 0.5, 0, step, slots)

        slots = [range(0, 3), range(3, 4)]
        with Prefetcher(streaming, make, range(1, 4), slots, torch.device("cpu"), ahead=ahead) as prefetcher:
            seen.append([tensor for step in range(1, 4) for some in slots for tensor in tensors(prefetcher.get(step, some))])
    assert len(seen[0]) == 3 * 2 * 8
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


def test_pixels_reach_the_device_as_bytes(config, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(feed, "to_device", lambda tensor, device: sent.append((tensor.dtype, device)) or tensor)
    (batch,) = RunSnapshots(config, str(tmp_path), resuming=False).reference(1)
    assert feed.pixels(batch, torch.device("cuda")).dtype == torch.float32
    assert sent == [(torch.uint8, torch.device("cuda"))]


def test_pixels_are_channels_first_from_minus_one_to_one(config, tmp_path):
    (batch,) = RunSnapshots(config, str(tmp_path), resuming=False).reference(1)
    pixels = feed.pixels(batch)
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels[0, :, 5, 7], batch.pixels[0, 5, 7].float() / 127.5 - 1)


def test_fingerprints_tell_what_matters(model, tiny):
    first, second = (feed.fingerprints(feed.Encoders(model, torch.float32, torch.device("cpu")), [(32, 32)], feed.STORABLE) for _ in range(2))
    assert first == second
    encoders = feed.Encoders(model, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        next(encoders.pipeline.vae.parameters()).add_(1e-3)
    third = feed.fingerprints(encoders, [(64, 64)], feed.STORABLE)
    assert third["text"] == first["text"]
    assert {key for key in third["latents"] if third["latents"][key] != first["latents"][key]} == {"vae", "sizes"}
    feed.check_stored(first, second)
    with pytest.raises(DataError, match=r"The stored latents were made in another way \(vae is .* there and .* here; sizes is"):
        feed.check_stored(first, third)
    bfloat = feed.fingerprints(feed.Encoders(model, torch.bfloat16, torch.device("cpu")), [(32, 32)], ["text"])
    with pytest.raises(DataError, match="dtype is float32 there and bfloat16 here"):
        feed.check_stored(first, bfloat)
    small = feed.fingerprints(feed.Encoders(model, torch.float32, torch.device("cpu"), int8=True), [(32, 32)], feed.STORABLE)
    assert small["latents"] == first["latents"]
    for stored, wanted, message in ((first, small, "int8 is None there and True here"), (small, first, "int8 is True there and None here")):
        with pytest.raises(DataError, match=message):
            feed.check_stored(stored, wanted)
    longer = feed.fingerprints(feed.Encoders(replace(model, max_sequence_length=9), torch.float32, torch.device("cpu")), [(32, 32)], ["text"])
    with pytest.raises(DataError, match="max_sequence_length is 8 there and 9 here"):
        feed.check_stored(first, longer)


def test_int8_encoders_are_part_of_the_run(model, config, tmp_path, monkeypatch):
    from torchao.quantization import Int8Tensor

    kinds, free = set(), Encoders.free
    monkeypatch.setattr(Encoders, "free", lambda self, *parts: kinds.update(_kinds(self) if "text_encoder_2" in parts else ()) or free(self, *parts))
    snapshots, hardware = RunSnapshots(config, str(tmp_path), resuming=False), replace(HARDWARE, int8_encoders=True)
    feed.prepare(model, snapshots.stream(0, 4), snapshots.reference(2), hardware, distributed.accelerator(hardware))
    assert kinds == {Int8Tensor}
    assert record.identity(hardware) != record.identity(HARDWARE)


def _kinds(encoders: Encoders) -> set[type]:
    return {type(m.weight.data) for m in encoders.pipeline.text_encoder_2.modules() if isinstance(m, torch.nn.Linear)}
