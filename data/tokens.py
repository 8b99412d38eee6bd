"""Counts the tokens that a FLUX.1 pipeline's T5 makes of a caption."""

import functools
import os
from collections.abc import Sequence
from typing import Any

from dev2pro.errors import ConfigError


class T5Tokens:
    """The tokens of captions, the one at the end included, of which the model reads `limit`. Loads the tokenizer of `path` when it is called."""

    def __init__(self, path: str, limit: int) -> None:
        self.path, self.limit = path, limit

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from transformers import T5TokenizerFast  # imported lazily: it takes a second, and data.report may do without

        files = [os.path.join(self.path, "tokenizer_2", name) for name in ("tokenizer.json", "spiece.model")]
        try:
            if self.path.startswith(("/", ".")) and not os.path.isdir(self.path):
                raise FileNotFoundError("there is no such folder")  # transformers takes it for a hub id
            if os.path.isdir(self.path) and not any(map(os.path.isfile, files)):
                raise FileNotFoundError(f"{files[0]} is missing")  # transformers would make an empty tokenizer
            return T5TokenizerFast.from_pretrained(self.path, subfolder="tokenizer_2")
        except Exception as error:  # of the tokenizer's library, too
            raise ConfigError(
                f"The tokenizer_2 of the model {self.path} cannot be read ({error}). Give the folder or hub id of a FLUX.1 pipeline."
            ) from error

    def __call__(self, captions: Sequence[str]) -> list[int]:
        """The tokens of every caption. Raises ConfigError if the model has no tokenizer."""
        return list(map(len, self._tokenizer(list(captions), verbose=False).input_ids))
