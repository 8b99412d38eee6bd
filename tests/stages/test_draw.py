"""draw: its shards hold what the sampler samples, are the same after a kill, and are trained on beside others in the share they have."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.sources import DataConfig, RunSnapshots
from data.storage.transport import ReadConfig
from dev2pro.judging.cells import Inference
from dev2pro.judging.sampler import Sampler
from dev2pro.models.flux1 import ModelConfig
from dev2pro.models.sampling import SamplingConfig
from stages import draw

PROMPTS = ["a handwritten two", "a handwritten six", "a handwritten one"]


@pytest.fixture
def drawn(tiny, tmp_path, run_stage, monkeypatch):
    """Draws four pictures of each of three prompts, in shards of four: (exit code, stderr, folder)."""
    monkeypatch.setattr(draw, "SHARD_PICTURES", 4)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(name: str, *more: str) -> tuple[int, str, Path]:
        words = [f"model.path={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"prompts={tmp_path}/prompts.txt", "seeds=4", "resolution=32",
                 "sampling.steps=2", "sampling.batch=2"]  # fmt: skip
        code, stderr = run_stage("draw", *words, f"out={tmp_path / name}", *(word.format(tmp=tmp_path) for word in more))
        return code, stderr, tmp_path / name

    return run


def tars(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.tar"))}


def samples(folder: Path) -> list[tuple[str, np.ndarray]]:
    """(caption, pixels) of every sample, in order."""
    found = []
    for content in tars(folder).values():
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        keys = sorted({name.partition(".")[0] for name in members})
        found += [(members[f"{key}.txt"].decode(), np.asarray(Image.open(io.BytesIO(members[f"{key}.png"])))) for key in keys]
    return found


def record(folder: Path) -> dict:
    return json.loads((folder / "artifact.json").read_text())


def test_the_shards_hold_what_the_sampler_samples_under_its_prompts(drawn, tiny):
    code, stderr, folder = drawn("out", "guidance=2", "seed=3")
    assert code == 0, stderr
    found = samples(folder)
    assert [caption for caption, _ in found] == [prompt for prompt in PROMPTS for _ in range(4)]
    model = ModelConfig(path=str(tiny), usual_guidance=3.5, max_sequence_length=8)
    sampler = Sampler(
        model, SamplingConfig(steps=2, cfg_scale=1.0, batch=2), PROMPTS, seeds=4, seed=3, resolution=32, dtype=torch.float32,
        encoder_dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    sampler.apply(Inference("base", str(tiny), 2.0, 1.0), None)
    expected = (sampler.sample(range(12)) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack([pixels for _, pixels in found]), expected)
    assert len({pixels.tobytes() for _, pixels in found}) == 12
    assert record(folder)["metrics"] == {"pictures": 12, "prompts": 3, "shards": 3}
    assert {parent["role"] for parent in record(folder)["parents"]} == {"model", "prompts"}
    assert drawn("out", "guidance=2", "seed=3")[0] == 0, "a finished one is found"
    for words in (["guidance=6", "seed=3"], ["guidance=2", "seed=4"], ["guidance=2", "seed=3", "sampling.cfg_scale=3"]):
        assert tars(drawn("-".join(words).replace(".", ""), *words)[2]) != tars(folder)


def test_killed_and_gone_on_it_writes_the_same_bytes_and_draws_no_shard_twice(drawn, monkeypatch):
    _, _, whole = drawn("whole")
    sample, batches = Sampler.sample, list[range]()

    def killed(self: Sampler, rows: range) -> torch.Tensor:
        if rows.start == 6:
            raise KeyboardInterrupt
        return sample(self, rows)

    monkeypatch.setattr(Sampler, "sample", killed)
    code, _, parts = drawn("parts")
    assert code == 130
    assert [*tars(parts)] == ["000000.tar"]
    (parts / "000000.tar.index").unlink()  # as if it was killed right before
    monkeypatch.setattr(Sampler, "sample", lambda self, rows: batches.append(rows) or sample(self, rows))
    code, stderr, _ = drawn("parts", "seed=1")
    assert (code, "seed is 0 there and 1 here" in stderr) == (2, True)
    code, stderr, _ = drawn("parts")
    assert code == 0, stderr
    assert [rows.start for rows in batches] == [4, 6, 8, 10]
    assert tars(parts) == tars(whole)
    assert record(parts)["id"] == record(whole)["id"]
    assert not list(parts.glob("*.partial"))


def test_the_captions_of_shards_are_drawn_in_place_of_prompts(drawn, tiny_data):
    code, stderr, folder = drawn("out", "prompts=null", f"captions=[{tiny_data}/shard.tar,{tiny_data}/heldout.tar]", "seeds=1")
    assert code == 0, stderr
    assert [caption for caption, _ in samples(folder)] == [f"a handwritten {name}" for name in ("zero", "one", "two", "three", "four", "five")]
    assert {parent["role"] for parent in record(folder)["parents"]} == {"model", "data.captions"}


def test_drawn_pictures_are_trained_on_beside_others_in_the_share_they_have(drawn, tiny, tiny_data, tmp_path, run_stage):
    _, _, folder = drawn("out")
    style = tmp_path / "4_style"
    style.symlink_to(tiny_data / "folder")
    config = DataConfig(
        name="x", train=[str(style), f"{folder}/*.tar"], heldout=[f"{tiny_data}/heldout.tar"], resolution=32, bucket_step=8, repeats="honour",
        read=ReadConfig(workers=0, cache=f"{tmp_path}/cache"),
    )  # fmt: skip
    order = RunSnapshots(config, f"{tmp_path}/run", resuming=False).stream(0, 4).order
    epoch = np.concatenate([order.step(step).rows for step in range(order.steps_per_epoch)])
    assert np.bincount(epoch).tolist() == [4] * 6 + [1] * 12, "a third of the stream: 12 of 12 + 4 x 6"
    code, stderr = run_stage(
        "lora", f"model.path={tiny}", f"trained_on={tiny}", "model.max_sequence_length=8", "hardware=cpu", f"data.train=['{style}','{folder}/*.tar']",
        f"data.heldout=[{tiny_data}/heldout.tar]", "data.resolution=32", "data.bucket_step=8", "data.read.workers=0", "data.repeats=honour",
        f"data.read.cache={tmp_path}/cache", "steps=2", "batch=4", "probe.bins=2", "probe.samples=2", "preview.pictures=0", f"out={tmp_path}/lora",
    )  # fmt: skip
    assert code == 0, stderr
    assert record(tmp_path / "lora")["metrics"]["data"]["samples"] == 18


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["captions=[a.tar]"], "one of them says what is drawn"),
        (["prompts=null"], "one of them says what is drawn"),
        (["resolution=30"], "30 pixels do not fit this model"),
        (["hardware.encodings_gb=1e-6"], "3 prompts take"),
        (["prompts={tmp}/empty.txt"], "must hold at least one prompt, all different and none empty. Here it holds none."),
        (["sampling.batch=0"], "sampling.batch=0"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_weights_are_read(words, said, drawn, tmp_path, monkeypatch):
    for kind in ("diffusers.FluxTransformer2DModel", "transformers.T5EncoderModel"):
        monkeypatch.setattr(f"{kind}.from_pretrained", lambda *_, **__: pytest.fail("it loaded weights"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    code, stderr, folder = drawn("refused", *words)
    assert code == 2, stderr
    assert said in stderr
    assert not folder.exists()


def test_one_prompt_is_enough_and_check_true_writes_nothing(drawn, tmp_path):
    (tmp_path / "one.txt").write_text("a dog")
    code, stderr, folder = drawn("out", "prompts={tmp}/one.txt", "check=true")
    assert code == 0, stderr
    assert not folder.exists()
