"""Which weights of a model are trained: those that globs name. The others are frozen, and have no gradient and no optimizer state."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from dev2pro.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def select(model: M, globs: Sequence[str] | None, path: str) -> M:
    """The model, with every parameter frozen whose name matches none of the globs, such as `*.attn.*`; None trains all.

    The model may be on the meta device, or sharded. Raises ConfigError for a glob that matches nothing in the model of `path`.
    """
    if globs is None:
        return model
    names = [name for name, _ in model.named_parameters()]
    if idle := [glob for glob in globs if not any(fnmatchcase(name, glob) for name in names)]:
        raise ConfigError(
            f"trainable={idle[0]} matches no weight of {path}. They have names such as {names[len(names) // 2]}, and * stands for anything: "
            "transformer_blocks.*, single_transformer_blocks.1[0-9].*, *.attn.*."
        )
    if not globs:
        raise ConfigError("trainable=[] would train nothing. Give globs over the weights' names, such as [transformer_blocks.*], or null for all.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, glob) for glob in globs))
    return model
