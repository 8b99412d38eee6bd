"""`make serve` with PostgreSQL, as .env.example describes it: runs complete, and everything is there after a restart."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.flows.clone import cloned
from tests.flows.operator import free_port, until

pytestmark = [pytest.mark.operator, pytest.mark.ci]
BIN_FOLDERS = [*Path("/usr/lib/postgresql").glob("*/bin"), Path(shutil.which("postgres") or "/").parent]
PASSWORD = "p@ss:w/rd"


@pytest.fixture(scope="module")
def postgres():
    """A server of Debian's package on loopback, with a user and a database of ours: the address of that."""
    if not (folders := [path for path in BIN_FOLDERS if (path / "initdb").exists() and (path / "postgres").exists()]):
        pytest.skip("there is no PostgreSQL here: apt-get install postgresql")
    folder, port = Path(tempfile.mkdtemp(prefix="dev2pro-postgres-")), free_port()
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())  # it does not run as root
    os.chown(folder, user.pw_uid, user.pw_gid)
    (folder / "password").write_text(PASSWORD)
    common = {"cwd": folder, "user": user.pw_uid, "group": user.pw_gid} if os.getuid() == 0 else {"cwd": folder}
    args = ["-U", "dev2pro", "-A", "scram-sha-256", f"--pwfile={folder}/password", "-D", f"{folder}/data", "-E", "UTF8", "--locale=C"]
    (folder / "password").chmod(0o644)
    subprocess.run([folders[0] / "initdb", *args], check=True, capture_output=True, **common)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [folders[0] / "postgres", "-D", f"{folder}/data", "-h", "127.0.0.1", "-p", str(port), "-k", folder], stdout=log, stderr=log, **common
        )
    until(lambda: "ready to accept connections" in (folder / "log").read_text() or server.poll() is not None, what="PostgreSQL")
    try:
        yield f"postgresql+asyncpg://dev2pro:{PASSWORD.replace('@', '%40').replace(':', '%3A').replace('/', '%2F')}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(folder)


def test_runs_and_settings_are_there_after_a_restart(postgres, tmp_path):
    with cloned(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=postgres) as serve:
        run = serve.recovered("postgres")
        lora = serve.deployments()["lora"]
        serve.api.patch(f"deployments/{lora['id']}", json={"paused": True, "parameters": {"lora": {"out": "runs/mine"}}}).raise_for_status()
        until(lambda: "Finished in state Completed('" in serve.run_log(run), what="the log's last line")
        before = serve.run_log(run), serve.artifacts(run)
        assert "recover: done" in before[0]
        assert before[1]
        assert serve.stop() == 0
        serve.start()
        assert serve.state(run)["name"] == "Completed"
        assert (serve.run_log(run), serve.artifacts(run)) == before
        after = serve.deployments()["lora"]
        assert (after["id"], after["paused"], after["parameters"]) == (lora["id"], True, {"lora": {"out": "runs/mine"}})
        assert not (serve.home / "prefect.db").exists()
        logs = [serve.log_file.read_text(), *(file.read_text() for file in (serve.folder / "runs/.serve").glob("*.log"))]
        assert not [text for text in logs if "p%40ss" in text or PASSWORD in text]
        assert not [one for one in serve.family() if any("p%40ss" in word or PASSWORD in word for word in one.cmdline())]
