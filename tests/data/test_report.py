"""The report on a data set: what it says of folders and tars, as a page without scripts, beside a run and on its own."""

import html.parser
import json
from pathlib import Path

import pytest
from PIL import Image

from data import report, snapshot
from data.sources import DataConfig, RunSnapshots
from data.storage.transport import ReadConfig
from dev2pro.artifacts import record
from flows.ui import dataset
from tests.data.test_overlap import HELD, OTHERS, folder, photograph, shard
from tests.shards import called, encoded

PIPELINE = str(Path(__file__).resolve().parents[2] / "data/miniature/pipeline")
HOSTILE = '<script>alert("x")</script><img src=https://evil.example/x onerror=alert(1)> \x1b[31m [x](javascript:alert(1))'


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = list[str](), list[tuple[str, str | None]](), ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def written(tmp_path: Path, *args: str) -> tuple[str, Page]:
    """Runs the command: (what it prints, the page)."""
    code, out, err = called(report.main, *args, "--cache", f"{tmp_path}/cache", "--out", f"{tmp_path}/data.html")
    assert (code, err) == (0, "")
    source = (tmp_path / "data.html").read_text()
    assert len(source) < 2e6
    return out, Page(source)


def test_a_folder_is_reported(tmp_path):
    train = folder(tmp_path / "train", **OTHERS, again__jpg=encoded(photograph(1), "JPEG", quality=70), tiny__png=encoded(photograph(9, 20, 8)))
    (tmp_path / "train/t0.txt").write_text("(masterpiece:1.2), a house")
    held = folder(tmp_path / "held", copy__webp=encoded(photograph(2), "WEBP", lossless=True), **HELD)
    out, page = written(tmp_path, train, "--heldout", held, "--resolution", "64", "--bucket-step", "8", "--model", PIPELINE)
    assert out == f"report: 6 pictures, 3 held out; 5 findings, in {tmp_path}/data.html\n"
    for expected in (
        "6 pictures are trained on, 3 held out. Held-out pictures are among those trained on: a stage refuses this.",
        f"1 of 3 ({held}/copy.webp is {train}/t2.png)",
        "Captions with weights such as (word:1.3), which this model reads literally: 1 of 6 ((masterpiece:1.2) in ",
        f"Pictures that look like another one: 1 of 6 ({train}/t1.png looks like {train}/again.jpg)",
        f"Pictures enlarged by more than 1.5: 1 of 6 (most: {train}/tiny.png, by ", "Pictures that lose more than 25%", "length in tokens",
        "Held out and trained on", "All of them, with",
    ):  # fmt: skip
        assert expected in " ".join(page.text.split()), expected
    assert page.tags.count("img") == 6 + 2 + 2


def test_tars_a_snapshot_and_what_an_index_rejects(tmp_path):
    path = shard(tmp_path / "a.tar", **OTHERS, nothing__png=b"no picture", t0again__png=OTHERS["t0__png"])
    out, page = written(tmp_path, path)
    text = " ".join(page.text.split())
    assert out.startswith("report: 5 pictures, 1 left out; 3 findings")
    assert "pictures that are there twice, byte for byte: 1 of 5".capitalize() in text
    assert "samples that the index rejects" in text
    assert "it is no readable" in text
    assert "length in characters" in text
    code, _, _ = called(snapshot.main, path, "--min-caption", "1", "--out", f"{tmp_path}/a.snapshot")
    assert code == 0
    assert written(tmp_path, f"{tmp_path}/a.snapshot")[0] == out


def test_a_hostile_caption_and_name_are_text(tmp_path):
    images = {f"t{i}__png": OTHERS[f"t{i}__png"] for i in range(3)}
    train = folder(tmp_path / "train", **images)
    (tmp_path / "train/t0.txt").write_text(HOSTILE + " (a:1.2) " + HOSTILE * 5)
    (tmp_path / "train/<i>bold.png").write_bytes(OTHERS["t3__png"])
    (tmp_path / "train/<i>bold.txt").write_text("[x](javascript:alert(1)) <lora:x:1>")
    _, page = written(tmp_path, train)
    assert not {"script", "i", "iframe", "form", "object"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all((value or "").startswith("data:") for name, value in page.attributes if name == "src")
    assert '<script>alert("x")</script>' in page.text
    assert "\x1b" not in page.text
    assert "<i>bold" in page.text


def test_an_option_that_cannot_work_and_data_that_is_not_there(tmp_path):
    train = folder(tmp_path / "train", **OTHERS)
    for args, code, expected in (
        ([train, "--aspect", "0.5"], 2, "data.aspect=0.5 cannot work"),
        ([train, "--resolution", "100"], 2, "is no multiple of data.bucket_step=64"),
        ([train, "--model", str(tmp_path)], 2, "The tokenizer_2 of the model"),
        ([train, "--model", "/nowhere"], 2, "The tokenizer_2 of the model /nowhere cannot be read (there is no such folder)"),
        ([f"{tmp_path}/nothing"], 3, "nothing"),
    ):
        ended = called(report.main, *args, "--cache", f"{tmp_path}/cache", "--out", f"{tmp_path}/x.html")
        assert ended[0] == code, ended
        assert expected in ended[2]
        assert "Traceback" not in ended[2]
    assert not (tmp_path / "x.html").exists()


def test_what_is_left_out_and_altered_of_a_folder(tmp_path):
    half_clear = Image.linear_gradient("L").resize((32, 32)).convert("RGBA")
    half_clear.paste((255, 0, 255, 0), (0, 0, 32, 16))
    train = folder(tmp_path / "train", **OTHERS, clear__png=encoded(half_clear, "PNG"))
    (tmp_path / "train/clear.txt").write_text("nothing to see")
    for name in ("a.heic", "b.psd", "<u>c.<i>x"):
        (tmp_path / "train" / name).write_bytes(b"not a picture")
    _, page = written(tmp_path, train)
    for expected in ("files ending .heic", "pip install pillow-heif", "b.psd", "convert them to PNG", "clear"):
        assert expected in page.text
    assert not {"i", "u"} & set(page.tags)


@pytest.fixture
def pins(tmp_path) -> RunSnapshots:
    train = folder(tmp_path / "train", **OTHERS, again__jpg=encoded(photograph(100), "JPEG", quality=70))
    (tmp_path / "train/t0.txt").write_text("a handwritten zero " * 9)
    read = ReadConfig(workers=0, cache=f"{tmp_path}/cache")
    config = DataConfig(name="x", train=[train], heldout=[folder(tmp_path / "held", **HELD)], resolution=32, bucket_step=8, read=read)
    (tmp_path / "out").mkdir()
    return RunSnapshots(config, f"{tmp_path}/out", resuming=False)


def test_a_run_writes_the_report_once(pins, tmp_path, capsys):
    stream = pins.stream(0, 2)
    facts = report.start(pins, stream, PIPELINE, 16)["report"]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("data: 5 samples (32x32: 5), ")
    assert said[1].startswith(
        f"data: held-out pictures that look like one that is trained on: 1 of 2 ({tmp_path}/held/h0.png looks like {tmp_path}/train/"
    )
    assert said[2].startswith("data: captions longer than the 16 tokens that the model reads, and cut off there: ")
    assert [line.removeprefix("data: ") for line in said[1:]] == facts["findings"]
    json.dumps(facts)
    page, stored = (tmp_path / "out" / name for name in (record.REPORT, record.FACTS))
    assert (report.REPORT, report.FACTS) == (record.REPORT, record.FACTS)
    before = page.read_bytes(), stored.read_bytes(), page.stat().st_mtime_ns
    assert report.start(pins, stream, PIPELINE, 16)["report"] == facts
    assert (page.read_bytes(), stored.read_bytes(), page.stat().st_mtime_ns) == before
    page.unlink()
    stored.unlink()
    report.start(pins, stream, PIPELINE, 16)
    assert (page.read_bytes(), stored.read_bytes()) == before[:2]  # the same bytes
    stored.write_text("{")
    assert report.start(pins, stream, PIPELINE, 16)["report"] == facts
    assert "tokens" not in str(report.start(pins, stream, PIPELINE, 500)["report"]["findings"])  # other settings, another report
    assert report.start(pins, stream, str(tmp_path), 16) == {}  # loading the model says what is wrong with it


def test_other_ranks_leave_it_to_the_first(pins, tmp_path):
    stream = pins.stream(0, 2)
    pins.is_main_process = False
    assert report.start(pins, stream, PIPELINE, 16) == {}
    assert not (tmp_path / "out" / record.REPORT).exists()


def test_the_report_is_no_part_of_an_artifact_s_id_nor_output_of_a_run():
    from dev2pro.artifacts import run_folder

    ids = [record.compute_id("lora", "lora", "x", [], [{"path": path, "bytes": 1, "sha256": "0" * 64}] if path else []) for path in
           ("", record.REPORT, record.FACTS, "other/data.json")]  # fmt: skip
    assert len(set(ids[:3])) == 1
    assert ids[3] != ids[0]
    assert {record.REPORT, record.FACTS} <= run_folder.STARTUP_FILES


def test_the_facts_become_a_page_of_the_ui(pins, tmp_path):
    out = tmp_path / "out"
    assert dataset.page(out) == ""
    report.start(pins, pins.stream(0, 2), PIPELINE, 16)
    page = dataset.page(out)
    assert "| used | 5 |" in page
    assert "captions longer than the 16 tokens" in page
    assert "![](data:image/jpeg;base64," in page
    facts = json.loads((out / record.FACTS).read_text())
    (out / record.FACTS).write_text(json.dumps({**facts, "findings": [HOSTILE], "sheet": "x) <script>"}))
    page = dataset.page(out)
    assert "<script>" not in page
    assert "](javascript" not in page
    assert "![]" not in page
    for broken in ("{", "[]", "{}", json.dumps({**facts, "pictures": "many"})):
        (out / record.FACTS).write_text(broken)
        assert dataset.page(out) == ""
