"""The bench of recovery: its variants are commands that stages take, its distances are distances, its tables say what its numbers say."""

import glob
import tarfile
from pathlib import Path

import pytest

from bench import recovery, recovery_tables
from dev2pro.artifacts import record
from dev2pro.artifacts.record import ROOT
from dev2pro.models import flux1
from flows.plan import hydra_args
from tests.dev2pro.planning.configs import composed, planned


@pytest.mark.parametrize("name", recovery.VARIANTS)
def test_every_variant_is_a_configuration_of_its_stage(name):
    variant = recovery.VARIANTS[name]
    values = (recovery.LORA if variant.stage == "lora" else recovery.COMMON) | variant.values
    config = composed(variant.stage, *hydra_args(values))
    for key, value in variant.values.items():
        found = config
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key
    assert (config.guidance, config.batch) == (1.0, 32), "what is compared sees as many pictures"
    assert config.steps == int(name.split()[0]) if name.endswith("steps") else 500


def test_the_distances_of_the_teacher_are_none_and_those_of_the_base_are_as_published(monkeypatch):
    monkeypatch.chdir(ROOT)
    distances = recovery.Distances("outside")
    teacher = distances(flux1.load_transformer(str(recovery.TEACHER)))
    assert [teacher[measure] for measure in ("distance", "high", "empty", "cfg")] == [0, 0, 0, 0]
    base, published = distances(flux1.load_transformer("data/miniature/pipeline")), recovery_tables.read("outside")["none"]
    for measure, value in base.items():
        assert value == pytest.approx(published[measure], rel=1e-3), measure
    assert base["cfg"] > base["high"] > base["distance"] > 0


def test_a_part_of_the_pictures_is_every_so_many_of_them_and_made_once(monkeypatch, tmp_path):
    monkeypatch.setattr(recovery, "RUNS", tmp_path)
    path = Path(recovery.shard("twentieth"))
    with tarfile.open(path) as tar:
        captions = [name for name in tar.getnames() if name.endswith(".txt")]
    assert captions == [f"{number:04d}.txt" for number in range(0, 1500, 20)]
    written = path.stat().st_mtime_ns
    assert recovery.shard("twentieth") == str(path)
    assert path.stat().st_mtime_ns == written


def captions_of(shards: str) -> list[str]:
    found = []
    for path in sorted(glob.glob(shards)):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read().decode() for member in tar if member.name.endswith(".txt")]
    return found


def test_a_base_draws_its_own_pictures_once_for_the_captions_of_the_real_ones(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(recovery, "RUNS", tmp_path)
    (tmp_path / "outside").mkdir()
    shards = recovery.draw("outside", 1.0, seeds=1)
    real = captions_of(recovery.INK)
    assert sorted(captions_of(shards)) == sorted(set(real)), "one picture for each caption"
    assert recovery.pictures("outside", "ink") == recovery.INK
    drawn = record.read(str(tmp_path / "outside/own-1"))
    assert drawn.config["guidance"] == 1.0
    written = [path.stat().st_mtime_ns for path in (tmp_path / "outside/own-1").iterdir()]
    assert recovery.draw("outside", 1.0, seeds=1) == shards
    assert [path.stat().st_mtime_ns for path in (tmp_path / "outside/own-1").iterdir()] == written


def test_own_pictures_are_as_many_as_the_real_ones_and_half_of_those_they_are_mixed_with(monkeypatch):
    monkeypatch.chdir(ROOT)
    for base in recovery.BASES:
        rows = recovery_tables.read(base)
        own, mixed, real = (rows[name]["pictures"] for name in ("own pictures", "own and real pictures", "full"))
        assert own == real == 1500
        assert mixed == own + real


NUMBERS = "1500,500,32,1000,1.5,40,0.5"


@pytest.fixture
def found(tmp_path):
    rows = [
        f"outside,0,full,{NUMBERS},0.2,0.1,0.03,1.0",
        "outside,0,none,0,0,0,0,0,0,1.4,0.8,0.5,0.02,10.0",
        f"outside,0,LoRA 4,{NUMBERS},0.4,0.1,0.03,2.0",
    ]
    rows += [f"outside,1,full,{NUMBERS},0.4,0.1,0.03,3.0"]
    (tmp_path / "outside.csv").write_text("\n".join([",".join(recovery.FIELDS), *rows]) + "\n")
    return recovery_tables.read("outside", tmp_path)


def test_rows_are_means_over_seeds_in_the_order_of_the_plan(found, tmp_path):
    assert list(found) == ["none", "full", "LoRA 4"]
    assert found["full"]["distance"] == pytest.approx(0.3)
    assert found["full"]["seeds"] == 2
    assert recovery_tables.closed(found, "full") == pytest.approx(1 - 0.3 / 0.8)
    assert recovery_tables.closed(found, "full", "empty") == pytest.approx(-0.5), "farther than the base"
    assert recovery_tables.read("inside", tmp_path) == {}
    lines = recovery_tables.table(found)
    assert lines[2].startswith("| *the base* |  |")
    assert "| 62.5% | 0.1000 | 0.0300 | 2.000 |" in lines[3]


def test_the_figure_is_drawn(found, tmp_path):
    recovery_tables.draw({"outside": found}, tmp_path / "distance.png")
    assert (tmp_path / "distance.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_what_the_tables_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    bases = {base: recovery_tables.read(base) for base in recovery.BASES}
    assert recovery_tables.report(bases) in recovery_tables.PAGE.read_text()


def test_the_state_of_a_row_is_the_one_that_a_plan_counts():
    account = planned("recover", composed("recover", "experiment=miniature", "trainable=[*.attn.*]"))
    rows = recovery_tables.read("outside", ROOT / recovery.RESULTS)
    assert rows["attention"]["state_mb"] == pytest.approx(account.state / 1e6, rel=0.01)
