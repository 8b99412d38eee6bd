import pytest
import torch

from data.shards import encoded
from data.shards.pictures import BadContent

MADE = {"version": 1, "vae": "abc"}
VALUES = {"mean": torch.arange(6.0).reshape(2, 3), "std": torch.ones(2, 3, dtype=torch.bfloat16)}


def test_what_goes_in_comes_out():
    member = encoded.member(VALUES, MADE)
    assert encoded.fingerprint(member) == MADE
    tensors = encoded.tensors(member, "latents")
    assert tensors.keys() == VALUES.keys()
    assert all(torch.equal(tensors[name], value) and tensors[name].dtype == value.dtype for name, value in VALUES.items())
    assert encoded.member(VALUES, MADE) == member


@pytest.mark.parametrize(
    "content",
    [
        b"", b"1234567", b"not a safetensors file at all", bytes(8), b"\xff" * 100, encoded.member(VALUES, MADE)[:40],
        b"\x02\0\0\0\0\0\0\0{}", b"\x05\0\0\0\0\0\0\0[[[[[", (10**6).to_bytes(8, "little") + b"[" * 10**6,
    ],
)  # fmt: skip
def test_what_does_not_say_how_it_was_made(content):
    with pytest.raises(BadContent):
        encoded.fingerprint(content)


def test_a_fingerprint_that_is_no_object():
    with pytest.raises(BadContent, match="no JSON object"):
        encoded.fingerprint(encoded.member(VALUES, ["vae"]))


def test_broken_and_other_tensors():
    with pytest.raises(BadContent, match="its latents cannot be read"):
        encoded.tensors(encoded.member(VALUES, MADE)[:-3], "latents")
    with pytest.raises(BadContent, match=r"its text are \['mean', 'std'\], not \['pooled', 'prompt'\]"):
        encoded.tensors(encoded.member(VALUES, MADE), "text")
