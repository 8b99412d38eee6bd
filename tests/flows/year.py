"""A line of recovered models through weeks of shards that arrive, are damaged, and runs that are killed; in a process that adopts every orphan.

`lived` is for tests. Everything but the passing of time is real: the server, the flow, its processes, the models.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dev2pro.errors import DivergedError
from tests.flows import forked
from tests.flows.arrivals import ANY, INK, MOMENTS, SHORT, Shards, Week, planned
from tests.flows.outcome import Outcome, size
from tests.stages import kin, warm
from tests.stages.kin import family, reap, send, until

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds for a run to end
LEAST = 8  # new samples
KEEP = 2  # generations
FORM = [
    f"least={LEAST}", f"keep={KEEP}", "batch=8", "tolerance=0.05", "optim.lr=2e-4", "optim.warmup=1", "probe.every=1000", "probe.samples=16",
    "checkpoint.every=2", f"heldout={INK}/heldout-000000.tar",
]  # fmt: skip


WILD = ["optim.lr=0.1", "optim.warmup=0"]


@dataclass
class Run:
    """How a run ended."""

    week: int
    kill: str
    code: int
    last_line: str
    seconds: float


def lived(tmp: Path, seed: int | None = None) -> dict[str, Any]:
    """The outcome after a year, or without a seed after SHORT, and its runs. Raises AssertionError with the details."""
    arguments = json.dumps({"seed": seed, "tmp": str(tmp)})
    done = subprocess.run([sys.executable, "-m", "tests.flows.year", arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


class Year:
    """A line, its shards, and a server."""

    def __init__(self, seed: int | None, tmp: str) -> None:
        self.tmp, self.dice, self.line = Path(tmp), random.Random(seed), f"test-year-{os.getpid()}"
        self.line_folder, self.shards = ROOT / "runs/recurring" / self.line, Shards(Path(tmp) / "shards", self.dice)
        self.weeks = SHORT if seed is None else planned(self.dice)
        self.runs = list[Run]()
        self.peak, self.usual = 0, 10.0  # bytes of the line; seconds that a run takes

    def live(self) -> None:
        """All of it."""
        self.serve()
        forked.imported()
        for number, week in enumerate(self.weeks, 1):
            for kind in week.arrives:
                self.shards.arrive(kind)
            for _ in range(1 if week.together else week.runs):
                pids = [self.start(number, week) for _ in range(week.runs if week.together else 1)]
                self.ended(pids, number, week)
        if self.weeks is not SHORT:  # what was interrupted last is finished
            self.ended([self.start(len(self.weeks) + 1, Week([]))], len(self.weeks) + 1, Week([]))

    # ---- runs ----

    def start(self, number: int, week: Week) -> int:
        args = ["flows.recurring", f"line={self.line}", f"shards={self.shards.folder}/*.tar", *FORM, *(WILD if week.diverges else [])]
        log, self.killers = self.tmp / f"run-{len(self.runs):03d}.log", self.tmp / f"killed-{number}"
        if week.real:
            return warm.spawned(["-m", *args], {}, log)
        return forked.flow(args, {}, log, self.lurk(week))

    def lurk(self, week: Week) -> forked.Lurk:
        """Installs an audit hook in the module's process, which kills at the moment of the week's kill."""
        moment, who = week.kill or ("", "")

        def lurk(module: str, _words: list[str]) -> None:
            if moment not in MOMENTS or MOMENTS[moment][0] != module:
                return
            _, event, name, nth = MOMENTS[moment]
            countdown, me = [nth], os.getpid()

            def seen(what: str, args: tuple[Any, ...]) -> None:
                if what != event or os.getpid() != me:
                    return
                path = Path(os.fsdecode(args[1] if what == "os.rename" else args[0]))
                if not (path.stem.isdigit() and path.suffix == ".json" if name == "<n>.json" else path.name == name):
                    return
                countdown[0] -= 1
                if not countdown[0]:
                    self.strike(who, me, os.getppid() if module != "flows.recurring" else me)

            sys.addaudithook(seen)

        return lurk

    def strike(self, who: str, me: int, flow: int) -> None:
        """With -9, from within."""
        self.killers.touch()
        if who in ("flow", "all"):
            os.kill(flow, signal.SIGKILL)
        if who in ("stage", "all"):
            os.kill(me, signal.SIGKILL)

    def ended(self, pids: list[int], number: int, week: Week) -> None:
        """Waits for runs, kills one if its moment is any, and checks that no process is left."""
        began, codes = time.monotonic(), dict[int, int]()
        hit = began + self.dice.uniform(0.3, 0.95) * self.usual if week.kill and week.kill[0] == ANY else float("inf")
        while len(codes) < len(pids):
            assert time.monotonic() < began + PATIENCE, f"week {number} does not end\n{self.context()}"
            if time.monotonic() > hit:
                hit = float("inf")
                self.killers.touch()
                stages = [one.pid for one in family() if one.parent == pids[0] and one.session == one.pid]
                send({"flow": pids, "stage": stages, "all": [*pids, *stages]}[week.kill[1]], signal.SIGKILL)
            for pid in set(pids) - codes.keys():
                if (ended := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[pid] = os.waitstatus_to_exitcode(ended[1])
            time.sleep(0.02)
        seconds = time.monotonic() - began
        assert until(lambda: reap() or not self.orphans(), 60), f"left behind in week {number}: {self.orphans()}\n{self.context()}"
        killed = f"{' '.join(week.kill)}" if week.kill and self.killers.exists() else ""
        for code in codes.values():
            self.runs.append(Run(number, killed, code, self.log()[-1:][0] if self.log() else "", round(seconds, 1)))
        if not killed:
            assert set(codes.values()) == {DivergedError.exit_code if week.diverges else 0}, f"week {number}: {codes}\n{self.context()}"
            self.usual = max(5.0, seconds)
        self.peak = max(self.peak, size(self.line_folder))

    def table(self) -> dict[str, Any]:
        """Checks the outcome; what `lived` returns."""
        outcome, states = Outcome(self.line_folder, self.shards, LEAST, KEEP).check(), Counter(self.states())
        reported = {event["payload"]["generation"] for event in self.events()}
        assert reported == set(outcome["worse"]), f"events for generations {reported}"
        assert states["Not promoted"], states
        kills = Counter(one.kill for one in self.runs if one.kill)
        return {**outcome, "weeks": len(self.weeks), "peak": self.peak, "states": states, "kills": kills, "runs": [asdict(one) for one in self.runs]}

    def log(self) -> list[str]:
        logs = sorted(self.tmp.glob("run-*.log"))
        return logs[-1].read_text(errors="replace").splitlines() if logs else []

    def context(self) -> str:
        runs = "\n".join(map(str, self.runs[-6:]))
        return f"{runs}\n" + "\n".join(self.log()[-60:])

    def orphans(self) -> list[Any]:
        """Descendants that are not the server's."""
        return [one for one in family() if one.session != self.server.pid]

    # ---- the server ----

    def serve(self) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        os.environ |= {"PREFECT_HOME": str(self.tmp / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "DEV2PRO_ROOTS": str(self.tmp)}
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        with (self.tmp / "server.log").open("wb") as log:
            self.server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        assert until(self.answers, 180), (self.tmp / "server.log").read_text()

    def answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{os.environ['PREFECT_API_URL']}/health", timeout=5).status == 200
        except OSError:
            return False

    def api(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(f"{os.environ['PREFECT_API_URL']}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def states(self) -> list[str]:
        runs = self.api("flow_runs/filter", sort="START_TIME_ASC", limit=200)
        return [run["state"]["name"] for run in runs]

    def events(self) -> list[dict[str, Any]]:
        return self.api("events/filter", filter={"event": {"name": ["dev2pro.regression"]}})["events"]

    def end(self) -> None:
        self.server.terminate()
        self.server.wait(30)
        for file in (ROOT / "runs/.flow-runs").glob("*.json"):
            if os.environ["PREFECT_API_URL"] in file.read_text():
                file.unlink()


def main(arguments: dict[str, Any]) -> None:
    """One year, in a process that orphans come to."""
    kin.adopt()
    began, year = time.monotonic(), Year(**arguments)
    try:
        year.live()
        table = year.table()
        year.end()
    except Exception:  # not what a forked child becomes
        send([one.pid for one in family()], signal.SIGKILL)
        raise
    print(json.dumps({**table, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    if work := warm.became(lambda: main(json.loads(sys.argv[1]))):
        forked.leave(work)
