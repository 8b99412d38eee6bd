"""Which machine measured, and the part of docs/performance.md that `make gpu` writes."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "torchao", "diffusers", "accelerate", "peft", "transformers")
BEGIN, END = "<!-- make gpu writes from here -->", "<!-- to here -->"
HEAD = (
    "| stage | px | hardware= | GPUs | micro-batch | s a step | samples/s | TFLOP a sample | utilisation | peak GB "
    "| forward / backward / optimizer / rest |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def environment(device: torch.device) -> dict[str, Any]:
    """Device, its memory, versions and date."""
    cuda = device.type == "cuda"
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}
    if cuda:
        versions["cuda"] = str(torch.version.cuda)
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()}, {cores} cores)",
        "memory_gb": round((torch.cuda.get_device_properties(device).total_memory if cuda else psutil.virtual_memory().total) / 1e9, 1),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write(out: Path, source: Path, folder: Path) -> None:
    """Writes `out`, or `source` to it the first time, with the results in `folder` between the marks; all else stays as it is."""
    text = (out if out.is_file() else source).read_text()
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise SystemExit(f"{out} lacks the line {BEGIN} or, after it, {END}. Put both back; the results go between them.")
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"{before}{BEGIN}\n\n{section(results)}\n\n{END}{after}")


def section(results: list[dict[str, Any]]) -> str:
    """The results of any of the pieces as markdown."""
    ran = [result for result in results if result["outcome"] == "ran" and result["piece"]["stage"]]
    parts = [_machines(results), *(_tests(result) for result in results if not result["piece"]["stage"])]
    if ran:
        parts.append("\n".join([HEAD, *map(_row, ran)]))
    if others := [result for result in results if result["outcome"] != "ran"]:
        parts.append("\n".join(f"- {result['piece']['name']}: {result['outcome']}. {result.get('why', '')}".rstrip() for result in others))
    for stage in ("recover", "lora"):
        if mine := [result for result in ran if result["piece"]["stage"] == stage]:
            parts.append(_profile(max(mine, key=lambda result: (result["pixels"], result["utilisation"]))))
    return "\n\n".join(parts)


def _machines(results: list[dict[str, Any]]) -> str:
    newest = max(results, key=lambda result: result["date"])
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    return f"{newest['device']}, {newest['memory_gb']:.0f} GB; {versions}; {min(result['date'] for result in results)} to {newest['date']}."


def _tests(result: dict[str, Any]) -> str:
    tests = result.get("tests", {})
    counts = ", ".join(f"{list(tests.values()).count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
    failed = [name for name, outcome in tests.items() if outcome == "failed"]
    return f"Tests marked gpu: {counts}{': ' + ', '.join(failed) if failed else ''}."


def _row(result: dict[str, Any]) -> str:
    shares = result["shares"]
    rest = 1 - shares["forward"] - shares["backward"] - shares["optimizer"]
    cells = [
        result["stage"], result["pixels"], result["piece"]["rung"], result["ranks"], result["hardware"]["micro_batch"], f"{result['seconds']:.3f}",
        f"{result['samples_per_second']:.2f}", f"{result['flops']['step'] / 1e12:,.4g}", f"{result['utilisation']:.1%}",
        f"{result['peak_mb'] * 2**20 / 1e9:.1f}",
        " / ".join(f"{share:.0%}" for share in (shares["forward"], shares["backward"], shares["optimizer"], rest)),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _profile(result: dict[str, Any]) -> str:
    rate = f"{result['rate'] / 1e12:,.4g} TFLOP/s{', measured on a matrix product' if result['rate_measured'] else ''}"
    lines = [f"What costs most in {result['piece']['name']} (utilisation is against {rate}):", "", "| operator | calls a step | ms a step | share |"]
    lines += [
        "|---|---|---|---|",
        *(f"| `{row['operator'][:70]}` | {row['calls']} | {row['ms']} | {row['share']:.1%} |" for row in result["operators"]),
    ]
    return "\n".join(lines)
