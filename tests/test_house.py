"""docs/architecture.md, README.md, the folders of tests/ and bench/, and requirements.lock say what is really there."""

import re
import tomllib
from pathlib import Path

import pytest
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
    assert tree(text) == {"data/mini/a.py": "one thing", "data/order.py": "the order", "flows/b.py": ""}


def sources() -> set[str]:
    return {str(f.relative_to(ROOT)) for room in ROOMS for f in (ROOT / room).rglob("*.py") if f.name != "__init__.py"}


def test_the_architecture_names_every_file() -> None:
    named = {path: sentence for path, sentence in tree((ROOT / "docs/architecture.md").read_text()).items() if path.split("/")[0] in ROOMS}
    lacks = sorted(sources() - set(named))
    assert not lacks, f"docs/architecture.md lacks {lacks}: add one line each, the name and what it is for"
    gone = sorted(set(named) - sources())
    assert not gone, f"docs/architecture.md names {gone}, which do not exist: remove their lines"
    mute = sorted(path for path, sentence in named.items() if not sentence)
    assert not mute, f"docs/architecture.md has no sentence for {mute}: say what each is for"


def test_readme_names_every_folder() -> None:
    named = set(re.findall(r"^\| `([\w/]+)/` \| \S", (ROOT / "README.md").read_text(), re.MULTILINE))
    folders = {path.rpartition("/")[0] for path in sources()}
    assert folders <= named, f"README.md has no sentence for {sorted(folders - named)}: add a row to its table of folders"
    gone = sorted(name for name in named if not (ROOT / name).is_dir())
    assert not gone, f"README.md names {gone}, which do not exist: remove their rows"


@pytest.mark.parametrize("mirror", ["tests", "bench"])
def test_tests_and_benches_have_the_same_folders(mirror: str) -> None:
    """A test or bench of a room's file lies in the folder of that name; a bench also has the file's name."""
    files = [f.relative_to(ROOT / mirror) for f in (ROOT / mirror).rglob("*.py")]
    strange = {str(f.parent) for f in files} - {str(Path(path).parent) for path in sources()} - {"."}
    assert not strange, f"{mirror}/ has folders {sorted(strange)} that no room has"
    if mirror == "bench":
        alone = sorted({str(f) for f in files if len(f.parts) > 1} - sources())
        assert not alone, f"bench/ measures {alone}, which do not exist"


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
