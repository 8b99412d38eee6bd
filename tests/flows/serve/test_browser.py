"""The operator's day in a real browser: fills in forms, watches, cancels, goes on, looks at the verdict. Screenshots are kept in runs/screenshots."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from dev2pro.artifacts.record import ROOT
from tests.flows.operator import OUT, checkpoints, serving, steps, until

pytestmark = [pytest.mark.operator, pytest.mark.ci]
CHROMIUM = "/usr/bin/chromium"  # Debian's
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHOTS = ROOT / "runs" / "screenshots"
PATIENCE = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("prefect")) as serve:
        yield serve


@pytest.fixture(scope="module")
def browser():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)


@pytest.fixture
def page(browser, serve):
    expect.set_options(timeout=PATIENCE)
    page = browser.new_page(viewport={"width": 1280, "height": 900}, base_url=serve.address)
    page.set_default_timeout(PATIENCE)
    log_in(page, serve.user)
    yield page
    page.close()


def log_in(page: Page, user: str, address: str = "") -> None:
    """Pastes USER:PASSWORD into the UI."""
    page.goto(f"{address}/")
    page.get_by_placeholder("admin:pass").fill(user)
    page.keyboard.press("Enter")
    until(lambda: page.evaluate("localStorage.getItem('prefect-password')"), what="logging in")  # the page's own policy forbids wait_for_function


def shot(page: Page, name: str) -> None:
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(1500)  # until what was drawn is there
    page.screenshot(path=SHOTS / f"{name}.png")


def form(page: Page, deployment: str) -> None:
    """Opens the form of a deployment, from the list of them."""
    page.goto("/v2/deployments")
    page.get_by_role("link", name=deployment, exact=True).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()
    expect(page.get_by_role("button", name="Submit")).to_be_visible()


def submit(page: Page, serve) -> str:
    """Submits the form: the id of the new run."""
    before = {run["id"] for run in serve.post("flow_runs/filter")}
    page.get_by_role("button", name="Submit").click()
    return until(lambda: next((run["id"] for run in serve.post("flow_runs/filter") if run["id"] not in before), None), what="a new run")


def choose(page: Page, now: str, option: str) -> None:
    """Another option of the list that shows `now`."""
    page.get_by_text(now, exact=True).last.click()
    page.get_by_role("option", name=option, exact=True).click()


def menu(page: Page, run: str, entry: str) -> None:
    page.goto(f"/v2/runs/flow-run/{run}")
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name=entry).click()


def open_artifact(page: Page, run: str, name: str) -> None:
    page.goto(f"/v2/runs/flow-run/{run}")
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_role("link", name=re.compile(f"{name}$|{name}\\s", re.MULTILINE)).first.click()
    page.wait_for_url("**/artifacts/key/**")  # the page before has such links, too
    page.locator("a[href*='/artifacts/artifact/']").first.click()


def progress(page: Page, run: str) -> int:
    """The step that the run's page shows."""
    page.goto(f"/v2/runs/flow-run/{run}")
    page.get_by_role("tab", name="Artifacts").click()
    page.wait_for_timeout(1500)
    match = re.search(r"step ([\d,]+) of", page.get_by_role("tabpanel").inner_text())
    return int(match[1].replace(",", "")) if match else 0


def pictures(page: Page) -> list[tuple[int, int]]:
    """Sizes of the pictures that have been drawn."""
    sizes = [one.evaluate("image => [image.naturalWidth, image.naturalHeight]") for one in page.locator("img[src^='data:image']").all()]
    return [(w, h) for w, h in sizes if w]


def test_a_pipeline_from_the_form_to_the_verdict(page, serve):
    form(page, "pipeline")
    choose(page, "miniature", "smoke")
    page.get_by_label("Folder (Optional)").fill(f"{OUT}/pipeline")
    shot(page, "form-pipeline")
    run = submit(page, serve)
    page.goto(f"/v2/runs/flow-run/{run}")
    expect(page.get_by_text("Running").first).to_be_visible()
    serve.until_state(run, "Completed", seconds=900)
    page.reload()
    expect(page.get_by_text("Completed").first).to_be_visible()
    page.wait_for_timeout(6000)  # the timeline takes its time
    shot(page, "run-pipeline")
    open_artifact(page, run, "test-serve-pipeline-evaluate-verdict")
    expect(page.get_by_role("table")).to_contain_text("recovered@1")
    until(lambda: pictures(page), what="pictures")
    expect(page.get_by_text("report.html").first).to_be_visible()
    shot(page, "verdict")
    keys = {artifact["key"] for artifact in serve.artifacts(run) if artifact["key"]}
    assert keys >= {f"test-serve-pipeline-{stage}-curves" for stage in ("recover", "lora-chalk-base-1", "lora-chalk-recovered-1")}


def test_watching_cancelling_and_going_on(page, serve):
    form(page, "recover")
    page.get_by_label("Folder (Optional)").fill(f"{OUT}/watched")
    page.get_by_label("Steps (Optional)").fill("0")
    page.get_by_role("button", name="Submit").click()
    shot(page, "form-refuses")  # the browser says: must be greater than or equal to 1
    assert not page.get_by_label("Steps (Optional)").evaluate("field => field.validity.valid")
    page.get_by_label("Steps (Optional)").fill("1500")
    page.get_by_label("Batch (Optional)").fill("8")
    page.get_by_label("Name (Optional)").fill("chalk")
    page.get_by_label("Every (Optional)").last.fill("200")
    page.get_by_label("Pictures (Optional)").last.fill("8")
    shot(page, "form")
    run = submit(page, serve)
    until(lambda: steps("watched") > 20, what="training")

    first = until(lambda: progress(page, run), what="progress")
    until(lambda: progress(page, run) > first, what="progress that moves")
    shot(page, "run-artifacts")
    until(
        lambda: {artifact["key"] for artifact in serve.artifacts(run)} >= {"test-serve-watched-curves", "test-serve-watched-pictures"}, what="curves"
    )
    for name in ("curves", "pictures"):
        open_artifact(page, run, f"test-serve-watched-{name}")
        assert until(lambda: pictures(page), what=name)
        assert not page.get_by_text('"', exact=True).count()
        shot(page, name)

    menu(page, run, "Cancel")
    page.locator("[role=dialog], [role=alertdialog]").get_by_role("button", name=re.compile("Cancel")).last.click()
    serve.until_state(run, "Cancelled")
    page.reload()
    expect(page.get_by_text("Cancelled").first).to_be_visible()
    shot(page, "cancelled")
    saved = checkpoints("watched")[-1]
    open_artifact(page, run, "test-serve-watched-checkpoints")
    expect(page.get_by_role("table")).to_contain_text(f"checkpoint-{saved}")
    shot(page, "checkpoints")

    menu(page, run, "Copy to new run")
    expect(page.get_by_label("Steps (Optional)")).to_have_value("1500")
    again = submit(page, serve)
    until(lambda: f"going on after step {saved} of 1500" in serve.run_log(again), what="going on")
    serve.cancel(again)
    serve.until_state(again, "Cancelled")


def test_a_schedule_is_switched_on_and_off_and_keeps_what_was_filled_in(page, serve):
    deployment = serve.deployments()["recurring"]["id"]
    mine = {"recurring": {"line": "mine", "least": 12}}
    serve.api.patch(f"deployments/{deployment}", json={"parameters": mine}).raise_for_status()

    def active() -> bool:
        return serve.deployments()["recurring"]["schedules"][0]["active"]

    page.goto(f"/v2/deployments/deployment/{deployment}")
    switch = page.get_by_role("switch").first
    for wanted in (True, False, True, False):
        switch.click()
        expect(switch).to_be_checked(checked=wanted)
        until(lambda: active() == wanted, what="switching")  # noqa: B023
    shot(page, "schedule")
    assert serve.deployments()["recurring"]["parameters"] == mine
    page.get_by_role("tab", name="Parameters").or_(page.get_by_role("button", name="Parameters")).first.click()
    expect(page.get_by_text("mine").first).to_be_visible()
