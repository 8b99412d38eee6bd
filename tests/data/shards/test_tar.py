import contextlib
import io
import os
import subprocess
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards.tar import MAX_EXTENSION, DamagedTar, Member, _checksum_matches, walk
from tests.shards import DAMAGES, END, FORMS, header, header_offset, member, pairs, pax, tar


def walked(content: bytes) -> list[Member]:
    """The members. Checks that offsets increase and never exceed what the scan's reader holds."""
    offsets = [0]

    def at(offset: int, length: int) -> bytes:
        assert offset >= offsets[-1]
        assert length >= 0
        offsets.append(offset)
        return content[offset : offset + length]

    return list(walk(at, len(content)))


def attempt(content: bytes) -> list[Member] | DamagedTar:
    try:
        return walked(content)
    except DamagedTar as error:
        return error


def trouble(content: bytes) -> tuple[int, str]:
    error = attempt(content)
    assert isinstance(error, DamagedTar)
    return error.offset, error.reason


def as_tarfile_has_it(content: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        return [(one.name, one.offset_data, one.size) for one in opened if one.isreg()]


# ---- whole tars ----------------------------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=140).filter(lambda n: not n.endswith("/"))
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1300), st.booleans()), max_size=6)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=60)
@given(members=MEMBERS)
def test_a_tar_is_read_as_python_s_tarfile_reads_it(form, members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMS[form]) as archive:
        for name, content, is_folder in members:
            info = tarfile.TarInfo(name)
            info.type, info.size = (tarfile.DIRTYPE, 0) if is_folder else (tarfile.REGTYPE, len(content))
            with contextlib.suppress(ValueError) if form == "ustar" else contextlib.nullcontext():  # which has no room for every name
                archive.addfile(info, io.BytesIO(content))
    assert walked(buffer.getvalue()) == as_tarfile_has_it(buffer.getvalue())


def test_webdataset_s_own_writer_is_read(tmp_path):
    name = "a folder/" + "ä" * 120
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as shard:
        shard.write({"__key__": name, "bin": b"content", "txt": "a caption"})
    content = (tmp_path / "a.tar").read_bytes()
    assert [content[one.offset :][: one.size] for one in walked(content)] == [b"content", b"a caption"]
    assert [one.name for one in walked(content)] == [f"{name}.bin", f"{name}.txt"]


@pytest.mark.parametrize("form", ["gnu", "oldgnu", "pax", "ustar", "v7"])
def test_gnu_tar_s_own_archives_are_read(tmp_path, form):
    names = [f"{'folder/' * 9}{'n' * 40}.jpg" if form != "v7" else "n.jpg", "ä.txt", "deep/er/x"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name * 30)
    subprocess.run(["tar", f"--format={form}", "-cf", tmp_path / "a.tar", "-C", tmp_path / "in", "."], check=True)
    content = (tmp_path / "a.tar").read_bytes()
    result = {one.name.removeprefix("./"): content[one.offset :][: one.size].decode() for one in walked(content)}
    assert result == {name: name * 30 for name in names}


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_gnu_tar_s_sparse_files_and_links_are_refused(tmp_path, form):
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(1 << 28)
    os.link(tmp_path / "hole", tmp_path / "other")
    for expected, options in (("a sparse file (tar without --sparse", ["--sparse"]), ("'other' is a hard link (tar --hard-dereference", [])):
        if not options:
            (tmp_path / "hole").write_bytes(b"x")
        subprocess.run(["tar", f"--format={form}", *options, "-cf", tmp_path / "a.tar", "-C", tmp_path, "hole", "other"], check=True)
        content = (tmp_path / "a.tar").read_bytes()
        assert len(content) < 20_000
        assert expected in trouble(content)[1]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (member(b"a" * 100, b"x"), "a" * 100),
        (member(b"b.jpg", b"x", fields={345: b"folder/below"}), "folder/below/b.jpg"),
        (member(b"b.jpg", b"x", fields={345: b"d"}), "d/b.jpg"),
        (member(b"b.jpg", b"x", fields={257: b"ustar  \0", 345: b"00000000000"}), "b.jpg"),  # GNU has times there
        (member(b"b.jpg", b"x", kind=b"\0"), "b.jpg"),
        (member(b"\xff\xfe.jpg", b"x"), "\udcff\udcfe.jpg"),
        (member(b"././@LongLink", b"a long name.jpg\0and rubbish", b"L") + member(b"a lon", b"x"), "a long name.jpg"),
        (pax(path="päx.jpg", comment="no=matter\nat all") + member(b"p_x.jpg", b"x"), "päx.jpg"),
        (pax(path=b"\xff.jpg", hdrcharset="BINARY") + member(b"p", b"x"), "\udcff.jpg"),
        (member(b"g", b"13 comment=x\n", b"g") + member(b"b", b"x"), "b"),
        (header(b"folder/", kind=b"5", size=9999) + member(b"b", b"x"), "b"),
        (header(b"folder/", kind=b"5", fields={124: bytes(12)}) + header(b"b", fields={124: b" " * 12}) + member(b"c", b"x"), "c"),
        (member(b"\xff" * 100, b"x", fields={345: b"\xff" * 155, 157: b"\xff" * 100}), ("\udcff" * 155) + "/" + "\udcff" * 100),
    ],
    ids=[
        "100 bytes",
        "ustar prefix",
        "short prefix",
        "no prefix in GNU's",
        "old kind",
        "not UTF-8",
        "GNU long",
        "pax",
        "pax binary",
        "global",
        "folder",
        "blank sizes",
        "large sum",
    ],
)
def test_names_of_every_form(written, read):
    name, offset, size = walked(written + END)[-1]
    assert (name, (written + END)[offset : offset + size]) == (read, b"x")


@pytest.mark.parametrize(
    "field", [b"00000000003\0", b"3          \0", b"          3 ", b"\0\0\0\0\0\0\0\0\0\0\x003", b"\x80" + bytes(10) + b"\x03"], ids=repr
)
def test_sizes_of_every_form(field):
    assert walked(member(b"a", b"abc", fields={124: field.ljust(12, b"\0")}) + END) == [("a", 512, 3)]


def test_a_size_of_more_than_a_header_can_hold_is_read():
    large = 9 << 30
    for head in (header(b"a", fields={124: b"\x80" + large.to_bytes(11, "big")}), pax(size=str(large)) + header(b"a")):
        end = len(head) + large

        def at(offset: int, length: int, head: bytes = head, end: int = end) -> bytes:
            return head[offset : offset + length] if offset < len(head) else bytes(max(0, min(length, end + 1024 - offset)))

        assert [one.size for one in walk(at, end + 1024)] == [large]


@pytest.mark.parametrize("blocks", [2, 3, 20, 21])
def test_an_end_mark_and_its_padding(blocks):
    assert len(walked(member(b"a", b"x") + bytes(512 * blocks))) == 1


def test_an_empty_tar_is_a_tar():
    assert walked(tar([])) == walked(END) == []


# ---- damaged and hostile ones --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ustar", "gnu"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damage_is_found_where_it_is(damage, form):
    content, offset, expected = damage(tar(pairs(), FORMS[form]))
    result, reason = trouble(content)
    assert result == offset
    assert expected in reason


A = member(b"a.jpg", b"x" * 600)  # 1536 bytes
HOSTILE = {
    "a hard link": (header(b"b", kind=b"1"), 0, "'b' is a hard link"),
    "a symbolic link": (header(b"b", kind=b"2", fields={157: b"/etc/passwd"}), 0, "'b' is a symbolic link"),
    "a device": (header(b"b", kind=b"3"), 0, "'b' is a device"),
    "a pipe": (header(b"b", kind=b"6"), 0, "'b' is a pipe"),
    "an old sparse file": (header(b"b", kind=b"S"), 0, "'b' is a sparse file"),
    "another kind": (header(b"b", kind=b"V"), 0, "'b' is a member of type b'V'"),
    "a link's long name": (member(b"././@LongLink", b"target", b"K") + header(b"b", kind=b"2"), 0, "is a link"),
    "a named link": (pax(path="c\x1b[2J") + header(b"b", kind=b"2"), 1024, r"'c\x1b[2J' is a symbolic link"),
    "a pax sparse file": (pax(GNU_sparse_major="1", GNU_sparse_realsize="268435456") + A, 0, "a sparse file"),
    "a size of pax too small": (pax(size="10") + A, 2048, "no tar header"),
    "a size of pax too large": (pax(size="100000") + A, 1024, "'a.jpg' has 100000 bytes, of which the file holds 2048"),
    "a size of pax beyond all": (pax(size="9" * 5000) + A, 5632, "gives a size of '99999999999999999999'"),
    "a size of pax below zero": (pax(size="-1") + A, 1024, "gives a size of '-1'"),
    "a size of pax in other digits": (pax(size="²") + A, 1024, "gives a size of '²'"),
    "a size too small": (member(b"a.jpg", b"x" * 600, fields={124: b"00000000012\0"}), 1024, "no tar header"),
    "a size below zero": (member(b"a.jpg", b"x", fields={124: b"-0000002000\0"}), 0, "a size of b'-0000002000"),
    "a size with an underscore": (member(b"a.jpg", b"x", fields={124: b"0000000_001\0"}), 0, "a size of b'0000000_001"),
    "a size of base 256 below zero": (member(b"a.jpg", b"x", fields={124: b"\xff" * 12}), 0, "a size of b'\\xff"),
    "a size of base 256 beyond all": (member(b"a.jpg", b"x", fields={124: b"\x80" + b"\xff" * 11}), 0, "of which the file holds 1536"),
    "a checksum below zero": (A[:148] + b"-0001\0  " + A[156:], 0, "no tar header"),
    "a checksum that is no number": (A[:148] + b"0x1abc\0 " + A[156:], 0, "no tar header"),
    "a pax header without end": (pax(comment="x" * (1 << 20)) + A, 0, "1048576 allowed"),
    "a pax header longer than the file": (header(b"p", 10_000, b"x"), 0, "a header extension of 10000 bytes, of which 1024 are there"),
    "a pax record that lies": (member(b"p", b"99 path=x\n", b"x") + A, 0, "pax records that cannot be read"),
    "a pax record of no length": (member(b"p", b"0 path=x\n", b"x") + A, 0, "pax records that cannot be read"),
    "a pax record of a huge length": (member(b"p", b"9" * 5000 + b" path=x\n", b"x") + A, 0, "pax records that cannot be read"),
    "a pax record without a value": (member(b"p", b"7 path\n", b"x") + A, 0, "pax records that cannot be read"),
    "a pax record without an end": (member(b"p", b"9 path=xy", b"x") + A, 0, "pax records that cannot be read"),
    "a global path": (member(b"g", b"10 path=b\n", b"g") + A, 0, "a global pax header that names or sizes"),
    "a long name of nothing": (member(b"././@LongLink", b"name", b"L"), 1024, "an end mark where the member of a long name"),
    "zeros without end": (bytes(11_000), 0, "more than a tar's end has"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "offset", "expected"), HOSTILE.values(), ids=HOSTILE)
def test_what_no_dataset_needs_is_refused(content, offset, expected):
    assert expected in trouble(content + END)[1]
    assert [trouble(before + content + END)[0] - len(before) for before in (b"", A, A + A)] == [offset] * 3


def test_a_pax_header_of_many_records_takes_no_time():
    records = b"5 a=\n" * (MAX_EXTENSION // 5)
    assert walked(member(b"p", records, b"x") + A + END) == [("a.jpg", 512 + 512 * -(-len(records) // 512) + 512, 600)]


# ---- any damage at all ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=150)
@given(data=st.data())
def test_any_flipped_byte_of_a_header_is_seen(form, data):
    long = [("a folder/" + "n" * 80 + f"/{i}" + "x" * 30 + ".jpg", b"%d" % i * 700) for i in range(3)]
    good = tar(long, FORMS[form])
    headers = [at for at in range(0, len(good), 512) if _checksum_matches(good[at : at + 512])]
    at = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
    changed = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    result = attempt(changed)
    if isinstance(result, DamagedTar):
        assert result.offset == at // 512 * 512
    else:  # the checksum's own field can be written in several ways
        assert 148 <= at % 512 < 156
        assert result == walked(good)


@given(data=st.data())
def test_any_cut_is_seen(data):
    good = tar(pairs(2))
    cut = data.draw(st.integers(0, len(good) - 1))
    end = len(good.rstrip(b"\0")) + 511 & -512
    if cut >= end + 1024:
        assert walked(good[:cut]) == walked(good)
    else:
        assert trouble(good[:cut])[0] <= cut


@given(at=st.integers(0, 5119), noise=st.binary(min_size=1, max_size=2000), seed=st.integers(0, 3))
@settings(max_examples=150)
def test_rubbish_ends_in_an_error_and_in_nothing_else(at, noise, seed):
    good = tar(pairs(2), list(FORMS.values())[seed % 3])
    for content in (good[:at] + noise + good[at + len(noise) :], noise, np.random.default_rng(seed).bytes(at) + good):
        result = attempt(content)
        assert not isinstance(result, DamagedTar) or 0 <= result.offset <= len(content)


@pytest.mark.parametrize("blocks", [21, 63, 64, 100, 126, 512, 1000, 2048, 10240, 32768])
def test_records_of_any_usual_size_are_padded_with_zeros(blocks):
    good = tar(pairs(2)).rstrip(b"\0")
    record = 512 * blocks
    content = good + bytes(-(len(good) + 1024) % record + 1024)
    assert [member.name for member in walked(content)] == ["0000.jpg", "0000.txt", "0001.jpg", "0001.txt"]


@pytest.mark.parametrize("size", [1 << 20, 51200, 20 << 20])
def test_a_rest_that_was_never_written_is_no_padding(size):
    good = tar(pairs(6))
    for cut in (header_offset(good, f"{number:04d}.jpg") + 1300 for number in range(6)):  # within a picture
        with pytest.raises(DamagedTar):
            list(walked(good[:cut] + bytes(size - cut)))
    with pytest.raises(DamagedTar, match="never written"):
        list(walked(bytes(size)))
