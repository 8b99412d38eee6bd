"""Kills a stage at random moments, with random signals, repeatedly, and checks that the result is that of an undisturbed run.

`survives` is for tests. The work is done in a process of its own, which adopts every orphan that a stage leaves behind, so that none is missed.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.stages import aims, kin, remains, warm
from tests.stages.aims import KILL, Aim, Blow
from tests.stages.kin import catches, family, reap, send, until

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0  # seconds for a stage to end once it was struck
LINGER = 40.0  # and for what it started to be gone after it: a rank has 30 to finish its step and save
SLICE = 0.0003  # seconds a process is let run when it is followed into a window
TWICE = 2.1  # seconds from a signal to one that counts as the second (signals.SAME_SIGNAL)


@dataclass
class Struck:
    """One kill: what was aimed at, the blow, what it hit, how it ended, and after how many seconds all was gone."""

    aim: str
    blow: str
    state: str
    code: int
    seconds: float


def survives(stage: str, args: list[str], ranks: int, kills: int, seed: int, tmp: Path) -> dict[str, Any]:
    """Whether the stage's artifact is the undisturbed one's after so many kills; a table of them. Raises AssertionError with what was found."""
    arguments = json.dumps({"stage": stage, "args": args, "ranks": ranks, "kills": kills, "seed": seed, "tmp": str(tmp)})
    done = subprocess.run([sys.executable, "-m", "tests.stages.chaos", arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{stage} on {ranks} ranks, seed {seed}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


class Case:
    """One stage on so many ranks: the undisturbed run, and lives of a disturbed one, each of which ends whole."""

    def __init__(self, stage: str, args: list[str], ranks: int, kills: int, seed: int, tmp: str) -> None:
        self.stage, self.ranks, self.tmp = stage, ranks, Path(tmp)
        self.steps, self.every = (int([w for w in args if w.startswith(key)][-1].removeprefix(key)) for key in ("steps=", "checkpoint.every="))
        self.args, self.dice = args, random.Random(f"{seed} {stage} {ranks}")
        self.plan = aims.drawn(self.dice, ranks, kills)
        self.struck, self.lives, self.starts, self.missed = list[Struck](), 0, 0, list[str]()
        self.out, self.undisturbed, self.seconds, self.waking = self.tmp / "disturbed", self.tmp / "undisturbed", 0.0, 0.0
        (self.tmp / "temporary").mkdir(parents=True)
        self.trap_pipe, self._trap_write = os.pipe()
        os.set_blocking(self.trap_pipe, False)

    def run(self) -> None:
        """All of it."""
        began = time.monotonic()
        pid = self.start(self.undisturbed)
        until(lambda: catches(self.listener(pid), signal.SIGTERM) or self.ended(pid, wait=False) is not None, PATIENCE)
        self.waking = time.monotonic() - began
        warm.imported()
        assert self.ended(pid) == 0, self.context()
        self.seconds = time.monotonic() - began  # an upper limit where the imports here took longer
        while self.plan:
            if (chosen := self.next_strike()) is None:
                self.live()
            elif not self.strike(*chosen):
                self.plan.append((replace(chosen[0], part=0.6 * chosen[0].part, rank=0), chosen[1]))  # it came too late
                self.missed.append(chosen[0].window)
                assert len(self.missed) <= len(self.struck) + 10, f"strikes that met nothing: {self.missed}"
        self.live()

    def next_strike(self) -> tuple[Aim, Blow] | None:
        """The first that can meet something in the life as it is; None where this one must end first."""
        for at, (aim, blow) in enumerate(self.plan):
            if fitted := aims.fitted(aim, self.out, self.steps, self.every, self.dice):
                del self.plan[at]
                return fitted, blow
        return None

    def live(self) -> None:
        """Lets the disturbed run come to its end, and compares."""
        pid = self.start(self.out, real=False)
        assert self.ended(pid) == 0, self.context()
        self.compare()

    def compare(self) -> None:
        """A life has ended well; the next one begins from nothing."""
        assert not (wrong := remains.differences(self.out, self.undisturbed)), f"{chr(10).join(wrong)}\n{self.context()}"
        assert not family(), f"left behind: {family()}"
        shutil.rmtree(self.out)
        self.lives += 1

    def table(self) -> dict[str, Any]:
        """What `survives` returns."""
        return {
            "stage": self.stage, "ranks": self.ranks, "kills": len(self.struck), "lives": self.lives, "starts": self.starts, "missed": self.missed,
            "slowest_end": max(one.seconds for one in self.struck), "blows": Counter(one.blow for one in self.struck),
            "aims": Counter(one.aim for one in self.struck), "states": Counter(re.sub("[0-9]+", "N", one.state) for one in self.struck),
            "codes": Counter(str(one.code) for one in self.struck), "struck": [asdict(one) for one in self.struck],
            "temporary": sorted(os.listdir(self.tmp / "temporary")),
        }  # fmt: skip

    def start(self, out: Path, aim: Aim | None = None, real: bool = True) -> int:
        self.starts += 1
        starter = ["-m", "dev2pro.ranks", "--standalone", f"--nproc-per-node={self.ranks}"] if self.ranks > 1 else []
        args, environment = [*starter, "-m", f"stages.{self.stage}", *self.args, f"out={out}"], {"TMPDIR": str(self.tmp / "temporary")}
        if real:
            return warm.spawned(args, environment, self.log())
        return warm.forked(args, environment, self.log(), partial(self.prepare, aim))

    def prepare(self, aim: Aim | None, rank: int) -> None:
        if aim and aim.window in aims.WINDOWS and rank == aim.rank:
            aims.lie_in_wait(aim, self.out, self._trap_write)

    def log(self) -> Path:
        return self.tmp / f"start-{self.starts}.log"

    def context(self) -> str:
        """The kills so far, the log of the last start, and the files of the run: for error messages."""
        before = "\n".join(f"  {one}" for one in self.struck)
        files = sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*"))
        return f"struck before:\n{before}\nthis one ({self.log()}):\n{self.log().read_text()[-6000:]}\nin {self.out}: {files}"

    def ended(self, pid: int, wait: bool = True) -> int | None:
        """The exit code, below zero for a signal; None while it runs."""
        if pid in self._codes:
            return self._codes[pid]
        ended, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
        if ended:
            self._codes[pid] = os.waitstatus_to_exitcode(status)
        return self._codes.get(pid)

    _codes: dict[int, int] = {}  # noqa: RUF012

    def listener(self, pid: int) -> int:
        """The process whose handlers say that the stage runs: it, or its first rank."""
        return next(iter(self.rank_pids(pid)), pid)

    def rank_pids(self, pid: int) -> list[int]:
        return sorted(one.pid for one in family() if one.parent == pid and one.session == one.pid) if self.ranks > 1 else []

    # ---- strikes ----

    def strike(self, aim: Aim, blow: Blow) -> bool:
        """Starts it, waits for the moment, strikes, and sees to it that all ends as it should. False where it ended before."""
        pid, began, self.caught = self.start(self.out, aim, real=aim.real), time.time(), 0
        if not self.moment(pid, aim, began):
            assert self.ended(pid) == 0, self.context()
            self.compare()
            return False
        main, ranks, everybody = pid, self.rank_pids(pid), [one.pid for one in family()]
        targets = {"main": [main], "all": everybody, "a rank": [self.dice.choice(ranks)] if ranks else [main]}[blow.whom]
        ready, state = catches(targets[0] if targets != everybody else main, signal.SIGTERM), self.state(pid)
        struck = time.monotonic()
        send(targets, blow.number)
        send(everybody, signal.SIGCONT)
        if blow.twice:
            self.again(targets, blow.number)
        assert until(lambda: self.ended(pid, wait=False) is not None, PATIENCE), f"{aim} {blow} in {state}: did not end\n{self.context()}"
        gone = until(reap, LINGER)
        code, seconds = self.ended(pid), time.monotonic() - struck
        self.struck.append(Struck(aim.window + (", real" if aim.real else ""), str(blow), state, code or 0, round(seconds, 2)))
        print(self.struck[-1], flush=True)
        assert gone, f"left behind: {[(one, Path(f'/proc/{one.pid}/cmdline').read_text()) for one in family()]}\n{self.context()}"
        wanted = self.expected(blow, ready, bool(ranks))
        assert code in wanted, f"{aim} {blow} in {state}: ended with {code}, not {wanted}\n{self.context()}"
        assert not (wrong := remains.damage(self.out)), f"{aim} {blow} in {state}: {wrong}\n{self.context()}"
        return True

    def moment(self, pid: int, aim: Aim, began: float) -> bool:
        """Waits for the moment. False when the stage ended before it came."""
        life = aims.left(self.out, self.steps) * (self.seconds - self.waking) + (self.waking if aim.real else 0)
        came = {
            "at a time": lambda: time.time() - began > aim.part * life,
            "at a step": lambda: aims.steps_done(self.out, began) >= aim.nth,
            "as its ranks start": lambda: len(self.rank_pids(pid)) == self.ranks,
        }.get(aim.window, self.trapped)
        until(lambda: came() or self.ended(pid, wait=False) is not None, 10 * PATIENCE)
        if aim.window not in aims.WINDOWS:
            time.sleep(aim.delay)
        if aim.window == "writes the model" and self.caught:
            self.follow(pid, began)
        return self.ended(pid, wait=False) is None

    caught = 0

    def trapped(self) -> bool:
        """Whether a process has come to the window and is stopped there."""
        try:
            self.caught = int.from_bytes(os.read(self.trap_pipe, 4), "little")
        except BlockingIOError:
            return False
        until(lambda: any(one.pid == self.caught and one.state == "T" for one in family()), PATIENCE)
        return True

    def follow(self, pid: int, began: float) -> None:
        """Lets the process run in small steps until it writes its weights."""
        while not aims.at_work(self.out, began) and self.ended(pid, wait=False) is None:
            send([self.caught], signal.SIGCONT)
            time.sleep(SLICE)
            send([self.caught], signal.SIGSTOP)

    def again(self, targets: list[int], number: signal.Signals) -> None:
        """The same signal once more, when it counts as a second one; the process is held so that it is not gone by then."""
        time.sleep(0.02)
        send(targets, signal.SIGSTOP)
        time.sleep(TWICE)
        send(targets, number)
        send(targets, signal.SIGCONT)

    def expected(self, blow: Blow, ready: bool, ranks: bool) -> set[int]:
        """The exit codes that are documented. `ready`: what was struck handled signals; `ranks`: there were some."""
        done = "done, " in self.log().read_text()
        if blow.number == KILL:
            return {137} if blow.whom == "a rank" and ranks else {-KILL}
        if ready:
            return {130, 0} if done else {130}
        return {128 + blow.number} if blow.whom == "a rank" and ranks else {-blow.number}

    # ---- what is there ----

    def state(self, pid: int) -> str:
        """What the stage was doing, as far as its folder tells."""
        names = {file.name for file in self.out.glob("*")}
        if not catches(self.listener(pid), signal.SIGTERM):
            return "before it listens"
        if "artifact.json" in names:
            return "with its record"
        for name in ("artifact.partial", "transformer", "pytorch_lora_weights.safetensors"):
            if name in names:
                return f"with {name}"
        partial = [name for name in names if name.endswith(".partial")]
        return f"step {aims.steps_done(self.out)}{f', {partial[0]}' if partial else ''}"


def main(arguments: dict[str, Any]) -> None:
    """One case, in a process that orphans come to."""
    kin.adopt()
    began, case = time.monotonic(), Case(**arguments)
    try:
        case.run()
    except Exception:
        send([one.pid for one in family()], KILL)
        raise
    print(json.dumps({**case.table(), "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    if work := warm.became(lambda: main(json.loads(sys.argv[1]))):
        work()
