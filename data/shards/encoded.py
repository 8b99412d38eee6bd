"""Stored encodings (VAE latents, text embeddings): a safetensors member of a shard with a fingerprint of the encoder settings."""

import json
from typing import Any

from data.shards.pictures import BadContent

PARTS = {"latents": {"mean", "std"}, "text": {"prompt", "pooled"}}  # part -> tensors in the member <key>.<part>.safetensors
MAX_HEADER = 1 << 16  # bytes


def member(values: dict[str, Any], settings: dict[str, Any]) -> bytes:
    """A member's bytes: tensors (torch, on the CPU), and the fingerprint of how they were made."""
    import safetensors.torch  # imported lazily, so that indexing needs no torch

    return safetensors.torch.save(values, metadata={"fingerprint": json.dumps(settings, sort_keys=True)})


def fingerprint(content: bytes) -> dict[str, Any]:
    """The encoder fingerprint of a member. Raises BadContent if it is missing."""
    size = int.from_bytes(content[:8], "little")
    try:
        if not 0 < size <= min(MAX_HEADER, len(content) - 8):
            raise ValueError(f"a header of {size} bytes")
        value = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["fingerprint"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadContent(f"its encodings are no safetensors file with a fingerprint ({error})") from error
    if not isinstance(value, dict):
        raise BadContent("the fingerprint of its encodings is no JSON object")
    return value


def tensors(content: bytes, part: str) -> dict[str, Any]:
    """The tensors of a member, by name. Raises BadContent if they are damaged or have other names."""
    import safetensors.torch

    try:
        loaded = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise BadContent(f"its {part} cannot be read ({error})") from error
    if set(loaded) != PARTS[part]:
        raise BadContent(f"its {part} are {sorted(loaded)}, not {sorted(PARTS[part])}")
    return loaded
