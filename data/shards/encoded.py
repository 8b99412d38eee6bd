"""What a VAE or a text encoder made of a sample, as a safetensors member of a shard, with the fingerprint of how it was made."""

import json
from typing import Any

from data.shards.pictures import BadContent

PARTS = {"latents": {"mean", "std"}, "text": {"prompt", "pooled"}}  # part -> tensors in the member <key>.<part>.safetensors
MAX_HEADER = 1 << 16  # bytes


def member(values: dict[str, Any], made: dict[str, Any]) -> bytes:
    """A member's bytes: tensors (torch, on the CPU), and the fingerprint of how they were made."""
    import safetensors.torch  # here and below, so that indexing goes without torch

    return safetensors.torch.save(values, metadata={"fingerprint": json.dumps(made, sort_keys=True)})


def fingerprint(content: bytes) -> dict[str, Any]:
    """How a member was made. Raises BadContent for one that does not say."""
    size = int.from_bytes(content[:8], "little")
    try:
        if not 0 < size <= min(MAX_HEADER, len(content) - 8):
            raise ValueError(f"a header of {size} bytes")
        found = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["fingerprint"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadContent(f"its encodings are no safetensors file with a fingerprint ({error})") from error
    if not isinstance(found, dict):
        raise BadContent("the fingerprint of its encodings is no JSON object")
    return found


def tensors(content: bytes, part: str) -> dict[str, Any]:
    """The tensors of a member, by name. Raises BadContent where they are broken or others."""
    import safetensors.torch

    try:
        found = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise BadContent(f"its {part} cannot be read ({error})") from error
    if set(found) != PARTS[part]:
        raise BadContent(f"its {part} are {sorted(found)}, not {sorted(PARTS[part])}")
    return found
