"""What the ranks do together: encoding in advance, the probe and the previews give on two and three gloo ranks what they give on one."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat

from tests import launch

ROOT = Path(__file__).resolve().parents[3]
PICTURES, CAPTIONS = 100, 10  # of the bundled style
SCRIPT = """
import collections, hashlib, json, os, sys
sys.path.insert(0, os.getcwd())
from data.sources import DataConfig, RunSnapshots
from data.storage.transport import ReadConfig
from dev2pro.models import flux1, sampling
from dev2pro.models.flux1 import Encoders, ModelConfig
from dev2pro.training import distributed, feed
from dev2pro.training.heldout_probe import HeldoutProbe, ProbeConfig
from dev2pro.training.preview import Preview, PreviewConfig
out, dtype = sys.argv[1:]
calls = collections.Counter()
def count(owner, name, size):
    method = getattr(owner, name)
    def counted(*args, **kwargs):
        calls[name] += size(args)
        return method(*args, **kwargs)
    setattr(owner, name, counted)
count(Encoders, "encode_images", lambda args: len(args[1]))
count(Encoders, "encode_text", lambda args: len(args[1]))
hardware = distributed.HardwareConfig(device="cpu", threads=1, micro_batch=3, encoder_dtype=dtype)
accelerator = distributed.accelerator(hardware)
model = ModelConfig(path="data/miniature/pipeline", usual_guidance=3.5, max_sequence_length=16)
shards = "data/miniature/shards/chalk/"
data = DataConfig(name="chalk", train=[shards + "train-*.tar"], heldout=[shards + "heldout-*.tar"], resolution=32, bucket_step=8,
                  read=ReadConfig(workers=0))
with accelerator.main_process_first():
    snapshots = RunSnapshots(data, out, resuming=False, is_main_process=accelerator.is_main_process)
    snapshots.write_and_verify()
stream = snapshots.stream(0, 12, accelerator.process_index)
cached, prompt_encoder, held_out = feed.prepare(model, stream, snapshots.reference(7), hardware, accelerator)
def sha256(*tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().flatten().view(feed.torch.uint8).numpy())
    return digest.hexdigest()
found = {"kind": type(cached).__name__, "encoded": dict(calls)}
found["latents"] = {row: [*map(sha256, of_row[:2]), of_row[2]] for row, of_row in sorted(cached.encodings.items())}
found["text"] = {caption: sha256(*states) for caption, states in sorted(prompt_encoder._cache.items())}
calls.clear()
count(flux1.FluxTransformer2DModel, "forward", lambda args: 1)
transformer, scheduler = accelerator.prepare(flux1.load_transformer(model.path)), flux1.scheduler_settings(model.path)
found["wrapped"] = type(transformer).__name__
transformer.eval()
probe = HeldoutProbe(held_out, ProbeConfig(every=1, samples=7, bins=3), accelerator, scheduler=scheduler, seed=0, batch=hardware.micro_batch)
probe.set_teacher(flux1.load_transformer("data/miniature/teacher").eval())
found["measured"], found["probe"] = probe.measure(transformer, 1.0, 3.5), calls.pop("forward")
preview = Preview(PreviewConfig(pictures=4, steps=2, cfg_scale=1.0), model, hardware, held_out, prompt_encoder, scheduler, accelerator,
                  seed=0, out=out)
preview.draw(transformer, 0, 1.0)
found["preview"] = calls.pop("forward")
with open(f"{out}/found-{accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
accelerator.wait_for_everyone()
"""


def run(folder: Path, ranks: int, dtype: str) -> list[dict]:
    """What each rank found."""
    (folder / "script.py").write_text(SCRIPT)
    words = [str(folder / "script.py"), str(folder), dtype]
    launch.on_ranks(words, ranks) if ranks > 1 else launch.forks(words, [{}])
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "dtype"), [(2, "float32"), (3, "bfloat16")], ids=["two ranks", "three, which share nothing evenly, and bfloat16"])
def test_ranks_share_the_work_and_end_with_the_bits_of_one(ranks, dtype, tmp_path):
    folders = [tmp_path / "one", tmp_path / "many"]
    for folder in folders:
        folder.mkdir()
    [alone], together = (run(folder, count, dtype) for folder, count in zip(folders, (1, ranks), strict=True))
    assert alone["kind"] == "CachedFeed"
    assert len(alone["latents"]) == PICTURES
    assert len(alone["text"]) > CAPTIONS
    for one in together:
        assert one["wrapped"] == "DistributedDataParallel"
        for what in ("latents", "text", "measured"):
            assert one[what] == alone[what], what
    check_shares(alone, together)
    pictures = [Image.open(folder / "previews/000000.jpg") for folder in folders]
    assert max(ImageStat.Stat(ImageChops.difference(*pictures)).mean) < 0.5  # of 255; another number of pictures in a forward pass


def check_shares(alone: dict, together: list[dict]) -> None:
    """Each rank did its part only, in as many forward passes as the others."""
    ranks = len(together)
    pictures = [one["encoded"]["encode_images"] - 7 for one in together]  # every rank encodes the held-out ones
    assert sum(pictures) == alone["encoded"]["encode_images"] - 7 == PICTURES
    assert max(pictures) <= PICTURES / ranks + 16
    assert max(one["encoded"]["encode_text"] for one in together) < alone["encoded"]["encode_text"]
    assert alone["probe"] == 3 * 3 * 3  # times, passes for 7 pictures, and two guidances and a teacher
    assert [one["probe"] for one in together] == [3 * -(-9 // ranks)] * ranks
    assert alone["preview"] == 2 * 2
    assert [one["preview"] for one in together] == [2] * ranks
