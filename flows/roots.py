"""Where pictures, models and stores of a form may be: in the project, and where the environment says so."""

import os
import re
from pathlib import Path

from dev2pro.artifacts.record import ROOT

ROOTS = "DEV2PRO_ROOTS"  # folders and URLs, separated by commas


def within_roots(url: str) -> str:
    """The path or URL, unchanged. Raises ValueError for one outside the configured roots."""
    roots = [root.strip() for root in os.environ.get(ROOTS, "").split(",") if root.strip()]
    if ":" in url.split("/")[0]:  # a URL, or something with a scheme
        permitted = any(url == root or url.startswith(root.rstrip("/") + "/") for root in roots if "://" in root)
    else:
        inside = [(ROOT / part).resolve() for part in (url, re.split(r"[*?\[{]", url)[0])]  # as a name and before a glob, links resolved
        within = [ROOT, *(Path(root).resolve() for root in roots if "://" not in root)]
        permitted = all(any(path.is_relative_to(root) for root in within) for path in inside)
    below = next((url.removeprefix(root) for root in (*roots, str(ROOT)) if url.startswith(root)), url)
    if any(part.startswith(".") and part != "." for part in below.split("/")):
        raise ValueError("hidden files and folders hold settings and secrets, and are not read. Choose another")
    if not permitted:
        raise ValueError(
            f"it is outside of the places that this machine offers ({', '.join([str(ROOT), *roots])}). Choose one inside, or add to {ROOTS}"
        )
    return url
