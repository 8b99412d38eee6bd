"""Web servers, shards and snapshots for the tests of the reading side."""

import io
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from data.shards.snapshot import Snapshot
from data.storage.http import RangeClient
from tests.servers import Server, impatient
from tests.streams import BAD, write_snapshot

Members = Mapping[str, bytes]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Server]:
    """A web server with 100,000 bytes at /a."""
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "a").write_bytes(random.Random(0).randbytes(100_000))
    with Server(folder) as server:
        yield server


@pytest.fixture
def client() -> RangeClient:
    return RangeClient(connections=4, connect_timeout=0.5, idle_timeout=0.5)


@pytest.fixture
def write_shard() -> Callable[..., dict[str, bytes]]:
    """Writes a tar of `count` samples, their PNGs padded to about `size` bytes. Returns name -> bytes."""
    from PIL import Image

    def write(path: Path, count: int = 8, size: int = 0, seed: int = 0, captions: bool = True, mixed: bool = True) -> dict[str, bytes]:
        draw, pictures, texts = random.Random(seed), dict[str, bytes](), dict[str, bytes]()
        for number in range(count):
            encoded = io.BytesIO()
            Image.frombytes("RGB", (8, 8), draw.randbytes(192)).save(encoded, "PNG")
            pictures[f"{number:04d}.png"] = encoded.getvalue() + draw.randbytes(max(0, size - encoded.tell()))
            texts[f"{number:04d}.txt"] = f"picture {number} of {path.name}".encode()
        members = pictures | (texts if captions else {})
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name in sorted(members) if mixed else members:
                info = tarfile.TarInfo(name)
                info.size = len(members[name])
                tar.addfile(info, io.BytesIO(members[name]))
        return members

    return write


@pytest.fixture
def pin(tmp_path: Path):
    """Indexes shards and returns their snapshot."""
    from data import index
    from data.shards import snapshot
    from data.storage.transport import Transport

    def make(*urls: str, **policy: bool) -> snapshot.Snapshot:
        transport, folder = Transport(impatient()), str(tmp_path / "sidecars")
        for url in urls:
            outcome = index.index(url, transport, folder, **{"empty_captions": False, "allow_partial": False, **policy})
            assert not outcome.error
            assert not outcome.rejected
        return snapshot.build(urls, transport, folder=folder)

    return make


@pytest.fixture
def small_disk(disk: Callable[[float], Path]) -> Path:
    """A file system of one MiB."""
    return disk(1)


@pytest.fixture(scope="session")
def many(tmp_path_factory) -> list[Snapshot]:
    """One, two and four shards, without and with pictures that cannot be decoded."""
    folder = tmp_path_factory.mktemp("many")
    snapshots = []
    for bad in (frozenset[int](), frozenset(BAD)):
        for shards in (1, 2, 4):
            path = folder / f"{shards}-{len(bad)}"
            path.mkdir()
            snapshots.append(write_snapshot(path, shards, bad))
    return snapshots
