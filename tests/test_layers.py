"""The house's law, read from the syntax trees of every .py file: who may import whom, how long things may get, what nobody may do."""

import ast
import graphlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("flows", "stages", "data", "dev2pro", "tests", "bench")
GROUND = ("dev2pro",)  # errors, retry, log ...: what every room stands on
ARROWS = {  # room -> rooms below it; a room is a folder, without the folders in it
    "flows.serve": ("flows", "flows.generations", "flows.processes", "flows.ui", "dev2pro.artifacts", *GROUND),
    "flows": ("flows.generations", "flows.processes", "flows.ui", "dev2pro.artifacts", *GROUND),
    "flows.generations": ("flows.processes", "flows.ui", "dev2pro.artifacts", *GROUND),
    "flows.processes": ("flows.ui", "dev2pro.artifacts", *GROUND),
    "flows.ui": ("dev2pro.artifacts", *GROUND),
    "stages": (
        "data",
        "data.loading",
        "data.shards",
        "data.storage",
        "dev2pro.sweeps",
        "dev2pro.judging",
        "dev2pro.planning",
        "dev2pro.training",
        "dev2pro.models",
        "dev2pro.artifacts",
        *GROUND,
    ),
    "dev2pro.sweeps": ("dev2pro.artifacts", *GROUND),
    "dev2pro.planning": ("dev2pro.training", "dev2pro.models", "dev2pro.artifacts", *GROUND),
    "dev2pro.judging": ("dev2pro.models", "dev2pro.artifacts", *GROUND),
    "dev2pro.training": ("dev2pro.models", "dev2pro.artifacts", *GROUND),
    "dev2pro.models": ("dev2pro.artifacts", *GROUND),
    "dev2pro.artifacts": GROUND,
    "dev2pro": (),
    "data": ("data.folders", "data.loading", "data.shards", "data.storage", *GROUND),
    "data.folders": ("data.shards", "data.storage", *GROUND),
    "data.loading": ("data.shards", "data.storage", *GROUND),
    "data.shards": ("data.storage", *GROUND),
    "data.storage": GROUND,
}
STORIES = ("stages",)  # each file is a story of its own: of its neighbours it may import only the frame
BRING_TORCH = ("torch", "accelerate", "diffusers", "peft", "torchao", "transformers")
PICKLES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve")
FILE_LINES, FUNCTION_LINES = 300, 70


@dataclass(frozen=True)
class Source:
    """One parsed file; `path` is relative to the root."""

    path: str
    text: str

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        return self.path.rpartition("/")[0].replace("/", ".")

    @property
    def house(self) -> str:
        return self.module.partition(".")[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)


class House:
    """All sources under a root, and what each imports, imports inside functions included."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self.root = root
        self.sources = {s.module: s for s in (Source(f, (root / f).read_text()) for f in files)}
        self.imports = {name: list(self._imports(s)) for name, s in self.sources.items()}

    def _imports(self, source: Source) -> Iterator[tuple[int, str]]:
        """(line, module); a module of ours where there is one, so that `from dev2pro.models import lora` is dev2pro.models.lora."""
        for node in ast.walk(source.tree):
            match node:
                case ast.Import(names=names):
                    yield from ((node.lineno, alias.name) for alias in names)
                case ast.ImportFrom(module=named, names=names, level=level):
                    above = source.module.split(".") if source.path.endswith("/__init__.py") else source.module.split(".")[:-1]
                    parts = (above[: len(above) - level + 1] if level else []) + ([named] if named else [])
                    for full in (".".join([*parts, alias.name]) for alias in names):
                        yield node.lineno, full if full in self.sources else ".".join(parts)
                case ast.Call(args=[ast.Constant(value=str(name)), *_]) if _called(node).endswith(("import_module", "__import__")):
                    yield node.lineno, name

    def reached(self, house: str) -> dict[str, str]:
        """Our modules that loading a house loads -> a module of it that does so."""
        found: dict[str, str] = {}
        todo = [(name, name) for name, source in self.sources.items() if source.house == house]
        while todo:
            name, start = todo.pop()
            todo += [(above, start)] if (above := name.rpartition(".")[0]) else []  # a package is loaded before what is in it
            if name in self.sources and name not in found:
                found[name] = start
                todo += [(target, start) for _, target in self.imports[name]]
        return found


def _called(call: ast.Call) -> str:
    """What is called, as written: `torch.load`."""
    return ast.unparse(call.func)


def _as_a_command(source: Source) -> set[int]:
    """The lines under `if __name__ == "__main__":`."""
    found = [node for node in source.tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"]
    return {line for node in found for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)


# ---- the rules: a house -> one message for each breach -----------------------------------------------------------------


def arrows(house: House) -> Iterator[str]:
    """Imports point down, from room to room."""
    for name, source in house.sources.items():
        if source.house in ("tests", "bench"):
            continue
        below = ARROWS.get(source.room)
        if below is None:
            yield f"{source.path}:1: a room without arrows; say in {Path(__file__).name} which rooms are below {source.room}"
            continue
        for line, target in house.imports[name]:
            if not _within(target, OURS):
                continue
            room = house.sources[target].room if target in house.sources else target.rpartition(".")[0]
            neighbour = room == source.room and (room not in STORIES or target.endswith(".frame"))
            if not neighbour and room not in below:
                yield f"{source.path}:{line}: imports {target}; of ours, {source.room.replace('.', '/')}/ may import only {', '.join(below)}"


def rooms_without_circles(house: House) -> Iterator[str]:
    """The arrows that ARROWS allows go round in no circle."""
    try:
        graphlib.TopologicalSorter(ARROWS).prepare()
    except graphlib.CycleError as error:
        yield f"ARROWS: {' <- '.join(error.args[1])}"


def flows_without_torch(house: House) -> Iterator[str]:
    """Loading a flow loads no torch, not even through what it imports."""
    for name, start in house.reached("flows").items():
        for line, target in house.imports[name]:
            if _within(target, BRING_TORCH):
                yield f"{house.sources[name].path}:{line}: imports {target}, and {start} loads this file; flows never load torch"


def no_cycles(house: House) -> Iterator[str]:
    """Outside the tests, imports go round in no circle. What a file does only as a command is not part of the module that others import."""
    graph = {
        name: {target for line, target in house.imports[name] if target in house.sources and line not in _as_a_command(source)}
        for name, source in house.sources.items()
        if source.house != "tests"
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        imported, importer = error.args[1][:2]
        line = next(line for line, target in house.imports[importer] if target == imported)
        yield f"{house.sources[importer].path}:{line}: import cycle {' <- '.join(error.args[1])}; move what both need below them"


def sizes(house: House) -> Iterator[str]:
    """A file is read in one sitting, a function on one screen."""
    for source in house.sources.values():
        lines = source.text.count("\n")
        if lines > FILE_LINES:
            yield f"{source.path}:{lines}: {lines} lines; a file has up to {FILE_LINES}"
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (length := node.end_lineno - node.lineno + 1) > FUNCTION_LINES:
                yield f"{source.path}:{node.lineno}: {node.name} has {length} lines; a function has up to {FUNCTION_LINES}"


def no_code_in_files(house: House) -> Iterator[str]:
    """Weights and data never carry code: no pickle, in none of its disguises."""
    for name, source in house.sources.items():
        for line, target in house.imports[name]:
            if _within(target, PICKLES):
                yield f"{source.path}:{line}: imports {target}; no pickle, a file must not be able to carry code"
        for node in (n for n in ast.walk(source.tree) if isinstance(n, ast.Call)):
            flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if _called(node) == "torch.load" and flags.get("weights_only") != "True":
                yield f"{source.path}:{node.lineno}: torch.load without weights_only=True; no pickle, a file must not be able to carry code"
            if flags.get("allow_pickle", "False") != "False":
                yield f"{source.path}:{node.lineno}: allow_pickle; no pickle, a file must not be able to carry code"
        for node in (n for n in ast.walk(source.tree) if isinstance(n, ast.ImportFrom)):
            if node.module == "torch" and "load" in [alias.name for alias in node.names]:
                yield f"{source.path}:{node.lineno}: from torch import load; write torch.load(..., weights_only=True), where this test sees it"


def no_targets(house: House) -> Iterator[str]:
    """A value in conf/ must not be able to name code."""
    for file in sorted(f for f in house.root.glob("conf/**/*") if f.suffix in (".yaml", ".yml")):
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if "_target_" in line:
                yield f"{file.relative_to(house.root)}:{number}: _target_; yaml holds values and never names code"


RULES = (arrows, rooms_without_circles, flows_without_torch, no_cycles, sizes, no_code_in_files, no_targets)

# ---- this house ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house() -> House:
    """Tracked files, and new ones that git does not ignore."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    return House(ROOT, sorted({f for f in listed.stdout.splitlines() if (ROOT / f).is_file()}))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Callable[[House], Iterator[str]], house: House) -> None:
    assert {s.room for s in house.sources.values() if s.house not in ("tests", "bench")} == set(ARROWS)
    breaches = list(rule(house))
    assert not breaches, "\n" + "\n".join(breaches)


# ---- houses that break one rule each, to prove that the rules see it -------------------------------------------------------

PARTS = {"dev2pro/artifacts/record.py": "", "dev2pro/errors.py": "", "dev2pro/models/flux1.py": ""}
BREACHES = [
    (arrows, {"stages/a.py": "from stages import b\n", "stages/b.py": ""}, "stages/a.py:1: imports stages.b"),
    (arrows, {"stages/a.py": "from stages import frame\n", "stages/frame.py": ""}, None),
    (arrows, {"stages/a.py": "def f():\n    import flows.processes.launch\n"}, "stages/a.py:2: imports flows.processes.launch"),
    (arrows, {"dev2pro/a.py": "from data.shards.pictures import read\n"}, "dev2pro/a.py:1: imports data.shards"),
    (arrows, {"dev2pro/a.py": "import importlib\nimportlib.import_module('stages.lora')\n"}, "dev2pro/a.py:2: imports stages.lora"),
    (arrows, {"dev2pro/a.py": "from dev2pro.models import flux1\n", **PARTS}, "dev2pro/a.py:1: imports dev2pro.models.flux1"),
    (
        arrows,
        {"dev2pro/models/a.py": "from dev2pro.training import b\n", "dev2pro/training/b.py": ""},
        "dev2pro/models/a.py:1: imports dev2pro.training.b",
    ),
    (arrows, {"data/storage/a.py": "from data.shards import b\n", "data/shards/b.py": ""}, "data/storage/a.py:1: imports data.shards.b"),
    (
        arrows,
        {"data/a.py": "from dev2pro import draws\nfrom dev2pro.models import flux1\n", "dev2pro/draws.py": "", **PARTS},
        "data/a.py:2: imports dev2pro.models",
    ),
    (
        arrows,
        {"flows/a.py": "from dev2pro.artifacts import record\nfrom dev2pro.models import flux1\n", **PARTS},
        "flows/a.py:2: imports dev2pro.models",
    ),
    (arrows, {"flows/ui/a.py": "from flows.processes import b\n", "flows/processes/b.py": ""}, "flows/ui/a.py:1: imports flows.processes.b"),
    (arrows, {"flows/a.py": "from ..stages import lora\n", "stages/lora.py": ""}, "flows/a.py:1: imports stages.lora"),
    (arrows, {"flows/attic/a.py": "import os\n"}, "flows/attic/a.py:1: a room without arrows"),
    (
        arrows,
        {"stages/a.py": "import torch\nfrom data.loading import order\nfrom dev2pro.models import flux1\n", "data/loading/order.py": "", **PARTS},
        None,
    ),
    (flows_without_torch, {"flows/a.py": "def f():\n    import torch.nn\n"}, "flows/a.py:2: imports torch.nn"),
    (
        flows_without_torch,
        {"flows/a.py": "import dev2pro.artifacts.record\n", "dev2pro/artifacts/record.py": "", "dev2pro/__init__.py": "import peft\n"},
        "dev2pro/__init__.py:1: imports peft, and flows.a loads",
    ),
    (no_cycles, {"data/a.py": "\nimport data.b\n", "data/b.py": "def f():\n    from . import a\n"}, "import cycle data."),
    (no_cycles, {"data/a.py": 'if __name__ == "__main__":\n    from data import b\n', "data/b.py": "import data.a\n"}, None),
    (no_cycles, {"data/a.py": "if __name__:\n    from data import b\n", "data/b.py": "import data.a\n"}, "import cycle data."),
    (sizes, {"data/a.py": "x = 1\n" * 301}, "data/a.py:301: 301 lines"),
    (sizes, {"data/a.py": "class A:\n    async def f():\n" + "        x = 1\n" * 70}, "data/a.py:2: f has 71 lines"),
    (sizes, {"data/a.py": "def f():\n" + "    x = 1\n" * 69 + "x = 1\n" * 230}, None),
    (no_code_in_files, {"tests/a.py": "from pickle import loads\n"}, "tests/a.py:1: imports pickle"),
    (no_code_in_files, {"bench/a.py": "import torch\ntorch.load('x', weights_only=False)\n"}, "bench/a.py:2: torch.load"),
    (no_code_in_files, {"bench/a.py": "import torch\ntorch.load('x', weights_only=True)\n"}, None),
    (no_code_in_files, {"bench/a.py": "from torch import load\n"}, "bench/a.py:1: from torch import load"),
    (no_code_in_files, {"data/a.py": "import numpy\nnumpy.load('x', allow_pickle=True)\n"}, "data/a.py:2: allow_pickle"),
    (no_targets, {"conf/model/a.yaml": "path: x\n_target_: os.system\n"}, "conf/model/a.yaml:2: _target_"),
]


@pytest.mark.parametrize(("rule", "files", "message"), BREACHES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_breach_is_seen(rule: Callable[[House], Iterator[str]], files: dict[str, str], message: str | None, tmp_path: Path) -> None:
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    breaches = list(rule(House(tmp_path, [path for path in files if path.endswith(".py")])))
    assert len(breaches) == (message is not None), breaches
    assert message is None or message in breaches[0]
