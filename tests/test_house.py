"""README.md's tree and requirements.lock say what is really there."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("dev2pro", "stages", "data", "flows")


def tree(text: str) -> dict[str, str]:
    """Path -> sentence, from the code blocks of a text: a folder's line ends its name with `/`, what it holds is indented below it."""
    found: dict[str, str] = {}
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        above: list[tuple[int, str]] = []
        for indent, name, sentence in re.findall(r"^([ \t│├└─]*)([\w.-][\w./-]*)[ \t]*(.*)$", block, re.MULTILINE):
            while above and above[-1][0] >= len(indent):
                above.pop()
            path = (above[-1][1] if above else "") + name
            if name.endswith("/"):
                above.append((len(indent), path))
            elif name.endswith(".py"):
                found[path] = sentence.lstrip("# ")
    return found


def test_a_tree_is_read() -> None:
    text = "words\n```text\n├── data/       pictures\n│   ├── mini/\n│   │   └── a.py  # one thing\n│   └── order.py  the order\n\nflows/b.py\n```\n"
    assert tree(text) == {"data/mini/a.py": "one thing", "data/loading/order.py": "the order", "flows/b.py": ""}


def test_readme_names_every_file() -> None:
    assert (ROOT / "README.md").is_file(), "README.md is missing; its tree names every file of the project"
    named = {path: sentence for path, sentence in tree((ROOT / "README.md").read_text()).items() if path.split("/")[0] in ROOMS}
    there = {str(f.relative_to(ROOT)) for room in ROOMS for f in (ROOT / room).rglob("*.py") if f.name != "__init__.py"}
    assert not there - set(named), f"README.md's tree lacks {sorted(there - set(named))}: add one line each, the name and what it is for"
    assert not set(named) - there, f"README.md's tree names {sorted(set(named) - there)}, which do not exist: remove their lines"
    mute = sorted(path for path, sentence in named.items() if not sentence)
    assert not mute, f"README.md's tree has no sentence for {mute}: say what each is for"


def test_lock_pins_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(r) for r in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and not line.startswith("#")]
    loose = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]
    assert not loose, f"requirements.lock has lines that are no exact pin: {loose}"
    pinned = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    for need in wanted:
        version = pinned.get(canonicalize_name(need.name))
        assert version, f"requirements.lock does not pin {need.name}, which pyproject.toml asks for"
        assert version in need.specifier, f"requirements.lock pins {need.name}=={version}, but pyproject.toml asks for {need}"
