"""Names, verdicts, errors and a stage's output are untrusted; in the UI's pages, in logs and in the webhook they are only text."""

import json
import re
from types import SimpleNamespace

import pytest
from markdown_it import MarkdownIt
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from dev2pro.artifacts.record import Artifact
from flows import concepts, form_fields
from flows.generations import aliases, history, lifecycle
from flows.processes import launch
from flows.processes.gpu_slots import Slots
from flows.serve import notify
from flows.ui import progress, verdict

HOSTILE = "<img src=x onerror=alert(1)>\x1b[2J![](http://tracker.example/x.png) [a](javascript:alert(1)) | `x` \u202e\nforged"
ESCAPES = "\x1b]0;owned\x07\x9b31m\u202e"


def tokens(page: str) -> set[str]:
    """Types of the markdown tokens of a page."""
    parsed = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(page)
    return {node.type for token in parsed for node in (token, *(token.children or []))}


def evaluation(folder, text: str) -> SimpleNamespace:
    (folder / "sheets").mkdir(exist_ok=True)
    Image.new("RGB", (8, 8)).save(folder / "sheets" / "0.png")
    gain = {"metric": "prompt_fidelity", "style": text, "arm": text, "rival": text, "mean": 0.1, "low": 0.0, "high": 0.2}
    return SimpleNamespace(metrics={"verdict": text, "gains": [gain, gain | {"style": None}]}, uri=str(folder))


def test_a_verdict_page_is_what_it_is_with_any_names(tmp_path):
    page = verdict.page(evaluation(tmp_path, HOSTILE))
    assert tokens(page) == tokens(verdict.page(evaluation(tmp_path, "plain")))
    assert page.count("![](") == 1
    assert page.replace("\n", "").isprintable()
    assert "onerror" in page  # it is shown, as text


def test_the_words_of_a_choice_are_what_they_are_with_its_sheets(tmp_path, monkeypatch):
    shown = dict[str, dict[str, str]]()
    monkeypatch.setattr(verdict, "create_markdown_artifact", lambda **what: shown.update({what["key"].rpartition("-")[2]: what}))
    for stage, text in (("tune", HOSTILE), ("diagnose", "plain")):
        verdict.show_words(SimpleNamespace(stage=stage, uri=evaluation(tmp_path, "").uri, metrics={"words": [text, text]}))
    page = shown["choice"]["markdown"]
    assert shown["choice"]["description"] == "How the LoRA is to be used"
    assert tokens(page) == tokens(shown["diagnosis"]["markdown"])
    assert page.count("![](") == 1
    assert page.replace("\n", "").isprintable()


def test_a_summary_of_concepts_is_what_it_is_with_any_errors():
    def failed(text: str) -> SimpleNamespace:
        return SimpleNamespace(state=SimpleNamespace(name="Failed", result=lambda raise_on_failure: RuntimeError(text)))

    page = concepts.summary({HOSTILE: failed(HOSTILE)})
    assert tokens(page) == tokens(concepts.summary({"plain": failed("plain")}))
    assert len(page.splitlines()) == 3
    assert page.replace("\n", "").isprintable()
    assert Artifact  # a failed one is none


def test_a_history_is_what_it_is_with_any_records(monkeypatch):
    def page(text: str) -> str:
        generation = lifecycle.Generation("main", 1, [], 1, 0.0, 1, 1, text, verdict=text, why=text, id=text)
        monkeypatch.setattr(lifecycle, "load_all", lambda line: [generation])
        monkeypatch.setattr(aliases, "target", lambda line, alias: text)
        return history.page("main", [{"shard": text, "reason": text}])

    assert tokens(page(HOSTILE)) == tokens(page("plain"))
    assert page(HOSTILE).count("\n") == page("plain").count("\n")
    assert page(HOSTILE).replace("\n", "").isprintable()


def test_descriptions_are_what_they_are_with_any_stage(monkeypatch, tmp_path):
    """The UI takes every artifact's description for markdown with HTML in it."""
    (tmp_path / "checkpoint-000002").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "previews").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "previews" / "000001.jpg")
    descriptions, warned = list[str](), list[str]()
    monkeypatch.setattr(progress.ProgressReporter, "_show", lambda self, what, name="": descriptions.append(what.description))
    reporter = progress.ProgressReporter(HOSTILE, tmp_path, warned.append)
    reporter.on_event({"stage": HOSTILE, "step": 1, "of": 2, "text": HOSTILE})
    reporter.end()
    assert len(descriptions) == 4
    assert not warned
    assert {kind for one in descriptions for kind in tokens(one)} <= {"paragraph_open", "inline", "text", "text_special", "paragraph_close"}, (
        descriptions
    )
    assert all(one.isprintable() for one in descriptions)


def test_a_server_s_error_is_safe_in_the_log(monkeypatch, tmp_path):
    def failing(_: progress.ProgressReporter) -> None:
        raise OSError(HOSTILE)

    monkeypatch.setattr(progress.ProgressReporter, "_pictures", failing)
    warned = list[str]()
    progress.ProgressReporter("stage", tmp_path, warned.append).end()
    assert "onerror" in warned[0]
    assert warned[0].isprintable()


@pytest.mark.parametrize("value", ["runs/x\n", "data/\x9b2J", "data/\u202ex", "data/x\u2028", "data/x\n", "main\n"])
def test_a_form_takes_no_line_break_and_nothing_that_a_terminal_obeys(value):
    for kind in (form_fields.RunFolder, form_fields.Url, form_fields.Name, form_fields.Line, form_fields.Base):
        with pytest.raises(ValidationError):
            TypeAdapter(kind, config={"regex_engine": "python-re"}).validate_python(value)


@pytest.mark.parametrize("pattern", [form_fields.SAFE, form_fields.plan.NAME + form_fields.END])
def test_a_pattern_means_the_same_in_a_browser(pattern):
    assert not re.search(r"\\[AZ]|\(\?P|\(\?<", pattern)  # what JavaScript knows not, or else


@pytest.fixture
def run_code():
    """The log lines of a real process."""

    def of(code: str) -> list[str]:
        lines = list[str]()
        launch._run_process("stage", ["-c", code], Slots((), {}), None, lines.append)
        return lines

    return of


def test_a_stage_s_words_reach_the_log_without_what_a_terminal_obeys(run_code):
    lines = run_code(f"print({('caption ' + ESCAPES)!r}); print('ordinary: 手書き 🐈')")
    assert lines == ["caption \\x1b]0;owned\\x07\\x9b31m\\u202e", "ordinary: 手書き 🐈"]


def test_the_last_words_in_an_error_are_safe_too(run_code):
    with pytest.raises(launch.StageFailed) as error:
        run_code(f"print({ESCAPES!r}); raise SystemExit(3)")
    assert str(error.value).isprintable()
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    "line",
    [
        "@@", "@@{", "@@[]", "@@1", "@@{}", '@@{"stage": "x", "step": 1, "of": 0, "text": ""}', '@@{"stage": "x", "step": "1", "of": 2, "text": ""}',
        '@@{"stage": "x", "step": 1, "of": 2}', '@@{"stage": [], "step": 1, "of": 2, "text": ""}',
        '@@{"measured": 1}', '@@{"measured": {"step": "x"}}',
        "@@" + "[" * 100_000, '@@{"stage": "x", "step": 1.5, "of": 1' + "0" * 400 + ', "text": ""}',
        '@@{"stage": "x", "step": NaN, "of": 2, "text": ""}', '@@{"stage": "x", "step": 3, "of": 2, "text": ""}',
    ],
    ids=lambda line: line[:60],
)  # fmt: skip
def test_what_only_looks_like_an_event_is_words(run_code, line):
    assert launch._parse_event(line) is None
    assert run_code(f"print({line!r}); print('after')")[-1] == "after"  # and whoever listens goes on


def test_events_are_known():
    step = {"stage": "lora", "step": 3, "of": 8, "text": "loss 1"}
    measured = {"stage": "lora", "measured": {"step": 3, "loss": 1.0}}
    assert [launch._parse_event("@@" + json.dumps(one)) for one in (step, measured)] == [step, measured]


def test_the_webhook_is_told_json_whatever_went_wrong():
    """Rendered as Prefect's server does it."""
    from prefect.server.utilities.user_templates import render_user_template_sync

    message = 'it said "no"\n\\ <!channel> {{ 7 * 7 }} ' + ESCAPES
    event = {"resource": {"name": "runs/x", "id": "y"}, "event": "prefect.flow-run.Failed", "payload": {"message": message}}
    text = json.loads(render_user_template_sync(notify.PAYLOAD, {"event": event}))["text"]
    assert text == f"dev2pro: runs/x: prefect.flow-run.Failed. {message.replace('<', '(')}"
