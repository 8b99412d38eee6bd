"""Rebuilds data/miniature/ from scratch: frozen parts, then the teacher, then the two bases distilled from it. `make miniature`."""

import shutil
import sys

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from dev2pro.artifacts.record import ROOT
from flows import frame
from flows.form_fields import Group, form_field
from flows.plan import hydra_args, stage_folder
from flows.processes import reach
from flows.processes.launch import launch, run_context

BUNDLE = ROOT / "data" / "miniature"
INSIDE = {"guidance": [1.0, 6.0], "pairs": True, "batch": 24}  # a second base, which has learnt guidance 1 as well
stage = task(launch, name="stage", task_run_name="{stage}", cache_policy=NO_CACHE)


@flow(name="miniature")
def miniature(out: str = "runs/miniature") -> None:
    """Trains every part with fixed seeds and copies the result into data/miniature/."""
    parts, judge, teacher, base, inside = (stage_folder(out, name) for name in ("parts", "judge", "teacher", "base", "inside"))
    world = {"experiment": "miniature", "model.path": f"{parts}/pipeline", "save_dtype": "bfloat16"}
    from_nothing = {"steps": 4000, "batch": 64, "ema": 0.995, "caption_dropout": 0.15, "probe.every": 500, "teacher": None}
    with run_context():
        judged = stage.submit("miniature", hydra_args(out=judge, part="judge"), judge)
        stage("miniature", hydra_args(out=parts, part="pipeline"), parts)
        for name in ("shards", "pipeline", "prompts.json"):
            install(f"{parts}/{name}", name)
        stage("recover", hydra_args(world, from_nothing, {"out": teacher}), teacher)
        stage("distill", hydra_args(world, {"out": base, "teacher": teacher}), base)
        stage("distill", hydra_args(world, INSIDE, {"out": inside, "teacher": teacher}), inside)
        judged.result()
    install(f"{judge}/judge", "judge")
    install(f"{teacher}/transformer", "teacher/transformer")
    install(f"{base}/transformer", "pipeline/transformer")
    install(f"{inside}/transformer", "inside/transformer")


def install(path: str, name: str) -> None:
    """Copies a file or folder into the bundle and replaces the old one."""
    source, target = ROOT / path, BUNDLE / name
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


class Out(Group):
    """Where the parts are trained."""

    out: str = form_field("Folder", "Where the parts are trained.", "runs/miniature")


def main(args: list[str]) -> int:
    """Runs the flow. Returns the exit code."""

    def work(form: Out) -> None:
        reach.check()
        miniature(form.out)

    return frame.run("miniature", Out, args, work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
