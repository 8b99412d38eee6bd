"""tune on the bundled miniature: what it writes, that it publishes the weights it chose, what it samples again, and what it refuses."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dev2pro.artifacts import record, run_folder, verify
from dev2pro.judging import cell_store, grids
from dev2pro.models import flux1, lora
from dev2pro.models.lora import WEIGHTS, AdapterConfig

ROOT = Path(__file__).resolve().parents[2]
BASE, TEACHER = "data/miniature/pipeline", "data/miniature/teacher"
PROMPTS = ["a handwritten one", "a handwritten two", "a handwritten six", "a handwritten nine"]
GRID = ["strengths=[0.7]", "guidances=[2.5]"]  # and the default's own: four settings


@dataclass(frozen=True)
class LoraLike:
    """As much of a LoRA stage's configuration as tune and evaluate read."""

    out: str
    data: dict[str, Any] = field(default_factory=dict)


def write_weights(out: Path, size: float) -> None:
    """A LoRA of random numbers."""
    out.mkdir(parents=True, exist_ok=True)
    adapter, transformer = AdapterConfig(rank=2, alpha=2, targets="attention"), flux1.load_transformer(str(ROOT / BASE))
    lora.inject(transformer, adapter, 0)
    torch.manual_seed(0)
    for name, value in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=size)
    lora.save(transformer, adapter, str(out), {})


def make_lora(out: Path, sizes: dict[int, float], **how: Any) -> Path:
    """A finished LoRA whose last step is 60, with weights of such a size at some steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = LoraLike(str(out), {"name": "chalk", "heldout": [str(ROOT / "data/miniature/shards/chalk/heldout-*.tar")]})
        assert run_folder.acquire(config.out, "lora", config, {}) is None
        for step, size in sizes.items():
            write_weights(out if step == 60 else out / f"steps/{step:06d}", size)
        contract = {key: {"path": BASE, "id": record.fingerprint(BASE)} for key in ("trained_on", "apply_to")}
        parents = {"teacher": TEACHER}  # as of an arm whose loss has one
        inference = {"arm": "base@1", "suggested_strength": 1.0, **contract, **how}
        record.write(config.out, "lora", "lora", config, parents, step=60, metrics={}, inference=inference)
    return out


@pytest.fixture(scope="module")
def ruined(tmp_path_factory) -> Path:
    """A LoRA that has ruined the model at its last step, and had not at step 20."""
    return make_lora(tmp_path_factory.mktemp("ruined") / "lora", {20: 0.05, 60: 5.0})


@pytest.fixture
def prompts(tmp_path) -> Path:
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    return tmp_path / "prompts.json"


@pytest.fixture
def tune(tmp_path, prompts, run_stage):
    def run(source: Path, name: str, *more: str) -> tuple[int, str]:
        return run_stage(
            "tune", "experiment=miniature", f"lora={source}", f"prompts={prompts}", "seeds=2", "sampling.steps=4", "sampling.batch=4",
            "bootstrap=200", f"out={tmp_path}/{name}", *(more or GRID),
        )  # fmt: skip

    return run


@pytest.fixture
def sampled(monkeypatch) -> list[str]:
    """The cells whose batches are written, each batch once."""
    written: list[str] = []
    write = cell_store.CellFiles.write
    monkeypatch.setattr(cell_store.CellFiles, "write", lambda files, *rest: written.append(files.id) or write(files, *rest))
    return written


def test_a_short_lora_from_its_training_to_its_use(tune, tmp_path, run_stage, sampled):
    source, out = tmp_path / "lora", tmp_path / "tuned"
    words = [
        "data.name=chalk",
        f"trained_on={BASE}",
        "guidance=3.5",
        "arm=base@3.5",
        "steps=60",
        "batch=4",
        "checkpoint.loras=20",
        "preview.pictures=0",
    ]
    assert run_stage("lora", "experiment=miniature", *words, "probe.samples=2", "probe.bins=1", f"out={source}") == (0, "")
    assert tune(source, "tuned") == (0, "")
    found, artifact = json.loads((out / "tune.json").read_text()), record.read(str(out))
    rows = list(csv.DictReader((out / "points.csv").open()))
    assert [(row["step"], row["strength"], row["guidance"]) for row in rows if row["search"] == "steps"] == [
        (step, "1.0", "3.5") for step in ("20", "40", "60")
    ]
    step = next(row["step"] for row in rows if row["search"] == "steps" and row["chosen"] == "1")
    assert {(row["step"], row["strength"], row["guidance"]) for row in rows if row["search"] == "settings"} == {
        (step, strength, guidance) for strength in ("0.7", "1.0") for guidance in ("2.5", "3.5")
    }
    assert len(set(sampled)) == len(list((out / "cells").iterdir())) == 1 + 3 + 3, "the point that both searches share is sampled once"
    assert len(sampled) == 2 * 7

    chosen = found["chosen"]
    assert [row["strength"] for row in rows if row["search"] == "settings" and row["chosen"] == "1"] == [str(chosen["strength"])]
    assert artifact.step == chosen["step"] == int(step)
    folder = source if chosen["step"] == 60 else source / f"steps/{chosen['step']:06d}"
    assert_same_weights(out, folder)
    told = {"suggested_strength": chosen["strength"], "suggested_guidance": chosen["guidance"], "step": chosen["step"], "arm": "base@3.5 tuned"}
    assert artifact.inference == record.read(str(source)).inference | told | {"data": record.read(str(source)).config["data"]}
    assert lora.read(str(out))[1].items() >= told.items()
    assert (artifact.kind, artifact.stage) == ("lora", "tune")
    assert not list(verify.find_problems(artifact))
    names = {entry["path"] for entry in artifact.files}
    assert names == {"config.json", "tune.json", "points.csv", WEIGHTS, "sheets/steps.png", "sheets/settings.png"}
    parents = {parent["role"]: parent["id"] for parent in artifact.parents}
    assert parents["lora"] == record.read(str(source)).id
    assert "data.train" in parents, "evaluate measures memorisation by them"
    assert parents["steps"] == record.fingerprint(str(source / "steps"))

    judged = [f"loras=[{out},{source}]", "recovered=null", "teacher=null", f"prompts={tmp_path}/prompts.json", "seeds=2", "sampling.steps=4"]
    assert run_stage("evaluate", "experiment=miniature", *judged, "bootstrap=20", f"out={tmp_path}/evaluate") == (0, "")
    cells = json.loads((tmp_path / "evaluate/metrics.json").read_text())["cells"]
    assert [cell["arm"] for cell in cells] == ["none", "base@3.5 tuned", "base@3.5"]
    assert all("memorisation" in cell for cell in cells)


def assert_same_weights(out: Path, folder: Path) -> None:
    published, chosen = load_file(out / WEIGHTS), load_file(folder / WEIGHTS)
    assert published.keys() == chosen.keys()
    assert all(torch.equal(published[key], chosen[key]) for key in chosen)


def test_a_ruined_last_step_is_named_and_the_weights_before_it_are_published(ruined, tune, tmp_path, tiny_dino):
    assert tune(ruined, "tuned", *GRID, f"style_judge={tiny_dino}") == (0, "")
    found, artifact = json.loads((tmp_path / "tuned/tune.json").read_text()), record.read(str(tmp_path / "tuned"))
    assert found["chosen"]["step"] == artifact.step == 20
    assert "Collapsed, and not to be chosen: step 60 at strength 1 and guidance 3.5, its " in found["words"][0]
    assert artifact.metrics["words"] == found["words"]
    assert_same_weights(tmp_path / "tuned", ruined / "steps/000020")
    assert {parent["role"] for parent in artifact.parents} >= {"teacher", "style_judge"}, "evaluate asks what helped to train it"
    for cell in (tmp_path / "tuned/cells").iterdir():
        assert len(list(cell.glob("embeddings-*"))) == 2, "of the judge, and of the judge of style"
    code, stderr = tune(tmp_path / "tuned", "again")
    assert (code, "is a lora of stages.tune. Give the output folder of stages.lora itself." in stderr) == (2, True)


def test_a_tune_that_was_killed_goes_on_and_more_points_sample_only_those(ruined, tune, tmp_path, sampled, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("dev2pro.judging.grids.thumbnails", _killed_after(2))
        code, stderr = tune(ruined, "out")
    assert (code, "killed" in stderr) == (1, True)
    before = len(sampled)
    assert 0 < before < 12
    assert tune(ruined, "out") == (0, "")
    assert len(sampled) == 2 * (1 + 2 + 3), "each batch once"
    assert tune(ruined, "whole") == (0, "")
    whole, out = ((tmp_path / name / "tune.json").read_bytes() for name in ("whole", "out"))
    assert whole == out
    assert record.read(str(tmp_path / "whole")).id == record.read(str(tmp_path / "out")).id

    sampled.clear()
    assert tune(ruined, "more", "strengths=[0.7,1.3]", "guidances=[2.5]", f"cells={tmp_path}/out/cells") == (0, "")
    described = [json.loads((tmp_path / f"out/cells/{id}/cell.json").read_text()) for id in dict.fromkeys(sampled)]
    assert sorted((cell["strength"], cell["guidance"]) for cell in described) == [(1.3, 2.5), (1.3, 3.5)]


def _killed_after(times: int) -> Callable[..., Any]:
    original, calls = grids.thumbnails, list[int]()

    def thumbnails(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > times:
            raise RuntimeError("killed")
        return original(*args)

    return thumbnails


def test_evaluate_applies_a_lora_at_the_strength_that_its_record_suggests(tmp_path, prompts, run_stage):
    made = [make_lora(tmp_path / "a", {60: 0.05}), make_lora(tmp_path / "b", {60: 0.05}, arm="base@1 tuned", suggested_strength=0.5)]
    words = ["recovered=null", "teacher=null", f"prompts={prompts}", "seeds=2", "sampling.steps=2", "sampling.batch=4", "bootstrap=20"]
    for loras, out in ((made[:1], "plain"), (made, "both")):
        found = f"loras=[{','.join(map(str, loras))}]"
        assert run_stage("evaluate", "experiment=miniature", *words, found, f"out={tmp_path}/{out}") == (0, "")
    described = {file.parent.name: json.loads(file.read_text()) for file in (tmp_path / "both/cells").glob("*/cell.json")}
    plain = {folder.name for folder in (tmp_path / "plain/cells").iterdir()}
    assert plain < described.keys(), "a strength of 1 is no other cell"
    [tuned] = described.keys() - plain
    assert (described[tuned]["strength"], described[tuned]["guidance"]) == (0.5, 3.5), "the guidance is that of the inference base"
    settings = [json.loads((tmp_path / out / "metrics.json").read_text())["settings"] for out in ("plain", "both")]
    assert [one.get("strengths") for one in settings] == [None, {"chalk/base@1 tuned": 0.5}]
    assert "trained on the base at guidance 1, used as stages.tune chose" in (tmp_path / "both/report.html").read_text()


def test_where_all_has_collapsed_nothing_is_published(tune, tmp_path):
    """Weights so large that nothing is a number: every picture is black."""
    code, stderr = tune(make_lora(tmp_path / "lora", {40: 1e30, 60: 1e30}), "out")
    assert (code, "Every strength and guidance of" in stderr, "or add smaller strengths=" in stderr) == (5, True, True)
    assert not (tmp_path / "out/artifact.json").exists()
    assert "All 4 points have collapsed." in json.loads((tmp_path / "out/tune.json").read_text())["words"][-1]


def test_a_changed_step_is_no_step(ruined, tune):
    file = ruined / "steps/000020" / WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, stderr = tune(ruined, "out")
    file.write_bytes(content)
    assert (code, "steps/000020" in stderr, "has other contents" in stderr) == (3, True, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lora=runs/nowhere"], "runs/nowhere is no finished artifact"),
        ([f"lora={BASE}"], f"lora={BASE} is no output folder of stages.lora: it is a whole model"),
        (["strengths=[]"], "strengths=[] leaves nothing to try"),
        (["guidances=[]"], "guidances=[] leaves nothing to try"),
        (["strengths=[0]"], "strengths=0.0 cannot work. Choose more than 0"),
        (["strengths=[0.5,-1]"], "strengths=-1.0 cannot work"),
        (["guidances=[0]"], "guidances=0.0 cannot work"),
        (["collapse=1.5"], "collapse=1.5 cannot work. Choose a number from 0 to 1"),
        (["prompts=nowhere.txt"], "prompts=nowhere.txt"),
        (["seeds=1"], "seeds=1 cannot show a collapse"),
        (["bootstrap=80"], "bootstrap=80 cannot show which of 4 points is better. Give 81 or more"),
        (["model.usual_guidance=0"], "model.usual_guidance=0.0 is no guidance of a distilled base"),
        (["cells=s3://bucket/cells"], "cells=s3://bucket/cells is no folder of this machine"),
        (["judge=nowhere/at/all"], "judge=nowhere/at/all"),
        (["model.path={copy}"], "is to be applied to data/miniature/pipeline, not to model.path="),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_refused_before_anything_is_begun(words, said, ruined, tune, tmp_path, with_other_base):
    code, stderr = tune(ruined, "out", *GRID, *(word.format(copy=with_other_base) for word in words))
    assert (code, said in stderr) == (2, True), stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def with_other_base(tmp_path) -> Path:
    """The bundled base under other weights' names: another base to a LoRA."""
    folder = tmp_path / "other"
    folder.mkdir()
    for part in (ROOT / BASE).iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "note.txt").write_text("another")
    return folder


def test_prompts_must_be_given(ruined, tmp_path, run_stage):
    code, stderr = run_stage("tune", "model=miniature", "hardware=cpu", f"lora={ruined}", f"out={tmp_path}/out")
    assert (code, "were not given: prompts" in stderr) == (2, True)
