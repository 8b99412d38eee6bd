"""The history of a line of recovered models as a page of the UI: one row per generation, and the unusable shards."""

import re
from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger

from dev2pro.escape import markdown, printable
from dev2pro.redact import redact
from flows.generations import aliases, lifecycle
from flows.generations.aliases import ALIASES
from flows.generations.lifecycle import PROMOTED, Generation

ROWS, SHARDS = 100, 30  # most rows of generations, and of shards, on the page
SHORT = 12  # digits of an id that are shown


def sentence(generation: Generation) -> str:
    """The outcome of a generation."""
    if generation.verdict == PROMOTED:
        loss = f"{generation.before:.5f} -> {generation.after:.5f}"
        return f"Generation {generation.number} was promoted: held-out loss {loss}, on {generation.samples:,} new samples."
    return f"Generation {generation.number} was not promoted: {generation.why}."


def show(line: str, unusable: Sequence[dict[str, str]]) -> None:
    """Publishes the Prefect artifact `<line>-history`. Errors are logged and do not fail the run."""
    key = re.sub("[^a-z0-9]+", "-", line.lower()).strip("-")
    try:
        create_markdown_artifact(key=f"{key}-history", markdown=page(line, unusable), description=f"The recovered models of {line}")
    except Exception as error:
        get_run_logger().warning(printable(f"the history of {line} cannot be shown at the moment ({type(error).__name__}: {error})"))


def page(line: str, unusable: Sequence[dict[str, str]]) -> str:
    """The page in markdown."""
    generations = lifecycle.load_all(line)
    lines = [f"- **{alias}** is {_code(aliases.target(line, alias) or 'nothing yet')}" for alias in ALIASES]
    lines += ["", "| generation | begun | new samples | held-out loss before | after | verdict | id |", "|---|---|---|---|---|---|---|"]
    lines += [_row(generation) for generation in generations[: -ROWS - 1 : -1]]
    lines += ["", f"{len(generations) - ROWS:,} older ones are not shown."] if len(generations) > ROWS else []
    if unusable:
        lines += ["", f"### {len(unusable):,} shards cannot be used", "", "They are left out, and looked at again the next time.", ""]
        lines += [f"- {_plain(shard['reason'])}" for shard in unusable[:SHARDS]]
    return "\n".join(lines) + "\n"


def _row(generation: Generation) -> str:
    before, after = (f"{loss:.5f}" if loss is not None else "" for loss in (generation.before, generation.after))
    verdict = _plain(f"{generation.verdict or 'under way'}{f': {generation.why}' if generation.why else ''}")
    started_at = _plain(generation.begun[:16].replace("T", " "))
    return f"| {generation.number} | {started_at} UTC | {generation.samples:,} | {before} | {after} | {verdict} | {_code(generation.id[:SHORT])} |"


def _code(text: str) -> str:
    """The text as inline code. Backticks and bars are removed, because nothing can be escaped there."""
    return f"`{re.sub('[`|]', '', printable(text))}`"


def _plain(text: str) -> str:
    """Untrusted text, redacted and escaped."""
    return markdown(redact(text))
