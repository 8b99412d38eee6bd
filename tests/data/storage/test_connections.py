"""Connections: refused peers, reuse, and what is logged."""

import datetime
import ipaddress
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.storage import http as web_module
from data.storage.http import RangeClient, TransientError
from dev2pro.errors import DataError
from tests.servers import Fault, Server, environment


def always(fault):
    return lambda *_: fault


def test_one_connection_serves_many_requests(web, client):
    info = client.get_range(web.url + "/a", 0, 1)[1]
    for start in range(50):
        client.get_range(web.url + "/a", start, 5000, info)
    assert (len(web.requests), web.connections) == (51, 1)


@pytest.mark.parametrize(
    "peer",
    ["169.254.169.254", "169.254.0.1", "224.0.0.1", "239.1.2.3", "fe80::1%eth0", "::ffff:169.254.169.254", "ff02::1", "fd00:ec2::254"],
)
def test_what_answers_for_a_cloud_is_known_by_its_address(peer):
    class Connected:
        closed = False

        def getpeername(self) -> tuple[str, int]:
            return peer, 80

        def close(self) -> None:
            self.closed = True

    connected = Connected()
    with pytest.raises(web_module._Forbidden):
        web_module._check_peer(connected)
    assert connected.closed


NETWORK = """
import sys
from data.storage.http import RangeClient
from dev2pro.errors import DataError
from tests.servers import Server
for address in ("169.254.77.7", "::ffff:169.254.77.7", "127.0.0.1"):
    with Server(sys.argv[1], host=address.rpartition(":")[2]) as server:
        try:
            RangeClient(4, 5, 5).get_range(server.url.replace("//169.254.77.7", f"//[{address}]") if ":" in address else server.url + "/a", 0, 1)
            print("read")
        except DataError as error:
            print("refused" if "credentials" in str(error) else error)
        print(len(server.requests))
"""


def test_a_link_local_host_is_asked_for_nothing_whatever_its_name(web):
    """In a network namespace in which 169.254.77.7 is this machine."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("no networks of one's own here")
    script = 'ip link set lo up && ip addr add 169.254.77.7/32 dev lo && exec "$@"'
    command = ["unshare", "-rn", "sh", "-c", script, "sh", sys.executable, "-c", NETWORK, str(web.folder)]
    root = str(Path(__file__).resolve().parents[3])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["refused", "0", "refused", "0", "read", "1"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now, names = datetime.datetime.now(datetime.UTC), x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(days=1), [])
    signed = builder.add_extension(names, False).sign(key, hashes.SHA256())
    file = tmp_path_factory.mktemp("certificate") / "both.pem"
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    file.write_bytes(key.private_bytes(*form) + signed.public_bytes(serialization.Encoding.PEM))
    return file


def test_https_is_read_where_the_certificate_is_trusted_and_nowhere_else(web, certificate):
    with Server(web.folder, certificate=certificate) as server:
        with pytest.raises(DataError, match="certificate that is not trusted"):
            RangeClient(4, 2, 2).get_range(server.url + "/a", 0, 10)
        assert server.requests == []
        with environment(SSL_CERT_FILE=str(certificate)):
            assert len(RangeClient(4, 2, 2).get_range(server.url + "/a", 0, 10)[0]) == 10
            with pytest.raises(DataError, match="certificate that is not trusted"):
                RangeClient(4, 2, 2).get_range(server.url.replace("127.0.0.1", "localhost") + "/a", 0, 10)


@pytest.mark.parametrize("kind", ["reset middle", "stall middle", "short"])
def test_a_broken_https_connection_is_no_bad_certificate(web, certificate, kind):
    with (
        Server(web.folder, faults=always(kind), certificate=certificate) as server,
        environment(SSL_CERT_FILE=str(certificate)),
        pytest.raises(TransientError),
    ):
        RangeClient(4, 0.5, 0.5).get_range(server.url + "/a", 0, 5000)


def test_a_host_without_https_may_be_starting(web, client):
    with pytest.raises(TransientError):
        client.get_range(web.url.replace("http:", "https:") + "/a", 0, 10)


def test_headers_that_cannot_be_read_bring_no_address_into_the_log(web, client, caplog):
    web.faults = always(Fault(headers={"Broken header": "x", "no colon\r\nETag": '"x"'}))
    with caplog.at_level(logging.DEBUG):
        client.get_range(web.url + "/a", 0, 10)
        web.faults = always("reset")
        with pytest.raises(TransientError):
            client.get_range(web.url + "/a", 0, 10)
    assert not [record for record in caplog.records if "/a" in record.getMessage()]
