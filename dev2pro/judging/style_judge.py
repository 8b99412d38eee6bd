"""DINOv2 as the judge of what pictures look like: style similarity, diversity, memorisation and KID. Prompts are the CLIP judge's."""

from typing import Any

import torch
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Model

from dev2pro.judging.judge import ImageJudge, check_complete


class StyleJudge(ImageJudge):
    """A DINOv2 model (Oquab et al. 2023, https://arxiv.org/abs/2304.07193) in a folder or on the hub, such as facebook/dinov2-base.

    An embedding is the class token after the last layer norm, as the paper's retrieval and nearest-neighbour results use it, DreamBooth's
    image similarity does for DINO (Ruiz et al. 2022, https://arxiv.org/abs/2208.12242), and the distances between sets of pictures that
    agree best with people (Stein et al. 2023, https://arxiv.org/abs/2306.04675). The patches' mean is left out.
    """

    setting, kind, model_class, example = "style_judge", "DINOv2", "Dinov2Model", "facebook/dinov2-base"

    def _load(self, path: str, device: torch.device) -> None:
        options = {"use_safetensors": True, "ignore_mismatched_sizes": True}  # the second reports them, for the check below
        dino, info = Dinov2Model.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **options)
        self.dino = dino.to(device).eval()
        self.processor = BitImageProcessorPil.from_pretrained(path)
        check_complete(info)

    def _features(self, pixels: Tensor) -> Any:
        return self.dino(pixels)
