"""What became of a line of recovered models, as a page of the UI: a row for every generation, and the shards that could not be used."""

import re
from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger

from dev2pro.escape import markdown, printable
from flows.generations import aliases, lifecycle
from flows.generations.aliases import ALIASES
from flows.generations.lifecycle import PROMOTED, Generation
from flows.ui.redact import redact

ROWS, SHARDS = 100, 30  # of the newest generations, and of shards
SHORT = 12  # digits of an id that are shown


def sentence(one: Generation) -> str:
    """How a generation came out."""
    if one.verdict == PROMOTED:
        return f"Generation {one.number} was promoted: held-out loss {one.before:.5f} -> {one.after:.5f}, on {one.samples:,} new samples."
    return f"Generation {one.number} was not promoted: {one.why}."


def show(line: str, unusable: Sequence[dict[str, str]]) -> None:
    """The artifact `<line>-history`. The run is worth more than its page."""
    key = re.sub("[^a-z0-9]+", "-", line.lower()).strip("-")
    try:
        create_markdown_artifact(key=f"{key}-history", markdown=page(line, unusable), description=f"The recovered models of {line}")
    except Exception as error:
        get_run_logger().warning(printable(f"the history of {line} cannot be shown at the moment ({type(error).__name__}: {error})"))


def page(line: str, unusable: Sequence[dict[str, str]]) -> str:
    """The page in markdown."""
    every = lifecycle.load_all(line)
    lines = [f"- **{alias}** is {_code(aliases.target(line, alias) or 'nothing yet')}" for alias in ALIASES]
    lines += ["", "| generation | begun | new samples | held-out loss before | after | verdict | id |", "|---|---|---|---|---|---|---|"]
    lines += [_row(one) for one in every[: -ROWS - 1 : -1]]
    lines += ["", f"{len(every) - ROWS:,} older ones are not shown."] if len(every) > ROWS else []
    if unusable:
        lines += ["", f"### {len(unusable):,} shards cannot be used", "", "They are left out, and looked at again the next time.", ""]
        lines += [f"- {_plain(one['reason'])}" for one in unusable[:SHARDS]]
    return "\n".join(lines) + "\n"


def _row(one: Generation) -> str:
    losses = [f"{loss:.5f}" if loss is not None else "" for loss in (one.before, one.after)]
    verdict = _plain(f"{one.verdict or 'under way'}{f': {one.why}' if one.why else ''}")
    begun = _plain(one.begun[:16].replace("T", " "))
    return f"| {one.number} | {begun} UTC | {one.samples:,} | {losses[0]} | {losses[1]} | {verdict} | {_code(one.id[:SHORT])} |"


def _code(text: str) -> str:
    """Between backticks, where nothing can be escaped: what would end that, or the cell around it, is taken out."""
    return f"`{re.sub('[`|]', '', printable(text))}`"


def _plain(text: str) -> str:
    """Names and messages come from outside."""
    return markdown(redact(text))
