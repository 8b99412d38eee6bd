"""The password of `make serve`: generated once, readable by its owner alone, overridden by the environment, shown in terminals and not in logs."""

import os
import subprocess
import sys

import pytest

from dev2pro.artifacts.record import ROOT
from dev2pro.errors import ConfigError
from flows.serve import password


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch, tmp_path):
    for name in (password.SERVER, password.CLIENT, password.NONE):
        monkeypatch.setenv(name, "x")  # so that what configure() sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))


def test_it_is_made_once_and_only_its_owner_can_read_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    old = os.umask(0)  # whatever the shell's is
    try:
        message = password.configure()
    finally:
        os.umask(old)
    file = tmp_path / "home" / password.FILE
    credentials = file.read_text().strip()
    assert credentials in message
    assert len(credentials) > 30
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert os.environ[password.SERVER] == os.environ[password.CLIENT] == credentials
    for name in (password.SERVER, password.CLIENT):
        monkeypatch.delenv(name)
    again = password.configure()
    assert os.environ[password.SERVER] == credentials
    assert credentials not in again
    assert str(file) in again


def test_it_is_told_to_no_log(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    message = password.configure()
    assert os.environ[password.SERVER] not in message


def test_the_environment_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv(password.SERVER, "admin:mine")
    monkeypatch.setenv(password.CLIENT, "admin:of another server")
    assert "mine" not in password.configure()
    assert os.environ[password.CLIENT] == "admin:mine"
    assert not (tmp_path / "home").exists()


def test_the_switch(monkeypatch, tmp_path):
    monkeypatch.setenv(password.NONE, "true")
    assert "no password" in password.configure()
    assert password.SERVER not in os.environ
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({password.SERVER: "admin:choose-a-password"}, "everybody knows"),
        ({password.SERVER: ""}, "no USER:PASSWORD"),
        ({password.SERVER: "admin"}, "no USER:PASSWORD"),
        ({password.SERVER: "admin:"}, "no USER:PASSWORD"),
        ({password.SERVER: "admin:mine", password.NONE: "true"}, "both set"),
        ({password.NONE: "flase"}, "neither true nor false"),
    ],
)
def test_what_cannot_be_meant_is_refused(monkeypatch, settings, error):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=error):
        password.configure()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_somebody_else_is_refused(tmp_path):
    file = tmp_path / "home" / password.FILE
    file.parent.mkdir()
    file.write_text("admin:known to them")
    file.chmod(0o600)
    os.chown(file, 12345, 12345)
    with pytest.raises(ConfigError, match="other users"):
        password.configure()


@pytest.mark.parametrize(
    ("content", "mode", "error"), [("admin:x", 0o640, "other users"), ("", 0o600, "no USER:PASSWORD"), ("a:b\nc:d", 0o600, "no USER")]
)
def test_a_file_that_is_no_secret_or_no_password_is_refused(tmp_path, content, mode, error):
    file = tmp_path / "home" / password.FILE
    file.parent.mkdir()
    file.write_text(content)
    file.chmod(mode)
    with pytest.raises(ConfigError, match=error) as caught:
        password.configure()
    assert str(file) in str(caught.value)


def test_make_serve_ends_with_the_reason(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    for settings, error in (
        ({"PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": "*"}, "allows every page there is"),
        ({"PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": "dev2pro.example.com"}, "is no address of a page"),
    ):
        given = environment | {"PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:1/api"} | settings
        command = [sys.executable, "-m", "flows.serve"]
        result = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=120, check=False)
        assert result.returncode == 2
        assert error in result.stderr
        assert result.stderr.count("\n") == 1
