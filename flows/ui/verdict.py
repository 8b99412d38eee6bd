"""The result of an evaluation, a diagnosis or a tuning as a page of the UI: the verdict, the table of gains, pictures, and the path of the report."""

import base64
import io
from pathlib import Path

from PIL import Image
from prefect.artifacts import create_markdown_artifact

from dev2pro.artifacts.record import Artifact
from dev2pro.escape import markdown
from flows.ui.progress import key

SHEETS = 3  # contact sheets on the page; the report has all of them
WIDTH, QUALITY = 900, 80
WORDS = {"diagnose": ("diagnosis", "What the base's guidance input does"), "tune": ("choice", "How the LoRA is to be used")}


def show(result: Artifact) -> None:
    """Creates the Prefect artifact `<folder>-verdict`."""
    create_markdown_artifact(key=f"{key(Path(result.uri))}-verdict", markdown=page(result), description="How the LoRAs compare")


def show_words(result: Artifact) -> None:
    """Creates the Prefect artifact `<folder>-diagnosis` or `-choice`: the sentences of a diagnosis or a tuning, and a tuning's sheets."""
    name, description = WORDS[result.stage]
    words = "\n\n".join([*(markdown(line) for line in result.metrics["words"]), *_sheets(result)])
    create_markdown_artifact(key=f"{key(Path(result.uri))}-{name}", markdown=words, description=description)


def page(result: Artifact) -> str:
    """The page in markdown."""
    pictures = "\n\n".join(_sheets(result))
    return (
        f"## {markdown(result.metrics['verdict'])}\n\n{_table(result)}\n\nThe whole report: {markdown(f'{result.uri}/report.html')}\n\n{pictures}\n"
    )


def _sheets(result: Artifact) -> list[str]:
    return [f"![]({_small(sheet)})" for sheet in sorted(Path(result.uri, "sheets").glob("*.png"))[:SHEETS]]


def _table(result: Artifact) -> str:
    """Gains of prompt fidelity, in points of a hundred pictures; `style` None is the mean over styles."""
    gains = [gain for gain in result.metrics["gains"] if gain["metric"] == "prompt_fidelity"]
    rows = []
    for gain in gains:
        mean, low, high = (f"{100 * gain[key]:+.0f}" for key in ("mean", "low", "high"))
        style = markdown(gain["style"]) if gain["style"] else "**all**"
        rows.append(f"| {style} | {markdown(gain['arm'])} | {markdown(gain['rival'])} | {mean} | {low} to {high} |")
    head = ["| style | LoRA | against | obeys the prompt more often, in points | 95% interval |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def _small(sheet: Path) -> str:
    image, file = Image.open(sheet).convert("RGB"), io.BytesIO()
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    image.save(file, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
