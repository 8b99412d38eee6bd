"""`python -m dev2pro.artifacts`, in this process where that is equivalent, else as a command."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dev2pro.artifacts import __main__, record, run_folder, store
from tests.records import Config, make
from tests.servers import SECRET

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def lora(tmp_path, monkeypatch, parents) -> record.Artifact:
    """A LoRA trained on a recovered model of a base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora", "data.train=[a b]", "steps=3"])
    make(Config("recovered"), {"base": "model"})
    curve = [{"loss": 3.123456789, "step": 0}, {"loss": 1.5, "step": 3}]
    return make(
        Config("lora"), {"trained_on": "recovered", "apply_to": "model", "judge": "openai/clip"},
        metrics={"guidance": 1.0, "curve": curve}, inference={"arm": "recovered@1", "suggested_guidance": 3.5},
    )  # fmt: skip


@pytest.fixture
def run_command(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: (exit code, stdout, stderr)."""

    def run(*args: str) -> tuple[int, str, str]:
        handler = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(sys, "argv", ["artifact", *args])
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            __main__.main()
        signal.signal(signal.SIGTERM, handler)
        return end.value.code, *capfd.readouterr()

    return run


def test_what_is_whole_is_verified_with_its_parents(lora, run_command):
    code, out, err = run_command("verify", "lora")
    assert (code, err) == (0, "")
    assert f"lora: whole, thing {lora.id[:12]}, 3 files, " in out
    assert "recovered: whole, thing " in out
    assert "(trained_on of lora)" in out
    assert "lora: its judge, openai/clip, is by name, and was not looked at." in out


def test_a_line_for_every_problem_and_exit_code_3(lora, run_command):
    (Path("lora") / "transformer/weights.bin").write_bytes(b"WEIGHTS")
    (Path("recovered") / "metrics.jsonl").unlink()
    (Path("model") / "new").touch()
    (Path("lora") / "notes.txt").touch()
    code, out, _ = run_command("verify", "lora")
    assert code == 3
    assert "lora/transformer/weights.bin: has other contents" in out
    assert "recovered/metrics.jsonl: is missing. Bring the old file back" in out
    assert "lora: its apply_to, model, changed" in out
    assert "lora: 1 files are there that are no part of it (notes.txt)." in out
    assert "whole" not in out


def test_untracked_files_leftovers_and_parents_that_are_gone_are_no_problem(lora, run_command):
    shutil.rmtree("recovered")
    (Path("lora") / "notes.txt").touch()
    (Path("lora") / "checkpoint-1").mkdir()
    code, out, _ = run_command("verify", "lora")
    assert code == 0
    assert "its trained_on, recovered, is gone" in out


def test_what_was_pruned_has_a_record_and_is_whole_only_as_an_ancestor(lora, run_command):
    weights = Path("recovered/transformer/model.safetensors")
    weights.write_bytes(b"weights" * 1000)
    above = record.write("recovered", "test", "thing", Config("recovered"), {"base": "model"}, step=3, metrics={})
    record.write("lora", "test", "thing", Config("lora"), {"trained_on": "recovered"}, step=3, metrics={})
    (Path("recovered") / "checkpoint-3").mkdir()
    (Path("recovered") / "checkpoint-3/weights.safetensors").write_bytes(b"state" * 1000)
    assert run_command("prune", "recovered")[1] == "recovered: left as it is: it is in use\n"
    run_folder.release()
    assert run_command("prune", "recovered") == (0, "recovered: 12 kB removed; its record stays\n", "")
    assert sorted(str(file.relative_to("recovered")) for file in Path("recovered").rglob("*") if file.is_file()) == [
        "artifact.json", "config.json", "metrics.jsonl", "pruned.json", "transformer/weights.bin",
    ]  # fmt: skip
    assert run_command("prune", "recovered")[1] == "recovered: 0 bytes removed; its record stays\n"
    code, out, _ = run_command("verify", "lora")
    assert code == 0
    assert f"recovered: whole but for 1 files that were removed to make room, thing {above.id[:12]}, 3 files, " in out
    assert f"trained_on  thing {above.id[:12]}  pruned  recovered" in run_command("lineage", "lora")[1]
    code, out, _ = run_command("verify", "recovered")
    assert code == 3
    assert f"{weights}: was removed to make room. Bring the old file back" in out
    assert run_command("push", "recovered", "store")[0] == 3
    (Path("recovered") / "transformer/weights.bin").unlink()  # which pruned.json does not list
    assert "weights.bin: is missing" in run_command("verify", "lora")[1]
    weights.write_bytes(b"others")  # other contents in its place are not excused either
    code, out, _ = run_command("verify", "lora")
    assert code == 3
    assert f"{weights}: has 6 bytes, not 7,000" in out


def test_what_was_pruned_is_no_ancestor_only_where_it_is_asked_for(lora, run_command):
    record.write_json(Path("recovered/pruned.json"), {"files": ["transformer/weights.bin"]})
    (Path("recovered") / "transformer/weights.bin").unlink()
    assert run_command("verify", "lora")[0] == 0
    for paths in (("lora", "recovered"), ("recovered", "lora")):
        code, out, _ = run_command("verify", *paths)
        assert code == 3
        assert "recovered/transformer/weights.bin: was removed to make room" in out


def test_there_may_be_more_generations_than_python_nests_calls(run_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    limit = sys.getrecursionlimit()
    parent = {"id": "0" * 64, "uri": "base"}
    for number in range(400):
        Path(str(number)).mkdir()
        lineage = [{"role": "start", "uri": parent["uri"], "id": parent["id"]}]
        id = record.compute_id("thing", "test", record.digest({}), lineage, [])
        path = record.Artifact("thing", "test", id, {}, record.digest({}), lineage, 1, {}, [])
        values = {key: value for key, value in vars(path).items() if key != "uri"}
        (Path(str(number)) / "artifact.json").write_text(json.dumps(values))
        parent = {"id": id, "uri": str(number)}
    sys.setrecursionlimit(len(inspect.stack()) + 300)
    code, out, _ = run_command("verify", parent["uri"])
    assert code == 0
    assert out.count(": whole, thing") == 400
    code, out, _ = run_command("lineage", parent["uri"])
    assert code == 0
    assert out.count("start  thing") == 399
    assert sys.getrecursionlimit() < limit  # else a nested file of others, read later, would end the process
    sys.setrecursionlimit(limit)


def test_what_is_made_again_is_pruned_no_more(lora, run_command):
    record.write_json(Path("recovered/pruned.json"), {"files": ["transformer/weights.bin"]})
    record.invalidate("recovered")
    record.write("recovered", "test", "thing", Config("recovered"), {"base": "model"}, step=3, metrics={"loss": 0.5})
    assert "trained_on  thing" in run_command("lineage", "lora")[1]
    assert "pruned" not in run_command("lineage", "lora")[1]


def test_what_an_unfinished_run_was_given_is_not_pruned(lora, run_command, tmp_path):
    (tmp_path / "recovered/model.safetensors").write_bytes(b"weights")
    record.write("recovered", "test", "thing", Config("recovered"), {"base": "model"}, step=3, metrics={})
    (tmp_path / "runs/begun").mkdir(parents=True)
    for given in ({"config": {"trained_on": "recovered"}, "parents": {}}, {"config": {}, "parents": {"start": record.read("recovered").id}}):
        record.write_json(tmp_path / "runs/begun/config.json", {"stage": "lora", **given})
        assert run_command("prune", "recovered", "--runs", "runs")[1] == "recovered: left as it is: an unfinished run was given it\n"
    assert Path("recovered/model.safetensors").exists()
    shutil.rmtree("runs/begun")
    run_folder.release()
    assert run_command("prune", "recovered", "--runs", "runs")[1] == "recovered: 7 bytes removed; its record stays\n"


def test_a_forged_record_does_not_verify(lora, run_command):
    path = Path("lora/artifact.json")
    path.write_text(path.read_text().replace('"kind": "thing"', '"kind": "lora"'))
    code, out, _ = run_command("verify", "lora", "recovered")
    assert code == 3
    assert "lora/artifact.json: its contents give the id" in out
    assert "recovered: whole" in out


def test_what_made_it_is_shown(lora, run_command):
    code, out, _ = run_command("show", "lora")
    assert code == 0
    for line in (
        "kind          thing", f"id            {lora.id}", f"git revision  {lora.git_revision}", "steps         3",
        "command       python -m stages.test 'data.train=[a b]' steps=3", "  trained_on    ", "  arm: recovered@1", "  suggested_guidance: 3.5",
        "  optim:",
        "    lr: 0.1", "    the last of 2:", "      loss: 1.5", "7  transformer/weights.bin",
    ):  # fmt: skip
        assert line in out, line


def test_the_lineage_is_a_tree(lora, run_command):
    (Path("model") / "new").touch()
    code, out, _ = run_command("lineage", "lora")
    assert code == 0
    base, above = record.read("recovered").parents[0]["id"][:12], record.read("recovered").id[:12]
    assert out.splitlines() == [
        f"thing {lora.id[:12]}  lora",
        f"├── trained_on  thing {above}  there  recovered",
        f"│   └── base  {base}  changed  model",
        f"├── apply_to  {base}  changed  model",
        "└── judge  by name  openai/clip",
    ]


def test_a_shared_parent_is_drawn_once_and_a_circle_has_an_end(lora, run_command):
    make(Config("both"), {"one": "lora", "two": "recovered"})
    _, out, _ = run_command("lineage", "both")
    assert out.count("recovered  (see above)") == 1
    path = Path("recovered/artifact.json")  # only a forged record can do this: ids are hashes of ids
    path.write_text(path.read_text().replace('"uri": "model"', '"uri": "both"').replace(record.fingerprint("model"), record.read("both").id))
    code, out, _ = run_command("lineage", "both")
    assert code == 0
    assert "both  (see above)" in out
    assert run_command("verify", "both")[0] == 3


def test_push_and_pull_print_only_the_url_or_folder(lora, run_command, proxy):
    Path("recovered").rename("lora/../elsewhere")
    code, out, _ = run_command("push", "lora", "s3://store/models")
    assert (code, out) == (0, f"s3://store/models/{lora.id}\n")
    assert run_command("pull", out.strip()) == (0, f"{store.CACHE}/{lora.id}\n", "")
    assert run_command("show", f"s3://store/models/{lora.id}")[0] == 0
    assert run_command("lineage", f"s3://store/models/{lora.id}")[1].startswith(f"thing {lora.id[:12]}  s3://store/models/")
    assert run_command("verify", f"s3://store/models/{lora.id}")[0] == 0


def test_errors_are_one_paragraph_with_their_exit_code(lora, run_command, proxy, monkeypatch):
    monkeypatch.setattr("dev2pro.retry.LONGEST_PAUSE", 0.01)
    (Path("broken")).mkdir()
    Path("broken/artifact.json").write_text("[]")
    for code, args in (
        (2, ["show", "model"]), (2, ["push", "lora", "https://me:hush@host/x"]), (2, ["pull", "s3://store/x"]), (2, ["verify", "nowhere"]),
        (2, ["lineage", "broken"]), (2, ["push", "lora", "s3://no-such-bucket"]), (2, ["gc", "nowhere", "--keep", "lora"]),
    ):  # fmt: skip
        exit_code, out, err = run_command(*args)
        assert (exit_code, out) == (code, ""), (args, err)
        assert err.startswith("artifact: ")
        assert err.count("\n") == 1
        assert not any(secret in err for secret in (SECRET, "hush", "Traceback", "AKIA"))
    proxy.rule = lambda *_: 500
    assert run_command("push", "lora", "s3://store")[0] == 75
    (Path("lora") / "config.json").unlink()
    assert run_command("push", "lora", "store")[0] == 3


@pytest.mark.parametrize("word", [[], ["verify"], ["show"], ["lineage"], ["push"], ["pull"], ["gc"]])
def test_help_is_there(run_command, word):
    code, out, _ = run_command(*word, "--help")
    assert code == 0
    assert f"python -m dev2pro.artifacts {' '.join(word)}" in out


def test_names_from_elsewhere_do_not_steer_the_terminal(lora, run_command):
    path = Path("recovered/artifact.json")
    path.write_text(path.read_text().replace('"uri": "model"', '"uri": "\\u001b[2J[bold]x"'))
    for word in ("show", "lineage", "verify"):
        _, out, err = run_command(word, "recovered")
        assert "\x1b" not in out + err
        assert "\\x1b[2J[bold]x" in out


def started(*args: str, **how) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, "-m", "dev2pro.artifacts", *args], env=environment, stderr=subprocess.PIPE, text=True, **how)


def test_it_answers_as_a_command_and_loads_no_torch(lora):
    watch = "import sys, runpy; sys.argv = ['x', 'lineage', 'lora']\ntry: runpy.run_module('dev2pro.artifacts', run_name='__main__')\n"
    watch += "finally: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", watch], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.startswith(f"thing {lora.id[:12]}")
    assert done.stdout.endswith("False\n")


def test_a_reader_who_has_seen_enough_is_no_trouble(lora):
    reader, writer = os.pipe()
    os.close(reader)
    child = started("show", "lora", stdout=writer)
    os.close(writer)
    assert (child.communicate(timeout=300)[1], child.returncode) == ("", 141)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_push_ends_with_130(lora, proxy, stop):
    proxy.rule = lambda method, _path, _number: 5.0 if method == "PUT" else None
    child = started("push", "lora", "s3://store", stdout=subprocess.PIPE)
    proxy.wait("PUT", 1)
    child.send_signal(stop)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 130, err
    assert err == "artifact: interrupted. Nothing is half done; the same command goes on from there.\n"
