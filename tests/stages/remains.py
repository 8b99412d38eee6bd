"""The files of a stage: whole after every kill, and in the end identical to those of the undisturbed run."""

import hashlib
import json
import re
from pathlib import Path


def sizes(out: Path) -> dict[str, int]:
    """Every file of a folder, however deep, and its bytes."""
    return {str(file.relative_to(out)): file.stat().st_size for file in out.rglob("*") if file.is_file()}


def seal(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def damage(out: Path) -> list[str]:
    """What is not whole of what calls itself finished: checkpoints without `.partial`, an artifact with its record."""
    wrong = list[str]()
    for folder in out.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-[0-9]+", folder.name):
            try:
                files = json.loads((folder / "checkpoint.json").read_text())["files"]
                wrong += [f"{folder.name}/{name}" for name, (_, sha) in files.items() if seal(folder / name) != sha]
            except (OSError, ValueError, KeyError) as error:
                wrong.append(f"{folder.name}: {error!r}")
    if (out / "artifact.json").exists():
        record = json.loads((out / "artifact.json").read_text())
        wrong += [f["path"] for f in record["files"] if not (out / f["path"]).is_file() or seal(out / f["path"]) != f["sha256"]]
    return wrong


def differences(out: Path, wanted: Path) -> list[str]:
    """Differences of a finished folder from the undisturbed run. Only the record holds times; other files are compared byte for byte."""
    record, undisturbed = (json.loads((folder / "artifact.json").read_text()) for folder in (out, wanted))
    wrong = [f"{key}: {record[key]} and undisturbed {undisturbed[key]}" for key in ("id", "config_digest", "step") if record[key] != undisturbed[key]]
    if record["metrics"]["curve"] != undisturbed["metrics"]["curve"]:
        wrong.append(f"the curve: {record['metrics']['curve']} and undisturbed {undisturbed['metrics']['curve']}")
    sizes_left, sizes_wanted = sizes(out), sizes(wanted)
    wrong += [f"{name} is left over" for name in sizes_left.keys() - sizes_wanted.keys()] + [
        f"{name} is missing" for name in sizes_wanted.keys() - sizes_left.keys()
    ]
    for entry in undisturbed["files"]:
        name = entry["path"]
        if name in sizes_left and (out / name).read_bytes() != (wanted / name).read_bytes():
            wrong.append(f"{name} is not the same{_rows(out / name, wanted / name) if name.endswith('.jsonl') else ''}")
    return wrong + [f"{name} is damaged" for name in damage(out)]


def _rows(one: Path, other: Path) -> str:
    """The steps of two logs, and which rows differ."""
    left, right = ({row["step"]: row for row in map(json.loads, file.read_text().splitlines())} for file in (one, other))
    return f": steps {list(left)}, undisturbed {list(right)}, told differently {[step for step in left if left[step] != right.get(step)]}"
