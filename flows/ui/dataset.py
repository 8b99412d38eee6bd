"""What a stage is trained on, as a page of the UI: counts, what stands out, what was left out, a contact sheet, the path of the report."""

import json
import re
from pathlib import Path
from typing import Any

from dev2pro.artifacts import record
from dev2pro.escape import markdown

MOST = 1 << 20  # bytes of the facts that go into the server's database
BASE64 = re.compile(r"[A-Za-z0-9+/]+=*")


def page(out: Path) -> str:
    """The page in markdown; "" where the stage has written no facts that can be shown."""
    file = out / record.FACTS
    try:
        if file.stat().st_size > MOST:
            return ""
        return _page(json.loads(file.read_bytes()), out)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the facts are not there yet, or another version's
        return ""


def _page(facts: dict[str, Any], out: Path) -> str:
    rows = [("used", facts["pictures"]), ("held out", facts["heldout"]), ("different captions", facts["captions"]["different"])]
    rows += [
        (f"{title}, {markdown(note['what'])}", note["count"])
        for title, key in (("left out", "left_out"), ("altered", "altered"))
        for note in facts[key]
    ]
    table = "\n".join(["| pictures | |", "|---|---|", *(f"| {what} | {count:,} |" for what, count in rows)])
    findings = "\n".join(f"- {markdown(finding)}" for finding in facts["findings"]) or "Nothing stands out."
    sheet = f"\n\n![](data:image/jpeg;base64,{facts['sheet']})" if BASE64.fullmatch(facts["sheet"]) else ""
    return f"{table}\n\n{findings}\n\nThe whole report: {markdown(str(out / record.REPORT))}{sheet}\n"
