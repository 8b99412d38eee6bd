import html.parser
import json
import pathlib
import random
import re

import pytest
from PIL import Image, ImageDraw, ImageFont

from dev2pro.judging import report

HOSTILE = "<script>alert(1)</script>"
STYLES = ["chalk", "sideways", "halftone", "neon"]
ARMS = ["base@1", "base@3.5", "recovered@1", "teacher@1"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PROMPTS = [f"a handwritten {digit}" for digit in DIGITS]
INK = {"chalk": ("#2b3a33", "#e9efe6"), "sideways": ("#f4f1e8", "#22305a"), "halftone": ("#f6d9c5", "#a0303c"), "neon": ("#12061f", "#3df5d0")}
VOID = {"meta", "link", "img", "col"}
HALF = {"prompt_fidelity": 0.05, "style_similarity": 0.02, "distance_to_ideal": 0.012}  # width of a gain's interval, one side
FIDELITY = {"none": 0.985, "base@1": 0.78, "base@3.5": 0.8, "recovered@1": 0.955, "teacher@1": 0.968, "ideal": 0.99}


def around(rng: random.Random, mean: float, half: float, top: float = 1.0) -> dict[str, float]:
    return {"mean": mean, "low": mean - half * rng.uniform(0.8, 1.2), "high": min(top, mean + half * rng.uniform(0.8, 1.2))}


def cell(rng: random.Random, style: str, arm: str, inference: str, teacher: bool) -> dict:
    distance = {"none": 0.41, "recovered@1": 0.132, "teacher@1": 0.128, "ideal": 0.0}.get(arm, 0.168) + rng.uniform(0, 0.02) * (arm != "ideal")
    guided = inference != "base"
    return {
        "style": style, "arm": arm, "inference": inference, "guidance": 1.0 if guided else 3.5, "cfg_scale": 3.5 if guided else 1.0,
        "prompt_fidelity": around(rng, min(1.0, FIDELITY[arm] + rng.uniform(-0.06, 0.06)), 0.06),
        "clip_score": around(rng, 71 + 8 * rng.random(), 1.2, 100.0),
        "style_similarity": around(rng, (0.31 if arm == "none" else 0.78) + rng.uniform(0, 0.1), 0.02),
        "diversity": around(rng, 0.1 + 0.08 * rng.random(), 0.014), "memorisation": around(rng, 0.0123, 0.01),
        "kid": {"mean": rng.uniform(-0.0004, 0.03)},
        **({"distance_to_ideal": around(rng, distance, 0.012 * (arm != "ideal"))} if teacher else {}),
    }  # fmt: skip


def fake_metrics(styles: list[str] = STYLES, *, teacher: bool = True, recovery: bool = True) -> dict:
    rng = random.Random(7)
    arms = ARMS if teacher else ARMS[:3]
    cells = [cell(rng, style, "ideal", "teacher", True) for style in styles if teacher]
    cells += [cell(rng, style, arm, inference, teacher) for inference in ("base", "recovered") for style in styles for arm in ["none", *arms]]
    mean = {(c["style"], c["arm"], metric): c[metric]["mean"] for c in cells if c["inference"] == "base" for metric in HALF if metric in c}
    gains = []
    for rival, metric in [(r, m) for r in ("base@1", "base@3.5") for m in HALF if (styles[0], r, m) in mean]:
        sign = -1 if metric == "distance_to_ideal" else 1
        differences = [sign * (mean[style, "recovered@1", metric] - mean[style, rival, metric]) for style in styles]
        what = {"arm": "recovered@1", "rival": rival, "inference": "base", "metric": metric}
        gains += [{"style": style, **what, **around(rng, d, HALF[metric])} for style, d in zip(styles, differences, strict=True)]
        gains.append({"style": None, **what, **around(rng, sum(differences) / len(styles), HALF[metric] / 2)})
    curve = [
        {"step": step, "loss": 0.4 + 1.26 * decay,
         "loss_by_time": [round((0.9 - 0.08 * i) * (0.4 + 1.26 * decay * (1 + i / 4)), 6) for i in range(8)],
         "loss_usual": 0.44 + 0.5 * decay, "guidance_gap": 0.02 + 0.5 * decay, **({"teacher_distance": 0.019 + 1.1 * decay} if teacher else {})}
        for step in range(0, 801, 50)
        for decay in [0.5 ** (step / 45) * rng.uniform(0.9, 1)]
    ]  # fmt: skip
    return {
        "settings": {"model": "data/miniature/pipeline", "judge": "data/miniature/judge", "prompts": PROMPTS, "meanings": 10,
                     "seeds": 16, "steps": 12, "guidance": 3.5, "cfg_scale": 3.5, "images_per_cell": 160, "bootstrap": 2000, "seed": 0},
        "styles": styles, "arms": arms, "inference": ["base", "recovered"], "cells": cells, "gains": gains,
        "verdict": "Applied to the base, the LoRA trained on the recovered model obeys the prompt 14 points more often than base@3.5, its nearest "
                   "rival (95% interval 11 to 16, mean over styles): clearly better in 4 of 4 styles (chalk, sideways, halftone, neon), "
                   "clearly worse in 0 of 4 styles.",
        "memorisation_of_heldout": dict.fromkeys(styles, -0.0057),
        "recovery": {"guidance": 1.0, "recovered": 0.98312 if teacher else None, "curve": curve} if recovery else None,
    }  # fmt: skip


def fake_grids(styles: list[str] = STYLES, side: int = 32) -> list[report.Grid]:
    rng = random.Random(3)
    labels = ["ideal on teacher", *(f"{arm} on {inference}" for inference in ("base", "recovered") for arm in ["none", *ARMS])]
    return [
        report.Grid(style, seed, PROMPTS, [(label, [digit(rng, i, style, label, side) for i in range(10)]) for label in labels])
        for style in styles
        for seed in (0, 1)
    ]


def digit(rng: random.Random, number: int, style: str, label: str, side: int) -> Image.Image:
    paper, ink = ("#ffffff", "#222222") if label.startswith("none") else INK.get(style, ("#ffffff", "#000000"))
    drawn = rng.randrange(10) if label.startswith("base") and rng.random() < 0.2 else number
    picture = Image.new("RGB", (side, side), paper)
    center = (side / 2 + rng.uniform(-2, 2), side / 2 + rng.uniform(-2, 2))
    ImageDraw.Draw(picture).text(center, str(drawn), ink, ImageFont.load_default(0.8 * side), "mm")
    return picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=paper)


class Page(html.parser.HTMLParser):
    """Collects tags, attributes and text, and insists on balanced tags."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def written(folder: pathlib.Path, metrics: dict, grids: list[report.Grid]) -> tuple[str, Page]:
    report.write(folder / "report.html", metrics, grids)
    source = (folder / "report.html").read_text("utf-8")
    return source, Page(source)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return written(tmp_path_factory.mktemp("report"), fake_metrics(), fake_grids())


def test_nothing_is_fetched_and_nothing_runs(full):
    source, page = full
    assert "http://" not in source
    assert "https://" not in source
    assert "@import" not in source
    assert "url(" not in source
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed")]
    links = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset", "xlink:href")]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert all(f'id="{link[1:]}"' in source for link in links if link.startswith("#"))
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_everything_measured_is_there(full):
    metrics, (_, page) = fake_metrics(), full
    for word in [metrics["verdict"], *metrics["styles"], *metrics["arms"], *PROMPTS, "no LoRA", "ideal", "98.3%", "data/miniature/pipeline"]:
        assert word in page.text
    assert "which copy nothing, have −0.006 (chalk), " in page.text
    for cell_metrics in metrics["cells"]:
        fidelity = cell_metrics["prompt_fidelity"]
        assert f"{100 * fidelity['mean']:.1f} {100 * fidelity['low']:.1f} to {100 * fidelity['high']:.1f}" in page.text
        assert f"{cell_metrics['style_similarity']['mean']:.3f}" in page.text
        assert f"{cell_metrics['kid']['mean'] + 0.0:.4f}".replace("-", "−") in page.text
    for gain in metrics["gains"]:
        scale, digits = (100, 1) if gain["metric"] == "prompt_fidelity" else (1, 3)
        assert f"{scale * gain['mean']:+.{digits}f} {scale * gain['low']:.{digits}f} to".replace("-", "−") in page.text


def test_the_key_figure_is_the_mean_over_styles(full):
    some = [c["prompt_fidelity"]["mean"] for c in fake_metrics()["cells"] if (c["arm"], c["inference"]) == ("recovered@1", "base")]
    assert re.search(rf"{100 * sum(some) / 4:.0f} % \d+ to \d+ recovered@1", full[1].text)


def test_pictures_have_words_and_small_ones_are_enlarged(full):
    images = [attrs for tag, attrs in full[1].tags if tag == "img"]
    assert len(images) == 4 * 2 * 11 * 10
    assert images[0]["alt"] == "ideal on teacher: a handwritten zero"
    assert {(i["width"], i["height"], i["class"]) for i in images} == {("64", "64", "pixels")}


def test_every_plot_has_words_or_is_a_copy_of_numbers(full):
    charts = [attrs for tag, attrs in full[1].tags if tag == "svg" and attrs.get("role") == "img"]
    titles = [c["aria-label"].partition(":")[0] for c in charts]
    assert titles == ["Loss on held-out pictures", "Guidance gap", "Distance to the teacher", "Loss by time"]
    assert "nan" not in full[0]


def test_the_same_input_gives_the_same_bytes(full, tmp_path):
    assert written(tmp_path, fake_metrics(), fake_grids())[0] == full[0]


def test_names_and_prompts_are_escaped(tmp_path):
    metrics = fake_metrics([HOSTILE, '" onload="x'])
    metrics["settings"] |= {"prompts": [*PROMPTS[:9], HOSTILE], HOSTILE: HOSTILE}
    grid = fake_grids([HOSTILE])[0]
    grid = report.Grid(HOSTILE, 0, [*PROMPTS[:9], HOSTILE], [*grid.rows, (f"{HOSTILE} on base", grid.rows[0][1])])
    source, page = written(tmp_path, metrics, [grid])
    assert "<script" not in source.lower()
    assert page.text.count("alert(1)") > 10
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]


def test_invisible_characters_are_spelt_out_and_others_stay(tmp_path):
    prompts = [*PROMPTS[:8], "a\x1b[2J\u202eb", "trois\xa0chats 🐈 三"]
    _, page = written(tmp_path, fake_metrics(["chalk"]), [report.Grid("chalk", 0, prompts, fake_grids(["chalk"])[0].rows)])
    assert "a\\x1b[2J\\u202eb" in page.text
    assert "trois chats 🐈 三" in page.text
    assert not {"\x1b", "\u202e"} & set(page.text)


ATTACKS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "\"><svg onload=alert(1)>", "' onmouseover='alert(1)",
    "</title><base href=//evil.example>", "</style><style>*{}</style>", "{{ 7 * 7 }}", "javascript:alert(1)", "</script>",
    "a\x1b]0;owned\x07\x1b[2J\rb\x85\u2028\u202ec\x1cd",
]  # fmt: skip


def test_no_element_and_no_attribute_comes_from_a_text(tmp_path):
    """The page of hostile arms, styles, prompts and verdict is that of harmless ones, but for the texts."""

    def page(texts: list[str]) -> Page:
        metrics = json.loads(
            json.dumps(fake_metrics(["chalk", "ink"])).replace('"chalk"', json.dumps(texts[0])).replace('"ink"', json.dumps(texts[1]))
        )
        metrics = json.loads(json.dumps(metrics).replace('"recovered@1"', json.dumps(texts[2])))
        metrics["settings"]["prompts"], metrics["verdict"] = texts, " ".join(texts)
        rows = fake_grids(["chalk"])[0].rows
        grid = report.Grid(texts[0], 0, texts, [(f"{texts[i]} on {texts[-1 - i]}", pictures) for i, (_, pictures) in enumerate(rows[: len(texts)])])
        return written(tmp_path, metrics, [grid])[1]

    plain, hostile = page([f"plain {i}" for i in range(10)]), page(ATTACKS)
    assert [(tag, sorted(attrs)) for tag, attrs in hostile.tags] == [(tag, sorted(attrs)) for tag, attrs in plain.tags]
    for name in ("src", "href", "style", "class", "content", "http-equiv"):
        assert [attrs.get(name) for _, attrs in hostile.tags] == [attrs.get(name) for _, attrs in plain.tags], name
    assert not [c for c in hostile.text if not c.isprintable() and c not in "\n\t" and not c.isspace()]
    assert not {"\r", "\x85", "\x1c", "\u2028"} & set(hostile.text)
    policy = next(attrs["content"] for tag, attrs in hostile.tags if tag == "meta" and "http-equiv" in attrs)
    allowed = dict(one.strip().partition(" ")[::2] for one in policy.split(";"))
    assert allowed == {"default-src": "'none'", "img-src": "data:", "style-src": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'"}


@pytest.mark.parametrize("recovery", [True, False])
def test_without_a_teacher(tmp_path, recovery):
    grids = [report.Grid(g.style, g.seed, g.prompts, [r for r in g.rows if "teacher" not in r[0]]) for g in fake_grids(["chalk"])]
    _, page = written(tmp_path, fake_metrics(["chalk"], teacher=False, recovery=recovery), grids)
    assert "teacher@1" not in page.text
    assert "Distance to the ideal" not in page.text
    assert "mean over styles" not in page.text.replace(fake_metrics()["verdict"], "")
    assert ("Guidance gap" in page.text) == recovery
    assert "closed" not in page.text


def test_nothing_to_compare(tmp_path):
    metrics = fake_metrics(teacher=False, recovery=False)
    cells = [c for c in metrics["cells"] if c["arm"] == "base@1" and c["style"] != "neon"]
    cells[0]["style_similarity"] = {"mean": float("nan"), "low": float("nan"), "high": float("nan")}
    _, page = written(tmp_path, {**metrics, "cells": cells, "gains": [], "arms": ["base@1"], "verdict": "Nothing to compare."}, [])
    assert "Nothing to compare." in page.text
    assert "nan" not in page.text


def test_large_pictures_become_small(tmp_path):
    rng = random.Random(1)
    noise = Image.effect_noise((1024, 768), 60).convert("RGB")
    rows = [(f"{arm} on base", [noise, noise.rotate(180)]) for arm in ARMS]
    source, page = written(tmp_path, fake_metrics(), [report.Grid("chalk", rng.randrange(9), ["a lighthouse", "a fox"], rows)])
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert {(i["width"], i["height"], i.get("class")) for i in images} == {("160", "120", None)}
    assert len(source) < 400_000


@pytest.mark.parametrize(
    ("value", "digits", "sign", "expected"),
    [
        (0.0004, 3, False, "0.000"),
        (-0.0004, 3, True, "0.000"),
        (-0.0126, 3, True, "−0.013"),
        (17.04, 1, True, "+17.0"),
        (None, 1, False, "–"),
        (float("nan"), 1, False, "–"),
    ],
)
def test_numbers_for_people(value, digits, sign, expected):
    assert report.number(value, digits, sign) == expected


def test_the_best_is_marked_where_it_ties_and_references_do_not_compete():
    fidelity = report.METRICS[0]
    means = {"none": 1.0, "base@1": 0.9, "base@3.5": 0.95, "recovered@1": 0.95001, "teacher@1": 0.99}
    column = [(arm, {"mean": mean}) for arm, mean in means.items()]
    assert report._best(column, fidelity) == {"base@3.5", "recovered@1"}
    assert report._best(column, report.METRICS[4]) == {"base@1"}  # less is better


@pytest.mark.parametrize(
    ("name", "description"),
    [
        ("recovered@1", "trained on the recovered model at guidance 1"),
        ("cfg_augmented@3.5", "trained on the base at guidance 3.5 with the CFG-augmented loss"),
        ("model_guidance@3.5", "trained on the base at guidance 3.5 with the recovered model's guidance in its target"),
        ("redistilled", ""),
    ],
)
def test_an_arm_is_described_by_its_name(name, description):
    assert report._arm(name)["description"] == description
