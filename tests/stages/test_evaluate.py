"""evaluate on the bundled miniature: killed and continued, with another arm, with damaged pictures, with one transformer in memory at a time."""

import csv
import gc as collector
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from data import sources
from data.storage.transport import ReadConfig, Transport
from dev2pro.artifacts import gc, record, run_folder, verify
from dev2pro.judging import cell_store
from dev2pro.judging.judge import Judge
from dev2pro.models import flux1, lora
from dev2pro.models.lora import AdapterConfig
from stages import evaluate
from tests.stages import kin

ROOT = Path(__file__).resolve().parents[2]
BASE, TEACHER = "data/miniature/pipeline", "data/miniature/teacher"
TRAINING = str(ROOT / "data/miniature/shards/chalk/train-*.tar")  # 100 pictures
BATCHES = 4  # of two pictures, in every cell
CELLS = ("ideal on teacher", "none on base", "base@1 on base", "teacher@1 on base")
WHOLE = "[0-9]*.safetensors"


@dataclass(frozen=True)
class LoraLike:
    """As much of a LoRA stage's configuration as an evaluation reads."""

    out: str
    data: dict[str, Any] = field(default_factory=dict)


def make_lora(folder: Path, arm: str, trained_on: str, training: str = "") -> None:
    """A LoRA of random numbers, as stages.lora writes it; `training`: the id of the training pictures, if its record names them."""
    adapter, config = AdapterConfig(rank=2, alpha=2, targets="attention"), LoraLike(str(folder / arm), {})
    config.data.update(name="chalk", heldout=[str(ROOT / "data/miniature/shards/chalk/heldout-*.tar")])
    config.data.update({"train": [TRAINING]} if training else {})
    parents = {"data.train": ("train.snapshot", training)} if training else {}
    assert run_folder.acquire(config.out, "lora", config, parents) is None
    transformer = flux1.load_transformer(str(ROOT / BASE))
    lora.inject(transformer, adapter, len(arm))
    torch.manual_seed(len(arm))
    for name, value in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.05)
    lora.save(transformer, adapter, config.out, {})
    contract = {key: {"path": path, "id": record.fingerprint(path)} for key, path in (("trained_on", trained_on), ("apply_to", BASE))}
    record.write(config.out, "lora", "lora", config, parents, step=1, metrics={}, inference={"arm": arm, **contract})


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        make_lora(folder, "base@1", BASE)
        make_lora(folder, "teacher@1", TEACHER)
        make_lora(folder, "another@3.5", BASE)
    (folder / "prompts.json").write_text('["a handwritten one", "a handwritten two", "a handwritten six", "a handwritten nine"]')
    return folder


def words(loras: Path, out: Path, *arms: str) -> list[str]:
    return [
        "experiment=miniature", "recovered=null", f"loras=[{','.join(str(loras / arm) for arm in arms)}]", f"prompts={loras}/prompts.json", "seeds=2",
        "sampling.steps=6", "sampling.batch=2", "bootstrap=20", f"out={out}",
    ]  # fmt: skip


def batches(folder: Path) -> dict[str, int]:
    """Every whole batch of pictures below a folder -> when it was written."""
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob(WHOLE)}


def metrics(out: Path) -> bytes:
    return (out / "metrics.json").read_bytes()


@pytest.fixture
def undisturbed(loras, tmp_path, run_stage) -> Path:
    code, stderr = run_stage("evaluate", *words(loras, tmp_path / "undisturbed", "base@1", "teacher@1"))
    assert code == 0, stderr
    rows = json.loads(metrics(tmp_path / "undisturbed"))["cells"]
    assert tuple(f"{row['arm']} on {row['inference']}" for row in rows) == CELLS
    return tmp_path / "undisturbed"


def descendants(pid: int) -> list[int]:
    pids = [pid]
    for _ in range(5):
        pids += [one.pid for one in kin.family() if one.parent in pids and one.pid not in pids]
    return pids


def start_and_kill(args: list[str], out: Path, ranks: int, after: int) -> None:
    """Kills a real evaluation, with -9 and all of its ranks, once so many batches are whole."""
    starter = ["-m", "dev2pro.ranks", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    child = subprocess.Popen([sys.executable, *starter, "-m", "stages.evaluate", *args], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    assert kin.until(lambda: child.poll() is not None or len(batches(out)) >= after, 120)
    assert child.poll() is None
    pids = descendants(child.pid)
    assert len(pids) >= ranks
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that no rank outlives its launcher by another batch
    kin.send(pids, signal.SIGKILL)
    child.wait()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_evaluation_goes_on_and_another_arm_samples_only_its_own_cells(ranks, loras, undisturbed, tmp_path, run_stage, monkeypatch):
    args, out, total = words(loras, tmp_path / "out", "base@1", "teacher@1"), tmp_path / "out", BATCHES * len(CELLS)
    start_and_kill(args, out, ranks, after=6)
    before = batches(out)
    assert 6 <= len(before) < total
    assert not (out / "metrics.json").exists()

    sampled: list[str] = []
    write = cell_store.CellFiles.write
    monkeypatch.setattr(cell_store.CellFiles, "write", lambda files, *rest: sampled.append(files.id) or write(files, *rest))
    assert run_stage("evaluate", *args)[0] == 0
    assert len(sampled) == total - len(before)
    assert batches(out).items() > before.items()
    assert metrics(out) == metrics(undisturbed)
    assert not list(out.rglob("*.partial"))

    sampled.clear()
    before = batches(out)
    arms = ("base@1", "teacher@1", "another@3.5")
    assert run_stage("evaluate", *words(loras, tmp_path / "more", *arms), f"cells={out}/cells")[0] == 0
    assert len(sampled) == BATCHES
    assert json.loads((out / "cells" / sampled[0] / "cell.json").read_text())["lora"] == record.read(str(loras / "another@3.5")).id
    assert batches(out).items() > before.items()
    assert not (tmp_path / "more/cells").exists()
    assert run_stage("evaluate", *words(loras, tmp_path / "alone", *arms))[0] == 0
    assert metrics(tmp_path / "more") == metrics(tmp_path / "alone")


def test_damaged_and_foreign_pictures_are_sampled_again_and_it_is_told(loras, undisturbed, tmp_path, run_stage, capfd):
    before = batches(undisturbed)
    flipped, cut, foreign, *_ = map(Path, sorted(before))
    foreign.write_bytes(Path(sorted(before)[-1]).read_bytes())
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x7f")
    cut.write_bytes(cut.read_bytes()[:200])
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dev2pro.signals.emit", said.append)
        code, stderr = run_stage("evaluate", *words(loras, tmp_path / "again", "base@1", "teacher@1"), f"cells={undisturbed}/cells")
    assert code == 0, stderr
    told = [line for line in said if "Its pictures are sampled again." in line]
    assert sorted(line.split()[0] for line in told) == sorted(map(str, (flipped, cut, foreign)))
    after = batches(undisturbed)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == set(map(str, (flipped, cut, foreign)))
    assert metrics(tmp_path / "again") == metrics(undisturbed)


def test_a_style_judge_sees_the_looks_and_leaves_the_prompts_to_the_judge(loras, undisturbed, tmp_path, run_stage, tiny_dino):
    out, words_ = tmp_path / "out", words(loras, tmp_path / "out", "base@1", "teacher@1")
    code, stderr = run_stage("evaluate", *words_, f"style_judge={tiny_dino}", f"cells={undisturbed}/cells")
    assert code == 0, stderr
    before, now = json.loads(metrics(undisturbed)), json.loads(metrics(out))
    for cell, other in zip(before["cells"], now["cells"], strict=True):
        assert {name for name in cell if cell[name] != other[name]} == {"style_similarity", "diversity", "kid"}
    judge, ids = "data/miniature/judge", {name: record.digest(record.fingerprint(str(name))) for name in ("data/miniature/judge", tiny_dino)}
    looks = dict.fromkeys(("style_similarity", "diversity", "kid"), str(tiny_dino))
    assert now["judged_by"] == {"prompt_fidelity": judge, "clip_score": judge, **looks}
    assert f"The judge is {tiny_dino}." in (out / "report.html").read_text()
    assert "judged_by" not in before
    assert "style_judge" not in before["settings"]
    assert {p["role"]: p["id"] for p in record.read(str(out)).parents}["style_judge"] == record.fingerprint(str(tiny_dino))
    assert record.read(str(undisturbed)).config.keys() == record.read(str(out)).config.keys() - {"style_judge"}
    for cell in (undisturbed / "cells").iterdir():
        for name, width in ((judge, 64), (tiny_dino, 48)):
            with safe_open(cell / f"embeddings-{ids[name][:16]}.safetensors", "pt") as file:
                assert (file.metadata()["judge"], file.get_tensor("data").shape) == (ids[name], (8, width))

    code, stderr = run_stage("evaluate", *words(loras, tmp_path / "swapped", "base@1"), f"judge={tiny_dino}", f"style_judge={judge}")
    assert (code, f"judge={tiny_dino} is no readable CLIP model" in stderr, "It has no text tower" in stderr) == (2, True, True)
    assert not (tmp_path / "swapped").exists()


def test_every_picture_is_kept_with_its_guidance_and_cfg_scale(undisturbed):
    sampled = {"teacher": ("1.0", "3.5"), "base": ("3.5", "1.0")}
    with (undisturbed / "pictures.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * len(CELLS)
    assert {(row["inference"], row["guidance"], row["cfg_scale"]) for row in rows} == {(name, *how) for name, how in sampled.items()}
    files = list((undisturbed / "cells").glob(f"*/{WHOLE}"))
    assert len(files) == BATCHES * len(CELLS)
    for path in files:
        described = json.loads((path.parent / "cell.json").read_text())
        with safe_open(path, "pt") as file:
            found = tuple(file.metadata()[key] for key in ("guidance", "cfg_scale"))
        assert found == (str(described["guidance"]), str(described["cfg_scale"]))
        assert found in sampled.values()


def test_a_store_is_no_folder_for_pictures(loras, tmp_path, run_stage):
    code, stderr = run_stage("evaluate", *words(loras, tmp_path / "out", "base@1"), "cells=s3://bucket/cells")
    assert (code, "cells=s3://bucket/cells is no folder of this machine." in stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_memorisation_is_measured_against_the_training_pictures_while_they_are_known(loras, tmp_path, run_stage, monkeypatch):
    id = sources.open_snapshot([TRAINING], "train", Transport(ReadConfig())).id
    monkeypatch.chdir(ROOT)
    make_lora(tmp_path, "known@1", BASE, id)
    make_lora(tmp_path, "other@1", BASE, "0" * 64)
    embedded: list[int] = []
    shared = Judge.shared
    monkeypatch.setattr(Judge, "shared", lambda judge, accelerator, count, read: embedded.append(count) or shared(judge, accelerator, count, read))
    said: list[str] = []
    monkeypatch.setattr("accelerate.Accelerator.print", lambda accelerator, *texts: said.extend(texts))
    found = {}
    for arm, most in (("known@1", 512), ("known@1", 70), ("other@1", 512)):
        monkeypatch.setattr(evaluate, "MOST_TRAINING", most)
        out, teacherless = tmp_path / f"{arm}-{most}", [*words(tmp_path, tmp_path / f"{arm}-{most}", arm), "teacher=null", "sampling.steps=2"]
        code, stderr = run_stage("evaluate", *teacherless, f"prompts={loras}/prompts.json", f"cells={tmp_path}/cells")
        assert code == 0, stderr
        found[arm, most] = json.loads(metrics(out)), (out / "pictures.csv").read_text().splitlines()[0], (out / "report.html").read_text()
    assert embedded == [60, 100, 8, 8, 60, 70, 60, 8]  # held out, training, and the cells once each
    for (arm, _), (result, head, page) in found.items():
        is_known = arm == "known@1"
        assert ["memorisation" in cell for cell in result["cells"]] == [is_known] * 2
        assert ("memorisation" in head, "Memorisation" in page) == (is_known, is_known)
        assert list(result["memorisation_of_heldout"]) == ["chalk"] * is_known
    [left_out] = [line for line in said if line.startswith("memorisation")]
    assert f"{tmp_path}/other@1's training pictures cannot be read: data.train=" in left_out
    every, some = (found["known@1", most][0] for most in (512, 70))
    for a, b in zip(every["cells"], some["cells"], strict=True):
        assert a["memorisation"]["mean"] >= b["memorisation"]["mean"], "among more pictures the nearest is nearer"


def test_cells_are_no_part_of_the_artifact_and_go_with_it(undisturbed):
    artifact = record.read(str(undisturbed))
    assert {entry["path"].split("/")[0] for entry in artifact.files} == {
        "config.json",
        "metrics.json",
        "metrics.jsonl",
        "pictures.csv",
        "report.html",
        "sheets",
    }
    assert not list(verify.find_problems(artifact))
    assert not verify.untracked_files(artifact)
    assert gc.bytes_of(artifact) > sum(file.stat().st_size for file in undisturbed.rglob(WHOLE)) > 0
    assert gc.prune(artifact)[1] == ""
    assert not batches(undisturbed)
    assert gc.remove(artifact) == []
    assert not undisturbed.exists()


@pytest.fixture
def loads(monkeypatch) -> Iterator[list[dict[str, Any]]]:
    """What is alive when a transformer is loaded, transformers and text encoders, where no garbage is collected by chance; dtypes inside a block."""
    monkeypatch.setattr("gc.enable", collector.disable)
    seen: list[dict[str, Any]] = []
    transformers, encoders = weakref.WeakSet[torch.nn.Module](), weakref.WeakSet[torch.nn.Module]()
    load, begin = flux1.load_transformer, flux1.Encoders.__init__

    def note_encoders(self: flux1.Encoders, *args: Any, **named: Any) -> None:
        begin(self, *args, **named)
        encoders.update((self.pipeline.text_encoder, self.pipeline.text_encoder_2))

    def note_load(*args: Any) -> torch.nn.Module:
        seen.append({"text encoders": len(encoders), "before": len(transformers), "dtypes": set()})
        transformer = load(*args)
        transformers.add(transformer)
        dtypes = seen[-1]["dtypes"]
        transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda module, given, result: dtypes.update((given[0].dtype, result.dtype)))
        return transformer

    monkeypatch.setattr(flux1.Encoders, "__init__", note_encoders)
    monkeypatch.setattr(flux1, "load_transformer", note_load)
    yield seen
    monkeypatch.undo()
    collector.enable()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_transformer_in_memory_and_the_text_encoders_gone_before_it(dtype, loras, tmp_path, run_stage: Callable, loads):
    args = words(loras, tmp_path / "out", "base@1", "teacher@1")
    more = [f"recovered={TEACHER}", "hardware.encoder_dtype=bfloat16", f"hardware.inference_dtype={dtype}"]
    code, stderr = run_stage("evaluate", *args, *more, "sampling.steps=2")
    assert code == 0, stderr
    assert [(one["before"], one["text encoders"]) for one in loads] == [(0, 0)] * 3  # teacher, base, recovered
    assert [one["dtypes"] for one in loads] == [{getattr(torch, dtype)}] * 3
