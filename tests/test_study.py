"""The study: arms cost the same, parts run the pipeline's own commands, and its tables say what its numbers say."""

import csv
from pathlib import Path

import pytest

from bench import study, study_tables
from bench.study_tables import METRICS
from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError
from dev2pro.judging import diagnosis
from flows import plan as plans

PASSES = {"flow_matching": 3, "guidance": 4, "cfg_augmented": 4, "distillation": 5, "model_guidance": 5}  # of a step, a backward pass counted as two
STEP_TOWARDS = "recovered@1-short"


def cost(plan: plans.Plan, arm: str) -> int:
    chosen = plan.arms[arm]
    own = int(chosen.lora["steps"]) * PASSES[str(chosen.lora.get("loss.name", "flow_matching"))]
    return own + (cost(plan, chosen.teacher_arm) if chosen.teacher_arm else 0)


def test_every_arm_costs_the_same():
    plan = plans.read("study")
    assert {cost(plan, arm) for arm in plan.arms if arm != STEP_TOWARDS} == {1800}


def test_arms_with_fewer_and_more_steps_cost_what_their_names_say():
    plan = plans.read(study_tables.STEPS)
    for leader in study_tables.LEADERS:
        for passes in study_tables.PASSES:
            arm = leader if passes == study_tables.ALL else f"{leader}-{passes}"
            assert cost(plan, arm) == pytest.approx(passes, abs=2), arm
        assert plan.arms[leader] == plans.read("study").arms[leader], "at 1,800 passes it is the study's own arm"


def test_a_leader_s_means_are_in_the_order_of_its_passes(tmp_path):
    arms = {arm if passes == study_tables.ALL else f"{arm}-{passes}": 1 / passes for arm in study_tables.LEADERS for passes in study_tables.PASSES}
    write(tmp_path, "outside", 0, arms)
    found = study_tables.read("outside", tmp_path)
    distances = study_tables.means_over_steps(found, "distance_to_ideal", "recovered@1")
    assert distances == sorted(distances, reverse=True)
    assert "| recovered@1 | prompt fidelity | 94 | 94 | 94 | 94 | 94 |" in study_tables.table_of_steps(found)
    study_tables.draw_steps(found, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 10_000


def test_a_part_is_the_pipeline_s_stages_in_an_order_that_can_be_run(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "pipeline", lambda base: tmp_path / base)
    plan, done = plans.read("study"), set()
    jobs = study.jobs(plan, "inside", 3)
    for job in jobs:
        assert set(job.needs) <= done, job.name
        done.add(job.name)
    assert [job.stage for job in jobs].count("lora") == len(plan.arms) * len(plan.styles)
    by_name = {job.name: job for job in jobs}
    assert by_name["chalk redistilled"].needs == ["recover", "chalk recovered@1-short"]
    assert by_name["chalk base@1"].needs == []
    assert "loss.teacher_lora='runs/study/inside/3/lora/chalk/recovered@1-short'" in by_name["chalk redistilled"].words
    assert all(f"model.path={tmp_path}/inside" in job.words for job in jobs)
    assert all("seed=3" in job.words for job in jobs)


def test_a_spot_check_of_the_published_numbers(monkeypatch, tmp_path):
    """One style, one seed, two arms, trained and judged again; another CPU rounds otherwise, and training amplifies that."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(study, "RUNS", tmp_path)
    arms, jobs = ["base@1", "cfg_augmented@3.5"], {job.name: job for job in study.jobs(plans.read("study"), "outside", 0)}
    for arm in arms:
        study.run(jobs[f"chalk {arm}"], str(tmp_path / "log.txt"))
    loras = ",".join(f"'{tmp_path}/outside/0/lora/chalk/{arm}'" for arm in arms)
    words = [word for word in jobs["evaluate chalk"].words if not word.startswith(("loras=", "out="))]
    words += [f"loras=[{loras}]", f"out={tmp_path}/evaluate", "teacher=null"]
    study.run(study.Job("evaluate", "evaluate", words), str(tmp_path / "log.txt"))
    with (tmp_path / "evaluate/pictures.csv").open() as file:
        found = [(row["arm"], float(row["prompt_fidelity"])) for row in csv.DictReader(file)]
    with (ROOT / "docs/study/outside-0.csv").open() as file:
        published = [(row["arm"], float(row["prompt_fidelity"])) for row in csv.DictReader(file) if row["style"] == "chalk"]
    for arm in arms:
        now, then = ([value for name, value in table if name == arm] for table in (found, published))
        assert (len(now), len(then)) == (150, 10)
        assert sum(now) / len(now) == pytest.approx(sum(then) / len(then), abs=0.1), arm


def write(folder: Path, base: str, seed: int, arms: dict[str, float]) -> None:
    """A part of two styles, in which an arm's distance to the ideal is the given one but for digit and run, fidelity 1 less that."""
    with (folder / f"{base}-{seed}.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["base", "seed", "style", "arm", "digit", "pictures", "steps", "seconds", "response_kept", *METRICS])
        for number, style in enumerate(("chalk", "poster")):
            for arm, distance in arms.items():
                for digit in range(10):
                    here = distance + 0.01 * digit + 0.02 * number + 0.001 * ((7 * digit + 3 * seed + len(arm)) % 5)
                    rows.writerow([base, seed, style, arm, digit, 15, 600, 20.0, 0.5, here, 1 - here, 0.3])


def test_what_recovery_gains_is_told_beside_each_base_s_diagnosis(found):
    _, _, line = study_tables.table_of_bases({"outside": found})
    assert line.startswith("| outside | 3.9 | 1.18, 0.49 | +0.0")
    *_, plainly, best, _ = line.split("|")
    assert plainly.startswith(" -0.0")
    assert plainly.endswith("cfg_augmented@3.5 ")
    assert best.startswith(" +0.0")
    assert best.endswith("redistilled ")


def test_what_a_diagnosis_says_that_recovery_brings_is_what_the_study_found():
    for base, told in diagnosis.GAINS.items():
        found = study_tables.read(base, ROOT / study_tables.RESULTS)
        for (arm, rival), numbers in zip(diagnosis.COMPARED, told, strict=True):
            interval = study_tables.interval_of(found.gain("distance_to_ideal", arm, rival))
            assert tuple(interval.values()) == pytest.approx(numbers, abs=0.0006), (base, rival)


ARMS = {"none": 0.5, "base@1": 0.2, "base@3.5": 0.25, "cfg_augmented@3.5": 0.1, "recovered@1": 0.12, "recovered@1-short": 0.15, "redistilled": 0.05}


@pytest.fixture
def found(tmp_path) -> study_tables.Results:
    for seed in (0, 1):
        write(tmp_path, "outside", seed, ARMS)
    return study_tables.read("outside", tmp_path)


def test_parts_are_merged_run_by_run(found):
    assert (found.styles, found.seeds) == (["chalk", "poster"], ["0", "1"])
    assert found.tables["prompt_fidelity"]["base@1"].shape == (10, 2, 2)
    assert found.arms == ["redistilled", "cfg_augmented@3.5", "recovered@1", "base@1", "base@3.5"]


def test_a_gain_is_positive_where_the_arm_is_better(found):
    assert found.gain("distance_to_ideal", "redistilled", "base@1").min() > 0
    assert found.gain("prompt_fidelity", "redistilled", "base@1").min() > 0


def test_the_report_names_the_best_and_what_is_undecided(found):
    text = study_tables.report({"outside": found})
    assert "| **redistilled** |" in text
    assert "| *none* |" in text
    assert "2 styles, 2 seeds." in text
    lines = [line for line in text.splitlines() if line.startswith("| recovered@1 |")]
    assert any("cfg_augmented@3.5 | distance" in line and line.endswith("| worse |") for line in lines)
    assert any("base@1 | distance" in line and line.endswith("| better |") for line in lines)


def test_an_undecided_gain_says_how_many_runs_would_tell(tmp_path):
    for seed in range(2):
        write(tmp_path, "inside", seed, ARMS | {"base@1": ARMS["recovered@1"] + (0.02 if seed else -0.021)})
    text = study_tables.report({"inside": study_tables.read("inside", tmp_path)})
    assert "undecided; more than 200 runs would tell" in text


def test_an_arm_is_compared_in_the_seeds_that_both_have(tmp_path):
    write(tmp_path, "outside", 0, ARMS)
    write(tmp_path, "outside", 1, {arm: value + 0.01 for arm, value in ARMS.items() if arm != "redistilled"})
    found = study_tables.read("outside", tmp_path)
    assert found.values("distance_to_ideal", "redistilled").shape == (10, 2, 1)
    assert found.gain("distance_to_ideal", "redistilled", "base@1").shape == (10, 2, 1)
    assert found.gain("distance_to_ideal", "recovered@1", "base@1").shape == (10, 2, 2)
    assert any(line.startswith("| **redistilled** | 2 |") for line in study_tables.report({"outside": found}).splitlines())


def test_arms_that_share_no_seed_cannot_be_compared(tmp_path):
    write(tmp_path, "outside", 0, {"base@1": 0.2})
    write(tmp_path, "outside", 1, {"redistilled": 0.1})
    with pytest.raises(ValueError, match="redistilled and base@1 have no seed in common"):
        study_tables.read("outside", tmp_path).gain("distance_to_ideal", "redistilled", "base@1")


def test_arms_that_are_added_leave_the_others_as_they_were(tmp_path):
    file = tmp_path / "outside-0.csv"
    first = [["outside", "0", "chalk", arm, "3"] + ["1"] * (len(study.COLUMNS) - 5) for arm in ("none", "base@1")]
    study.write(file, {"base@1", "none"}, first)
    study.write(file, {"redistilled", "none"}, [[*first[0][:5], *["2"] * (len(study.COLUMNS) - 5)], [*first[1][:3], "redistilled", *first[1][4:]]])
    with file.open() as opened:
        found = {row["arm"]: row["pictures"] for row in csv.DictReader(opened)}
    assert found == {"none": "2", "base@1": "1", "redistilled": "1"}


def test_some_arms_come_with_what_they_need():
    plan = study.only(plans.read("study"), ["redistilled"])
    assert set(plan.arms) == {"redistilled", STEP_TOWARDS, "teacher@1"}
    with pytest.raises(ConfigError, match=r"--arm nothing is not in the plan\. Choose among base@1"):
        study.only(plans.read("study"), ["nothing"])


def test_a_base_without_parts_has_no_results(tmp_path):
    assert study_tables.read("dead", tmp_path) is None
