"""Secrets are redacted in texts for the UI."""

import pytest

from dev2pro.redact import redact, redact_url


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name, value in {
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG", "HF_TOKEN": "plain-token", "MY_PASSWORD": "12345678", "SSH_AUTH_SOCK": "/tmp/agent",
        "DEV2PRO_WEBHOOK": "https://hooks.example/T0/B0/xyz", "KEY": "abc",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("key wJalrXUtnFEMI/K7MDENG!", "key ********!"),
        ("token=plain-token", "token=********"),
        ("posting to https://hooks.example/T0/B0/xyz", "posting to ********"),
        ("hub: hf_abcdefghijklmnopqrstuvwxyz", "hub: hf_********"),
        ("AKIAIOSFODNN7EXAMPLE is it", "AKIAIOSF******** is it"),
        ("s3://user:pass@host/bucket", "s3://********@host/bucket"),
        ("https://h/x.tar?X-Amz-Signature=abc123&partNumber=2", "https://h/x.tar?X-Amz-Signature=********&partNumber=2"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ********"),
        ("step 12345678 of /tmp/agent, abc", "step 12345678 of /tmp/agent, abc"),  # numbers, paths and short values are no secrets
        ("recover: 5/10  loss 0.5", "recover: 5/10  loss 0.5"),
    ],
)
def test_secrets_are_hidden_and_nothing_else(text, redacted):
    assert redact(text) == redacted


def test_a_url_has_no_secret_and_nothing_that_a_terminal_obeys():
    assert redact_url("s3://key:hush/hush@bucket/a?X-Amz-Signature=hush") == "s3://bucket/a"
    assert redact_url("/a\x1b[2J\n") == "/a\\x1b[2J\\n"
    assert redact_url("/a?b#c") == "/a?b#c"
