"""Samples in an intact shard: the rows of good ones, and why others are rejected."""

import gzip
import json
import re
import struct
import zlib

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shards import encoded as encodings
from data.shards import scan
from data.shards.pictures import BadContent
from tests.shards import (
    END,
    FORMS,
    encoded,
    header_offset,
    jpeg,
    member,
    noise,
    pairs,
    parts,
    refusal,
    rejected,
    rows,
    scanned,
    tar,
)  # fmt: skip


def bomb(side: int) -> bytes:
    """A real PNG of side x side pixels, all of them zero: some 20 KB for 13,000."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = zlib.compressobj(9)
    pixels = b"".join([*(row.compress(bytes(1 + side // 8)) for _ in range(side)), row.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def stored(fingerprint: object) -> bytes:
    head = json.dumps({"__metadata__": {"fingerprint": json.dumps(fingerprint)}}).encode()
    return len(head).to_bytes(8, "little") + head


def plain_webdataset(path) -> list[dict]:
    return list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))


# ---- what is noted of a good sample --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_sample_is_noted_with_what_it_is_and_where(tmp_path, form):
    entry = scanned(path := tmp_path / "a.tar", tar(pairs(3), FORMS[form]))
    assert parts(path, entry) == [jpeg(0), jpeg(1), jpeg(2)]
    assert parts(path, entry, "caption") == [b"picture 0", b"picture 1", b"picture 2"]
    for row, content in zip(rows(entry), (jpeg(0), jpeg(1), jpeg(2)), strict=True):
        assert (row["picture_crc"], row["width"], row["height"], row["caption_chars"]) == (zlib.crc32(content), 32, 24, 9)
        assert row["caption_json"] == row["latents_bytes"] == row["text_offset"] == 0
    assert len({row["key"] for row in rows(entry)}) == 3
    assert entry.head["rejected"] == []
    assert entry.head["partial"] is None


def test_jpgs_first_and_txts_after(tmp_path):
    members = sorted(pairs(), key=lambda one: one[0][-3:])
    entry = scanned(path := tmp_path / "a.tar", tar(members))
    assert parts(path, entry, "caption") == [b"picture %d" % i for i in range(6)]
    assert all({"jpg", "txt"} - set(sample) for sample in plain_webdataset(path)), "plain webdataset has halves only"


def test_pictures_of_every_kind_and_captions_of_both(tmp_path):
    image = noise()
    members = [
        ("a.png", encoded(image)), ("a.txt", b"\xef\xbb\xbf ein K\xc3\xa4fer "), ("b.JPEG", encoded(image, "JPEG")), ("b.TXT", b"x"),
        ("c.webp", encoded(image, "WEBP")), ("c.json", b'{"url": "x", "captions": ["one", "three"]}'), ("deep/er.dir/d.png", encoded(image)),
        ("deep/er.dir/d.json", b'"text"'), ("./e.png", encoded(image)), ("./e.txt", "ä-日本".encode()),
    ]  # fmt: skip
    entry = scanned(tmp_path / "a.tar", tar(members))
    assert [row["caption_chars"] for row in rows(entry)] == [9, 1, 5, 4, 4]
    assert [row["caption_json"] for row in rows(entry)] == [0, 0, 1, 1, 0]
    assert {(row["width"], row["height"]) for row in rows(entry)} == {(32, 24)}
    assert entry.head["rejected"] == []


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b", "a::b", "a&b;c=d+e", "ä-日本", "pipe:cat", "../../etc/p", "/etc/p", " ", "a\nb", "x" * 200])
def test_names_that_other_programs_read_as_syntax_are_names(tmp_path, name):
    entry = scanned(path := tmp_path / "a.tar", tar([(f"{name}.jpg", jpeg()), (f"{name}.txt", b"x")], FORMS["pax"]))
    assert parts(path, entry) == [jpeg()]
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a.tar"]


def test_a_name_that_is_not_utf_8(tmp_path):
    entry = scanned(path := tmp_path / "a.tar", member(b"\xff\xe9.jpg", jpeg()) + member(b"\xff\xe9.txt", b"x") + member(b"\xe9.txt", b"y") + END)
    assert parts(path, entry, "caption") == [b"x"]
    assert list(rejected(entry)) == ["\\udce9"]


@pytest.mark.parametrize("txt_first", [True, False])
def test_a_txt_goes_before_a_json(tmp_path, txt_first):
    for json_says in (b'{"caption": "from the json"}', b'{"width": 3}', b"no json", b'{"exif": "%s"}' % (b"x" * 70_000)):
        captions = [("a.txt", b"from the txt"), ("a.json", json_says)]
        entry = scanned(path := tmp_path / "a.tar", tar([("a.jpg", jpeg()), *captions[:: 1 if txt_first else -1]]))
        assert parts(path, entry, "caption") == [b"from the txt"]
        assert (rows(entry)[0]["caption_json"], rows(entry)[0]["caption_chars"]) == (0, 12)
    members = [("a.jpg", jpeg()), *[("a.txt", b" "), ("a.json", b'"used"')][:: 1 if txt_first else -1]]
    assert parts(path, scanned(path, tar(members)), "caption") == [b'"used"']


# ---- rejected samples ----------------------------------------------------------------------------------------------------------------

UNUSABLE_CAPTIONS = {"empty": (b"", "empty"), "blank": (b" \n\t", "empty"), "latin-1": ("naïve".encode("latin-1"), "not UTF-8 text"),
                     "long": (b"x" * 70_000, "70,000 bytes")}  # fmt: skip


@pytest.mark.parametrize(("caption", "expected"), UNUSABLE_CAPTIONS.values(), ids=UNUSABLE_CAPTIONS)
def test_an_unusable_caption_is_dropped_or_empty_as_the_policy_says(tmp_path, caption, expected):
    content = tar([*pairs(1), ("b.jpg", jpeg(8)), ("b.txt", caption)])
    dropped, empty = scanned(path := tmp_path / "a.tar", content), scanned(path, empty_captions=True)
    assert rejected(dropped)["b"][0] == header_offset(content, "b.txt") + 512
    assert expected in rejected(dropped)["b"][1]
    assert (len(dropped), len(empty)) == (1, 2)
    assert (rows(empty)[1]["caption_bytes"], rows(empty)[1]["caption_chars"]) == (0, 0)
    assert empty.head["rejected"] == []


def test_a_missing_caption_is_dropped_or_empty_as_the_policy_says(tmp_path):
    content = tar([*pairs(1), ("b.jpg", jpeg(8)), ("c.jpg", jpeg(9)), ("c.txt.gz", gzip.compress(b"a bomb, perhaps"))])
    entry = scanned(path := tmp_path / "a.tar", content)
    assert rejected(entry) == {key: (header_offset(content, f"{key}.jpg") + 512, "it has no caption") for key in "bc"}
    assert entry.head["ignored"] == {".txt.gz": 1}
    assert len(scanned(path, empty_captions=True)) == 3


BAD_PICTURES = {
    "empty": (b"", "no readable"), "words": (b"not a picture", "no readable"), "half a header": (jpeg()[:100], "no readable"),
    "half a PNG header": (encoded(noise())[:30], "no readable"), "a TGA": (encoded(noise(), "TGA"), "no readable"),
    "a PPM": (encoded(noise(), "PPM"), "no readable"), "an EPS": (encoded(noise(), "EPS"), "no readable"),
    "HTML": (b"<html>", "no readable"), "a bomb": (bomb(13_000), "169000000 pixels|13000x13000 pixels"),
    "a smaller bomb": (bomb(10_400), "10400x10400 pixels are more than the 100,000,000"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_a_picture_that_is_none_is_rejected(tmp_path, content, expected):
    assert len(content) < 25_000
    shard = tar([*pairs(1), ("b.jpg", content), ("b.txt", b"x"), *pairs(2)[2:]])
    entry = scanned(tmp_path / "a.tar", shard)
    offset, reason = rejected(entry)["b"]
    assert offset == header_offset(shard, "b.jpg") + 512
    assert any(word in reason for word in expected.split("|")), reason
    assert "0x" not in reason.replace("13000x13000", "").replace("10400x10400", ""), "an address in memory is no reason, and never twice the same"
    assert len(entry) == 2


NOT_SAMPLES = {  # members, and what is rejected: the key, a member (whose data's place is given) and words
    "two pictures": ([("a.jpg", jpeg()), ("a.png", encoded(noise())), ("a.txt", b"x")], "a", "a.png", "two pictures"),
    "two captions": ([("a.jpg", jpeg()), ("a.txt", b"x"), ("a.TXT", b"y")], "a", "a.TXT", "two captions"),
    "no picture": ([("a.txt", b"x"), ("a.tga", encoded(noise(), "TGA"))], "a", "a.txt", "no picture"),
    "dots": ([("a.v1.jpg", jpeg()), ("a.v1.txt", b"x"), ("a.v2.jpg", jpeg(2))], "a", "a.v1.jpg", "'a.v1.jpg' is no picture of a sample"),
    "other encodings": (
        [("b.jpg", jpeg()), ("b.txt", b"x"), ("b.latents.safetensors", stored({"vae": 1})),
         ("a.jpg", jpeg()), ("a.txt", b"x"), ("a.latents.safetensors", stored({"vae": 2}))],
        "a", "a.latents.safetensors", "another way"),
    "missing encodings": (
        [("b.jpg", jpeg()), ("b.txt", b"x"), ("b.text.safetensors", stored({"t5": 1})), ("a.jpg", jpeg()), ("a.txt", b"x")], "a", "a.jpg", "no text"),
    "a pickle for encodings": ([("a.jpg", jpeg()), ("a.txt", b"x"), ("a.latents.safetensors", b"\x80\x04K\x01.")], "a", "a.latents.safetensors",
                               "no safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize(("members", "key", "where", "expected"), NOT_SAMPLES.values(), ids=NOT_SAMPLES)
def test_a_sample_that_is_none_is_rejected(tmp_path, members, key, where, expected):
    content = tar([*members])
    entry = scanned(tmp_path / "a.tar", content)
    assert list(rejected(entry)) == [key]
    offset, reason = rejected(entry)[key]
    assert offset == header_offset(content, where) + 512
    assert expected in reason


def test_other_pictures_of_a_sample_are_ignored(tmp_path):
    entry = scanned(path := tmp_path / "a.tar", tar([("a.depth.png", encoded(noise(5))), ("a.jpg", jpeg()), ("a.txt", b"x"), ("a.cls", b"3")]))
    assert parts(path, entry) == [jpeg()]
    assert entry.head["ignored"] == {".depth.png": 1, ".cls": 1}


def test_what_webdataset_skips_is_no_sample(tmp_path):
    names = ("._a", "a/._b", "__meta__/c", "__MACOSX/._d")
    members = [(f"{name}.{end}", content) for name in names for end, content in (("jpg", jpeg()), ("txt", b"x"))]
    entry = scanned(path := tmp_path / "a.tar", tar([*pairs(1), *members, ("readme", b"y"), ("e/", b"")]))
    assert len(entry) == 1
    assert entry.head["rejected"] == []
    assert entry.head["ignored"] == {"without a key": 10}
    assert [sample["__key__"] for sample in plain_webdataset(path)] == ["0000", "a/", "__MACOSX/"]  # it means to skip a/._b


def test_a_member_of_no_use_runs_no_code_and_is_counted(tmp_path):
    target = tmp_path / "it ran"
    payload = b"cposix\nsystem\n(S'touch \"" + str(target).encode() + b"\"'\ntR."  # a pickle that makes a file
    others = [(f"0000.{end}", payload) for end in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "cbor")]
    entry = scanned(tmp_path / "a.tar", tar([*pairs(1), *others, ("b.jpg", payload), ("b.txt", payload), ("c.latents.safetensors", payload)]))
    assert len(entry) == 1
    assert set(rejected(entry)) == {"b", "c"}
    assert entry.head["ignored"] == {f".{end}": 1 for end in ("pyd", "pkl", "pickle", "pth", "pt", "npy", "cbor")}
    assert not target.exists()


def test_a_member_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setitem(scan.LIMITS, "picture", 3000)
    monkeypatch.setattr(scan, "CHUNK", 1024)
    content = tar([("a.jpg", bytes(50_000)), ("a.txt", b"x"), *pairs(1)])
    entry = scanned(path := tmp_path / "a.tar", content)
    assert rejected(entry) == {"a": (512, "its picture has 50,000 bytes, more than 3,000")}
    assert parts(path, entry) == [jpeg()]


@pytest.mark.parametrize("chunk", [512, 1000, 5000])
def test_a_shard_of_any_size_is_read_in_pieces(tmp_path, monkeypatch, chunk):
    whole = scanned(path := tmp_path / "a.tar", tar(pairs()))
    monkeypatch.setattr(scan, "CHUNK", chunk)
    assert scanned(path).encode() == whole.encode()


def test_encodings_are_noted(tmp_path):
    latents, text = stored({"vae": 1}), stored({"t5": 1})
    content = tar([("a.jpg", jpeg()), ("a.txt", b"x"), ("a.Latents.safetensors", latents), ("a.text.safetensors", text)])
    entry = scanned(path := tmp_path / "a.tar", content)
    assert entry.head["encodings"] == {"latents": {"vae": 1}, "text": {"t5": 1}}
    assert [parts(path, entry, part) for part in encodings.PARTS] == [[latents], [text]]


def test_keys_cannot_reach_the_terminal_or_grow_without_end(tmp_path):
    bad = "\x1b[31m\x1b]0;title\x07[bold]\u202e" + "x" * 5000
    entry = scanned(tmp_path / "a.tar", tar([(f"{bad}.txt", b"x"), (f"b.{bad}", b"x")] + [(f"c.{i}", b"x") for i in range(300)], FORMS["pax"]))
    (key,) = rejected(entry)
    assert key.startswith("\\x1b[31m\\x1b]0;title\\x07[bold]\\u202exxx")
    assert key.isprintable()
    assert len(key) < 600
    assert len(entry.head["ignored"]) < 110
    assert sum(entry.head["ignored"].values()) == 301
    assert all(kind.isprintable() and len(kind) < 200 for kind in entry.head["ignored"])
    assert "'\\x1b[31m" in refusal(lambda: scanned(tmp_path / "a.tar", tar([(f"{bad}.txt", b"x")] * 2, FORMS["pax"])))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x08", (1 << 40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"{}", stored([1]), stored("x"), stored(None),
     len(deep := b'{"__metadata__":{"fingerprint":' + b"[" * 50_000).to_bytes(8, "little") + deep, b"\xff" * 100],
    ids=["empty", "short", "beyond", "no fingerprint", "a list", "a word", "null", "deep", "rubbish"],
)  # fmt: skip
def test_encodings_that_do_not_say_how_they_were_made(content):
    with pytest.raises(BadContent, match=r"its encodings are no safetensors file|the fingerprint of its encodings is no JSON object"):
        encodings.fingerprint(content)


KEYS = st.text("ab_-/ä #", min_size=1, max_size=6).filter(lambda key: not re.search("^__.*__/|/$|^/|//", key))
SAMPLES = st.dictionaries(KEYS, st.sets(st.sampled_from(["jpg", "png", "txt", "json", "cls"])), max_size=5)


@settings(max_examples=60)
@given(samples=SAMPLES)
def test_whole_samples_are_those_that_webdataset_finds_whole(tmp_path_factory, samples):
    path = tmp_path_factory.getbasetemp() / "compared.tar"
    content = {"jpg": jpeg(), "png": encoded(noise()), "txt": b"from the txt", "json": b'"from the json"', "cls": b"3"}
    entry = scanned(path, tar([(f"{key}.{end}", content[end]) for key in samples for end in sorted(samples[key])]))
    whole = [one for one in plain_webdataset(path) if len({"jpg", "png"} & set(one)) == 1 and {"txt", "json"} & set(one)]
    assert parts(path, entry) == [one["jpg" if "jpg" in one else "png"] for one in whole]
    assert parts(path, entry, "caption") == [one["txt" if "txt" in one else "json"] for one in whole]
    assert set(rejected(entry)) == {key for key, ends in samples.items() if ends - {"cls"}} - {one["__key__"] for one in whole}
