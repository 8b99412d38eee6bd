"""The recurring recovery on a line of its own: a real server, real processes, the miniature, a few steps. tests/flows/test_year.py kills it."""

import datetime
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import jsonschema
import pytest
from prefect.client.orchestration import get_client
from prefect.server.schemas.schedules import CronSchedule
from prefect.testing.utilities import prefect_test_harness
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from dev2pro.artifacts import record, run_folder
from dev2pro.artifacts.record import ROOT
from flows import frame, recurring
from flows.forms import Recurring
from flows.generations import aliases, lifecycle
from flows.roots import ROOTS
from tests.shards import jpeg, pairs, tar

LINE = "test-recurring"
INK = "data/miniature/shards/ink"


# ---- the form -------------------------------------------------------------------------------------------------------------------------

IN_THE_FORM: list[tuple[dict[str, Any], str]] = [
    ({"line": "../main"}, "line"),
    ({"line": ".hidden"}, "line"),
    ({"line": "a/b"}, "line"),
    ({"line": "main:latest"}, "line"),
    ({"line": ""}, "line"),
    ({"shards": []}, "shards"),
    ({"shards": "runs/a.tar"}, "shards"),
    ({"shards": ["runs/../../etc/a.tar"]}, "shards.0"),
    ({"shards": ["${oc.env:HOME}/a.tar"]}, "shards.0"),
    ({"heldout": ["a\x1b[2Jb"]}, "heldout.0"),
    ({"index": "../indexes"}, "index"),
    ({"least": 0}, "least"),
    ({"epochs": 0.5}, "epochs"),
    ({"batch": 0}, "batch"),
    ({"tolerance": -0.1}, "tolerance"),
    ({"keep": 0}, "keep"),
    ({"hardware": "gpu24,cpu"}, "hardware"),
    ({"steps": 5}, "steps"),
    ({"start": "runs/other"}, "start"),
    ({"ledger": "/etc/passwd"}, "ledger"),
    ({"optim": {"_target_": "os.system"}}, "optim._target_"),
]
AT_THE_START: list[tuple[dict[str, Any], str]] = [
    ({"shards": ["/etc/*.tar"]}, "shards.0"),
    ({"shards": ["http://169.254.169.254/a.tar"]}, "shards.0"),
    ({"shards": ["pipe:touch pwned"]}, "shards.0"),
    ({"heldout": ["s3://somebody-else/a.tar"]}, "heldout.0"),
    ({"index": "/etc"}, "index"),
    ({"epochs": float("nan")}, "epochs"),
    ({"tolerance": float("nan")}, "tolerance"),
    ({"publish": "file:///etc"}, "publish"),
]


def refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as error:
        Recurring(**values)
    assert key in {".".join(map(str, one["loc"])) for one in error.value.errors()}


@pytest.mark.parametrize(("values", "key"), IN_THE_FORM, ids=[f"{key} {number}" for number, (_, key) in enumerate(IN_THE_FORM)])
def test_bad_input_is_refused_in_the_form(values, key):
    refused(values, key)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"recurring": values}, parameter_schema(recurring.recurring).model_dump_for_openapi())


@pytest.mark.parametrize(("values", "key"), AT_THE_START, ids=[f"{key} {number}" for number, (_, key) in enumerate(AT_THE_START)])
def test_bad_input_is_refused_when_the_run_starts(values, key):
    refused(values, key)


def test_it_can_be_triggered_as_it_is():
    assert Recurring().line == aliases.LINE
    assert [path for pattern in (*Recurring().shards, *Recurring().heldout) for path in ROOT.glob(pattern)]


def test_words_become_the_form(capsys):
    values = frame.nested(["line=a", "shards=x*.tar", "heldout=['{0..3}.tar', b]", "optim.lr=1e-4", "keep=2"], recurring.LISTS)
    assert values == {"line": "a", "shards": ["x*.tar"], "heldout": ["{0..3}.tar", "b"], "optim": {"lr": "1e-4"}, "keep": "2"}
    for args, message in (
        (["lien=a"], "lien=a: Extra inputs are not permitted. There are line, shards,"),
        (["least=few"], "least=few: Input should be a valid integer"),
        (["shards=/etc/a.tar"], "outside of the places that this machine offers"),
        (["heldout=[a"], "heldout=[a is no list. Write it as in heldout=[one,two]"),
        (["optim=1", "optim.lr=2"], "optim has a value already"),
    ):
        assert recurring.main(args) == 2
        assert message in capsys.readouterr().err


# ---- when it runs ---------------------------------------------------------------------------------------------------------------------


def due(zone: str, first: datetime.datetime, days: int) -> list[str]:
    """When a cron of half past two runs, in UTC."""
    import asyncio

    schedule = CronSchedule(cron="30 2 * * *", timezone=zone)
    dates = asyncio.run(schedule.get_dates(days, first.replace(tzinfo=ZoneInfo(zone))))
    return [date.astimezone(datetime.UTC).strftime("%d %H:%M") for date in dates]


def test_it_runs_once_a_day_when_the_clock_is_changed():
    assert due("Europe/Berlin", datetime.datetime(2027, 3, 27), 3) == ["27 01:30", "28 00:30", "29 00:30"]
    assert due("Europe/Berlin", datetime.datetime(2027, 10, 30), 3) == ["30 00:30", "31 00:30", "01 01:30"]


# ---- for real -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    content = tar(pairs(12))
    (folder / "a.tar").write_bytes(content)
    (folder / "b_|_`x`.tar").write_bytes(content[: len(content) // 2])
    return folder


@pytest.fixture
def form(shards, monkeypatch):
    monkeypatch.setenv(ROOTS, str(shards))
    values = {
        "line": LINE, "shards": [f"{shards}/*.tar"], "heldout": [f"{INK}/heldout-*.tar"], "least": 4, "batch": 4, "index": f"{shards}/indexes",
        "optim": {"lr": 1e-4, "warmup": 1}, "probe": {"samples": 4}, "tolerance": 1.0,
    }  # fmt: skip
    return lambda **more: Recurring(**values | more)


@pytest.fixture(scope="module", autouse=True)
def _clean():
    shutil.rmtree(aliases.line_folder(LINE), ignore_errors=True)
    yield
    shutil.rmtree(aliases.line_folder(LINE), ignore_errors=True)


def run(form: Recurring) -> Any:
    return recurring.recurring(form, return_state=True)


def history() -> str:
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[f"{LINE}-history"])))
    return str(max(found, key=lambda one: one.created).data)


@pytest.mark.operator
@pytest.mark.ci
def test_a_year_in_small(server, shards, form):
    """One line, in the order of its life; each stage takes seconds to start, so the parts are not tests of their own."""
    # the first is made from the base; a damaged shard is told
    state = run(form())
    assert state.name == "Completed", state
    first = lifecycle.load_all(LINE)[0]
    assert (first.verdict, first.samples, first.shards) == ("promoted", 12, 1)
    assert "1 shards cannot be used" in state.message
    last = record.read(str(ROOT / first.out))
    assert [parent["role"] for parent in last.parents] == ["base", "teacher", "data.train", "data.heldout"]
    assert last.step == 3
    assert aliases.resolve(f"{LINE}:latest") == first.out
    page = history()
    assert r"b\_\|\_\`x\`.tar is rejected at byte" in page.replace(str(shards).replace("_", r"\_") + "/", "")
    assert re.search(rf"\| 1 \| [0-9-]+ [0-9:]+ UTC \| 12 \| .* \| promoted \| `{first.id[:12]}` \|", page)

    # nothing new; another run at work; too little
    state = run(form())
    assert (state.name, state.type.value) == ("Skipped", "COMPLETED")
    assert state.message.startswith(f"Nothing new in 2 shards; the line {LINE} waits for 4 samples.")
    handle = run_folder.lock(aliases.line_folder(LINE))
    state = run(form())
    os.close(handle)  # type: ignore[arg-type]
    assert (state.name, state.message) == ("Skipped", f"Another run works on the line {LINE}. What is new waits for the next run.")
    (shards / "c.tar").write_bytes(tar([(f"c{i}.{end}", part) for i in range(3) for end, part in (("jpg", jpeg(90 + i)), ("txt", b"a four"))]))
    state = run(form())
    assert state.name == "Skipped"
    assert state.message.startswith("3 new samples in 1 of 3 shards; ")
    assert not (ROOT / lifecycle.out(LINE, 2)).exists() or not list((ROOT / lifecycle.out(LINE, 2)).glob("*.json"))

    # mended, it is trained on together with what waited, on top of the one before; and the gate is shut
    (shards / "b_|_`x`.tar").write_bytes(tar([(f"b{i}.{end}", part) for i in range(3) for end, part in (("jpg", jpeg(50 + i)), ("txt", b"a two"))]))
    state = run(form(tolerance=0.0, optim={"lr": 3e-3, "warmup": 0}))
    assert state.name == "Not promoted", state
    second = lifecycle.load_all(LINE)[1]
    assert (second.verdict, second.samples, second.shards) == ("not promoted", 6, 2)
    assert second.before == pytest.approx(first.after, rel=1e-4)
    assert aliases.resolve(f"{LINE}:latest") == aliases.resolve(f"{LINE}:best") == first.out
    start = next(parent for parent in record.read(str(ROOT / second.out)).parents if parent["role"] == "start")
    assert (start["uri"], start["id"]) == (first.out, first.id)
    lines = [json.loads(line) for line in (ROOT / lifecycle.ledger(LINE)).read_text().splitlines()]
    assert [(line["run"], len(line["shards"])) for line in lines] == [(first.id, 1), (second.id, 2)]
    assert run(form()).name == "Skipped", "what was not good enough stays consumed"
