"""Which artifacts gc removes and which it keeps: chains, nests, unfinished runs, and random graphs from hypothesis."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dev2pro.artifacts import gc, record, run_folder, store
from dev2pro.artifacts.record import Artifact
from dev2pro.errors import ConfigError, TryAgainError
from tests.records import Config
from tests.servers import environment, s3_environment
from tests.stores import files, refusal


def build(folder: Path, parents: dict[str, str], content: str = "") -> Artifact:
    """A small artifact; `content` distinguishes it from others."""
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content or folder.name)
    return record.write(str(folder), "test", "thing", Config("x"), parents, step=1, metrics={})


@pytest.fixture
def chain(tmp_path, monkeypatch) -> dict[str, Artifact]:
    """base <- recovered <- lora <- evaluation; another <- recovered; alone."""
    monkeypatch.chdir(tmp_path)
    artifacts: dict[str, Artifact] = {"base": build(Path("runs/base"), {})}
    for name, above in (("recovered", "base"), ("lora", "recovered"), ("evaluation", "lora"), ("another", "recovered"), ("alone", "")):
        artifacts[name] = build(Path(f"runs/{name}"), {"from": f"runs/{above}"} if above else {})
    return artifacts


def names(artifacts: list[Artifact]) -> set[str]:
    return {Path(artifact.uri).name for artifact in artifacts}


def test_what_is_kept_keeps_all_that_it_was_made_from(chain):
    plan = gc.plan_gc(["runs"], ["runs/lora"])
    assert names(plan.unneeded) == {"evaluation", "another", "alone"}
    assert names(plan.kept) == {"lora", "recovered", "base"}
    assert not gc.plan_gc(["runs"], ["runs"]).unneeded
    assert names(gc.plan_gc(["runs/alone", "runs/base"], ["runs/evaluation"]).unneeded) == {"alone"}
    assert names(gc.plan_gc(["runs"], ["runs/alone"]).unneeded) == set(chain) - {"alone"}


def test_parents_are_known_by_id_wherever_they_lie(chain, tmp_path):
    store.push("runs/recovered", str(tmp_path / "store"))
    shutil.move("runs/base", "runs/moved")
    shutil.rmtree("runs/recovered")
    shutil.copytree("runs/lora", "copies/lora")
    shutil.move(f"store/{chain['recovered'].id}", "runs/elsewhere")
    plan = gc.plan_gc(["runs"], ["copies/lora"])
    assert names(plan.unneeded) == {"evaluation", "another", "alone"}
    assert names(plan.kept) == {"lora", "elsewhere", "moved"}


def test_a_parent_that_is_gone_is_reported(chain):
    shutil.rmtree("runs/recovered")
    plan = gc.plan_gc(["runs"], ["runs/lora"])
    assert names(plan.unneeded) == {"evaluation", "another", "alone", "base"}
    assert "runs/recovered" in plan.notes[0]
    assert "is gone" in plan.notes[0]


def test_a_parent_whose_store_is_not_reached_stops_everything(chain, monkeypatch):
    monkeypatch.setattr("dev2pro.retry.LONGEST_PAUSE", 0.01)
    child = build(Path("runs/child"), {"from": f"s3://store/{'0' * 64}"})
    with environment(**s3_environment("http://127.0.0.1:1"), AWS_MAX_ATTEMPTS="1"):
        assert "is not reached" in refusal(TryAgainError, lambda: gc.plan_gc(["runs"], [child.uri]))


def test_what_is_to_be_kept_must_be_there(chain):
    Path("empty").mkdir()
    assert "--keep empty holds no finished artifact" in refusal(ConfigError, lambda: gc.plan_gc(["runs"], ["runs/lora", "empty"]))
    assert "is no folder" in refusal(ConfigError, lambda: gc.plan_gc(["runs"], ["runs/typo"]))
    assert "is no folder" in refusal(ConfigError, lambda: gc.plan_gc(["typo"], ["runs/lora"]))


def test_snapshots_and_folders_inside_an_artifact_keep_it(chain):
    (Path("runs/alone") / "encoded.snapshot").touch()
    (Path("runs/another") / "transformer").mkdir()
    build(Path("user"), {"data.train": "runs/alone/encoded.snapshot", "base": "runs/another/transformer"})
    assert names(gc.plan_gc(["runs"], ["user"]).unneeded) == {"lora", "evaluation"}


def test_removal_takes_the_record_first_and_only_what_is_the_artifact_s(chain):
    lora = Path("runs/lora")
    (lora / "notes.txt").write_text("mine")
    (lora / "checkpoint-3").mkdir()
    (lora / "checkpoint-3" / "state").write_bytes(bytes(1000))
    assert gc.bytes_of(chain["lora"]) == 1000 + len("lora") + (lora / "artifact.json").stat().st_size
    assert gc.remove(chain["lora"]) == ["runs/lora/notes.txt"]
    assert os.listdir("runs/lora") == ["notes.txt"]
    assert gc.remove(chain["alone"]) == []
    assert not Path("runs/alone").exists()


def test_a_nested_artifact_keeps_its_files_when_the_outer_one_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inner = build(Path("runs/outer/inner"), {})
    (Path("runs/outer") / "weights").write_text("outer")
    unfinished = Config("runs/outer/begun")
    run_folder.acquire(unfinished.out, "test", unfinished, {})
    run_folder.release()
    (Path(unfinished.out) / "weights").write_text("half")
    outer = record.write("runs/outer", "test", "thing", Config("x"), {}, step=1, metrics={})
    assert {"inner/weights", "inner/artifact.json", "begun/weights"} < {one["path"] for one in outer.files}
    assert names(gc.plan_gc(["runs"], ["runs/outer"]).unneeded) == set(), "what lies in a kept one's folder is kept"
    plan = gc.plan_gc(["runs"], ["runs/outer/inner"])
    assert names(plan.unneeded) == {"outer"}
    before = files("runs/outer/inner"), files("runs/outer/begun")
    gc.remove(outer)
    assert (files("runs/outer/inner"), files("runs/outer/begun")) == before
    assert not (Path("runs/outer") / "weights").exists()
    assert record.read("runs/outer/inner").id == inner.id


def test_unfinished_runs_are_not_touched_and_keep_what_they_go_on_from(chain):
    config = Config("runs/begun")
    run_folder.acquire(config.out, "test", config, {"from": "runs/lora"})
    run_folder.release()
    (Path("runs/begun") / "checkpoint-1").mkdir()
    before = files("runs/begun")
    plan = gc.plan_gc(["runs"], ["runs/alone"])
    assert names(plan.unneeded) == {"another", "evaluation"}
    for artifact in plan.unneeded:
        gc.remove(artifact)
    assert files("runs/begun") == before
    assert Path("runs/begun/checkpoint-1").is_dir()


def test_a_folder_in_which_a_run_works_is_left_alone(chain):
    handle = os.open("runs/alone", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert names(gc.plan_gc(["runs"], ["runs/lora"]).unneeded) == {"evaluation", "another"}
    assert "in use" in gc.remove(chain["alone"])[0]
    assert record.read("runs/alone")
    os.close(handle)
    assert names(gc.plan_gc(["runs"], ["runs/lora"]).unneeded) == {"evaluation", "another", "alone"}


def test_links_are_not_followed_out_of_the_folder(chain, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/weights").write_text("precious")
    path = Path("runs/alone/artifact.json")
    values = json.loads(path.read_text())
    values["files"].append({**values["files"][0], "path": "link/weights"})
    path.write_text(json.dumps(values))
    (Path("runs/alone") / "link").symlink_to(tmp_path / "outside")
    (Path("runs") / "other").symlink_to(tmp_path / "outside")
    gc.remove(record.read("runs/alone"))
    assert (tmp_path / "outside/weights").read_text() == "precious"


def test_a_store_in_s3_is_tidied_as_well(chain, proxy):
    for name in ("base", "recovered", "lora", "alone"):
        chain[name] = record.read(store.pull(store.push(build(Path(f"x/{name}"), {}, name).uri, "s3://store/models")))
    child = build(Path("x/child"), {"from": f"s3://store/models/{chain['lora'].id}"})
    plan = gc.plan_gc(["s3://store/models"], [child.uri])
    assert {artifact.id for artifact in plan.unneeded} == {chain[name].id for name in ("base", "recovered", "alone")}
    proxy.requests.clear()
    gc.remove(plan.unneeded[0])
    removed = [path for method, path in proxy.requests if method == "DELETE"]
    assert removed[0].endswith("/artifact.json")
    assert {artifact.id for artifact in gc.artifacts("s3://store/models")} == {chain["lora"].id, *(artifact.id for artifact in plan.unneeded[1:])}
    assert "nothing of that name" in refusal(ConfigError, lambda: gc.plan_gc(["s3://store/typo"], [child.uri]))


@settings(max_examples=60)
@given(
    graph=st.lists(st.sets(st.integers(0, 9), max_size=3), min_size=1, max_size=10),
    keep=st.sets(st.integers(0, 9), min_size=1),
    data=st.data(),
)
def test_no_ancestor_of_what_is_kept_ever_goes(graph, keep, data):
    """Artifacts have parents among the ones before them, and folders that may lie in each other's."""
    kept, numbers = {number % len(graph) for number in keep}, set(range(len(graph)))
    before, folder = Path.cwd(), tempfile.mkdtemp()
    os.chdir(folder)
    try:
        artifacts, paths = list[Artifact](), list[str]()
        for number, above in enumerate(graph):
            inside = data.draw(st.sampled_from(["runs", *(path for path in paths if path.count("/") < 3)]))
            paths.append(f"{inside}/{number}")
            Path(paths[-1]).mkdir(parents=True)
            (Path(paths[-1]) / "weights").write_text(str(number))
            parents = {f"p{one % number}": paths[one % number] for one in sorted(above) if number}
            artifacts.append(record.write(paths[-1], "test", "thing", Config("x"), parents, step=1, metrics={}))
        plan = gc.plan_gc(["runs"], [paths[number] for number in kept])
        before_removal = {one.id: files(one.uri)["weights"] for one in artifacts}
        for one in plan.unneeded:
            gc.remove(one)
        needed, todo = set[int](), list(kept)
        while todo:
            number = todo.pop()
            needed.add(number)
            todo += [one % number for one in graph[number] if number]
        for number in needed:
            assert record.read(paths[number]).id == artifacts[number].id
            assert files(paths[number])["weights"] == before_removal[artifacts[number].id]
        within = {n for n in numbers for k in needed if paths[n].startswith(f"{paths[k]}/")}
        around = {n for n in numbers for k in needed if paths[k].startswith(f"{paths[n]}/")}  # a record names a path in its folder
        gone = {n for n in numbers if not (Path(paths[n]) / "artifact.json").exists()}
        assert gone <= numbers - needed - within
        if not within | around:
            assert gone == numbers - needed
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def test_without_delete_nothing_is_deleted_and_with_it_what_was_listed(chain, tmp_path):
    root = Path(record.ROOT)

    def run_gc(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dev2pro.artifacts", "gc", "runs", "--keep", "runs/lora", *args],
            env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        return done.stdout

    before = files("runs")
    output = run_gc()
    assert files("runs") == before
    assert "3 unneeded" in output
    assert "3 kept, or needed by what is kept" in output
    assert all(f"unneeded  {chain[name].id[:12]}  thing" in output for name in ("evaluation", "another", "alone"))
    assert "Nothing was removed" in output
    assert "3 removed" in run_gc("--delete")
    assert names(gc.artifacts("runs")) == {"lora", "recovered", "base"}
    assert sorted(os.listdir("runs")) == ["base", "lora", "recovered"]
