"""When a stage is killed, and how: random moments, and traps at its file operations."""

import json
import os
import random
import re
import signal
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

NUMBER = r"checkpoint-[0-9]+"
WINDOWS = {  # what a stage is about to do when it is struck: an event of Python's audit and the path under its folder
    "claims its folder": ("os.rename", r"config\.partial"),
    "pins its data": ("os.rename", r"train\.snapshot\..*\.partial"),
    "opens its log": ("open", r"metrics\.(jsonl|partial)"),
    "begins a checkpoint": ("os.mkdir", rf"{NUMBER}\.partial"),
    "writes a checkpoint": ("open", rf"{NUMBER}\.partial/.+"),
    "publishes a checkpoint": ("os.rename", rf"{NUMBER}\.partial"),
    "has a new checkpoint": ("open", r"\."),
    "takes an old checkpoint away": ("os.rename", rf"{NUMBER}"),
    "removes an old checkpoint": ("os.remove|os.rmdir", rf"{NUMBER}-old\.partial(/.+)?"),
    "publishes a preview": ("os.rename", r"preview\.partial"),
    "writes the model": ("os.remove", r"artifact\.json"),  # and then on, in small steps, until there is something of it
    "hashes the files": ("open", r"(transformer/diffusion_pytorch_model|pytorch_lora_weights)\.safetensors"),
    "writes the record": ("open", r"artifact\.partial"),
    "publishes the record": ("os.rename", r"artifact\.partial"),
    "sweeps": ("os.rename|shutil.rmtree", NUMBER),  # when the model is there
}  # fmt: skip
FRESH = ("claims its folder", "pins its data")  # only a new folder meets these
OFTEN = {"begins a checkpoint": 1, "writes a checkpoint": 3, "publishes a checkpoint": 1, "has a new checkpoint": 1}  # times for every checkpoint
OLD = ("takes an old checkpoint away", "removes an old checkpoint")
KEEP = 3  # checkpoints that are there before one goes: the newest two and the best


@dataclass(frozen=True)
class Aim:
    """`window` of WINDOWS at its `nth` time and `delay` seconds later; or "at a time" and "at a step", of which `part` says how far into the run."""

    window: str
    nth: int = 1
    delay: float = 0.0
    rank: int = 0
    part: float = 0.0
    real: bool = False  # strikes a process that was started as people start it


@dataclass(frozen=True)
class Blow:
    """A signal, and who gets it: everybody, the main process alone (torchrun's where there are ranks), or one rank alone."""

    number: signal.Signals
    whom: str = "main"
    twice: bool = False

    def __str__(self) -> str:
        return f"{self.number.name[3:]} {'twice' if self.twice else self.whom}"


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
BLOWS = {
    1: [Blow(KILL, "all"), Blow(TERM), Blow(INT), Blow(KILL), Blow(TERM, twice=True)],
    2: [Blow(KILL, "all"), Blow(TERM), Blow(KILL, "a rank"), Blow(INT), Blow(KILL), Blow(TERM, "a rank"), Blow(TERM, "all"), Blow(TERM, twice=True)],
}
FIRST = [  # what a few kills hit
    Aim("writes a checkpoint"), Aim("writes the model"), Aim("at a step"), Aim("publishes a checkpoint"), Aim("publishes the record"),
    Aim("at a time", real=True), Aim("opens its log"), Aim("at a time"), Aim("removes an old checkpoint"), Aim("at a step"),
]  # fmt: skip


def drawn(dice: random.Random, ranks: int, kills: int) -> list[tuple[Aim, Blow]]:
    """So many strikes: every window before any comes again, and every blow."""
    rest = [Aim(window) for window in WINDOWS if window not in {aim.window for aim in FIRST}]
    more = [Aim("at a time", real=True), Aim("at a time"), Aim("at a step"), Aim("writes a checkpoint"), Aim("writes the model")]
    pool = FIRST + rest
    while len(pool) < kills:
        pool = pool + more
    aims = [_within(aim, dice, ranks) for aim in pool[:kills]]
    dice.shuffle(aims)
    planned = list(zip(aims, (BLOWS[ranks] * kills)[:kills], strict=True))
    if ranks > 1 and kills > len(FIRST) + len(rest):
        at = next(at for at, (aim, _) in enumerate(planned) if aim.window not in WINDOWS)
        planned[at] = _within(Aim("as its ranks start", real=True), dice, ranks), Blow(KILL)  # who then have nobody to start with
    return planned


def _within(aim: Aim, dice: random.Random, ranks: int) -> Aim:
    delay = dice.uniform(0, 0.03) if aim.window == "opens its log" else dice.choice([0.0, 0.0, dice.uniform(0, 0.005), dice.uniform(0, 0.03)])
    rank = dice.randrange(ranks) if aim.window == "writes a checkpoint" else 0  # what else there is to do the first one does
    return replace(aim, delay=delay, part=dice.uniform(0.02, 0.98), rank=rank)


def fitted(aim: Aim, out: Path, steps: int, every: int, dice: random.Random) -> Aim | None:
    """The aim with the time at which it will strike in a run that has got as far as the folder says; None where it would strike nothing."""
    steps_saved = [int(folder.name.partition("-")[2]) for folder in out.glob("checkpoint-*") if folder.name.partition("-")[2].isdigit()]
    last = max(steps_saved, default=0)
    to_come = -(-steps // every) - last // every if last < steps else 0
    if (out / "artifact.json").exists() or (aim.window in FRESH and out.exists()):
        return None
    if aim.window == "at a step":
        return replace(aim, nth=dice.randint(last + 1, steps - 1)) if last < steps - 1 else None
    if aim.window in OFTEN:
        return replace(aim, nth=dice.randint(1, max(1, to_come // 2) * OFTEN[aim.window])) if to_come else None
    if aim.window == "publishes a preview" and last == steps:
        return None
    if aim.window in OLD and len(steps_saved) + to_come <= KEEP:
        return None
    return aim


def steps_done(out: Path, since: float = 0.0) -> int:
    """The last logged step; 0 if nothing was logged since a time."""
    path = out / "metrics.jsonl"
    is_fresh = path.exists() and path.stat().st_mtime >= since
    rows = [row for row in path.read_text().splitlines(keepends=True) if row.endswith("\n")] if is_fresh else []
    return json.loads(rows[-1])["step"] if rows else 0


def left(out: Path, steps: int) -> float:
    """About what share of an undisturbed run is still to come; half of it is what comes before the first step."""
    return 0.5 + 0.5 * (1 - steps_done(out) / steps)


def lie_in_wait(aim: Aim, out: Path, pipe: int) -> None:
    """Makes this process stop itself when it comes to the window, and write its pid into `pipe`."""
    event, path = WINDOWS[aim.window]
    events, me, countdown, root, removing = event.split("|"), os.getpid(), [aim.nth], os.path.realpath(out), [""]

    def stop() -> None:
        os.write(pipe, me.to_bytes(4, "little"))
        os.kill(me, signal.SIGSTOP)

    def seen(what: str, args: tuple[Any, ...]) -> None:
        if what == "shutil.rmtree":
            removing[0] = os.path.basename(str(args[0]))
        if what not in events or os.getpid() != me or not countdown[0] or not isinstance(args[0], str | os.PathLike):
            return
        name = _under(root, str(args[0]), removing[0] if what == "os.remove" else "")
        if name is None or not re.fullmatch(path, name) or (aim.window == "sweeps" and not _has_model(root)):
            return
        countdown[0] -= 1
        if not countdown[0]:
            threading.Timer(aim.delay, stop).start() if aim.delay else stop()

    sys.addaudithook(seen)


def _has_model(out: str) -> bool:
    return any(os.path.exists(f"{out}/{name}") for name in ("transformer", "pytorch_lora_weights.safetensors"))


def _under(root: str, path: str, above: str) -> str | None:
    """A path as it is called under the folder; one without a folder is in the folder that is being removed."""
    full = os.path.join(root, above, path) if os.path.basename(path) == path else os.path.abspath(path)
    return os.path.relpath(full, root) if full == root or full.startswith(root + os.sep) else None


def at_work(out: Path, since: float) -> bool:
    """Whether weights were written since a time: under their final or a temporary name."""
    files = (path for path in (*out.glob("*"), *out.glob("transformer*/*")) if ".safetensors" in path.name or ".tmp" in path.name)
    return any(file.is_file() and file.stat().st_mtime >= since for file in files)
