"""What a LoRA leaves as it was: the base's own predictions for captions of the class, or for the empty caption."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from dev2pro.errors import ConfigError
from dev2pro.escape import printable
from dev2pro.models import flux1, lora
from dev2pro.models.encodings import NoisedBatch, PromptEncoder
from dev2pro.models.flux1 import Conditioning

EXCERPT = 80  # characters of a caption in a message


@dataclass(slots=True, kw_only=True)
class PreserveConfig:
    """The weight of the preservation loss and the captions it is for; see conf/lora.yaml."""

    weight: float = 0.0
    trigger: str | None = None
    class_word: str | None = None

    def check(self, caption_dropout: float) -> None:
        """Raises ConfigError for values that mean nothing together, before anything is read."""
        if (self.trigger is None) != (self.class_word is None):
            given = f"preserve.trigger={self.trigger}" if self.trigger else f"preserve.class_word={self.class_word}"
            raise ConfigError(
                f"Only {given} is given; preserve.trigger and preserve.class_word belong together: the second replaces the first in every caption. "
                "Give both, or neither to preserve the empty caption."
            )
        if self.trigger and self.class_word and self.class_caption(self.class_word) != self.class_word:
            raise ConfigError(
                f"preserve.class_word={self.class_word} holds preserve.trigger={self.trigger}, so that what is learnt would be preserved as it was. "
                "Give the class without the trigger, such as dog for sks dog."
            )
        if self.weight and not self.trigger and caption_dropout:
            raise ConfigError(
                f"preserve.weight={self.weight} keeps the empty caption as it was, and caption_dropout={caption_dropout} trains it. Set "
                "caption_dropout=0, or give preserve.trigger and preserve.class_word."
            )

    @property
    def rewrite(self) -> Callable[[str], str] | None:
        """What makes a class caption of a caption; None where none is needed."""
        return self.class_caption if self.weight and self.trigger else None

    def class_caption(self, caption: str) -> str:
        """The caption with the class word in place of the trigger, which counts as a whole word; unchanged if it has none."""
        return re.sub(rf"(?<!\w){re.escape(self.trigger or '')}(?!\w)", lambda _: self.class_word or "", caption)

    def check_captions(self, captions: Iterable[str]) -> str:
        """A sentence about captions without the trigger; empty if there are none. Raises ConfigError if no caption has it. Reads all of them."""
        if not self.rewrite:
            return ""
        count, without = 0, list[str]()
        for count, caption in enumerate(captions, 1):  # noqa: B007
            without += [caption] if self.class_caption(caption) == caption else []
        example = printable(without[0][:EXCERPT]) if without else ""
        if len(without) == count:
            raise ConfigError(
                f'preserve.trigger={self.trigger} is in no caption of data.train; one is "{example}". Give the word that captions have for what is '
                "learnt, or leave out preserve.trigger and preserve.class_word to preserve the empty caption."
            )
        if not without:
            return ""
        are = f"{len(without):,} of {count:,} different captions have"
        return f'preserve.trigger={self.trigger}: {are} no such word, as "{example}"; what the model draws for these is itself preserved'

    def conditioning(self, batch: NoisedBatch, captions: Sequence[str], prompt_encoder: PromptEncoder) -> Conditioning | None:
        """The class captions of a batch with these captions; the empty caption where there is no trigger; None without a weight."""
        if self.rewrite:
            return batch.conditioned_on(*prompt_encoder.encode([self.rewrite(caption) for caption in captions]))
        return batch.null_conditioning(prompt_encoder.empty) if self.weight else None


def preservation_loss(model: torch.nn.Module, batch: NoisedBatch, guidance: Tensor | float, conditioning: Conditioning) -> Tensor:
    """The prediction for class captions against that of the model without its LoRA, through which no gradient flows; in float32.

    Noised pictures, times and guidance inputs (a number or (B,)) are those of the arm's loss. Two forward passes a step and one backward besides.
    It is ai-toolkit's differential output preservation, and with the empty caption its blank prompt preservation (https://github.com/ostris/ai-toolkit,
    `diff_output_preservation` and `blank_prompt_preservation`, 2025).
    """
    with torch.no_grad(), lora.switched_off(model):
        kept = flux1.predict(model, batch.x_t, batch.t, conditioning, guidance).float()
    return mse_loss(flux1.predict(model, batch.x_t, batch.t, conditioning, guidance).float(), kept)
