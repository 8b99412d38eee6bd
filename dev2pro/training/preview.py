"""Samples preview images during training: a contact sheet for a few held-out captions at every held-out measurement."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from dev2pro import contact_sheet
from dev2pro.artifacts import record
from dev2pro.models import flow_matching, flux1, sampling
from dev2pro.models.encodings import EncodedBatch, PromptEncoder
from dev2pro.models.flux1 import Conditioning, ModelConfig
from dev2pro.models.vae import decode
from dev2pro.training import checkpoint_files
from dev2pro.training.distributed import HardwareConfig

ACROSS = 4  # pictures side by side
SIDES = (256, 192, 128, 96, 64)  # pixels of a picture's longer side: the largest with which the sheet has at most BYTES
BYTES, QUALITY = 200_000, 85


@dataclass(slots=True, kw_only=True)
class PreviewConfig:
    """What to sample at every measurement; see conf/."""

    pictures: int  # held-out captions; 0 is off
    steps: int  # of the sampler
    cfg_scale: float  # true CFG, except at the usual guidance, which a distilled model takes in its place


class Preview:
    """Samples a few of the held-out captions, each from its own noise, the same at every step of the training.

    The ranks share the captions, as many each, because a sharded model needs them all in every forward pass: who has too few repeats the last.
    The first one decodes and writes. Between two sheets the VAE is on the CPU.
    """

    def __init__(
        self, config: PreviewConfig, model: ModelConfig, hardware: HardwareConfig, data: EncodedBatch, prompt_encoder: PromptEncoder,
        scheduler: dict, accelerator: Accelerator, *, seed: int, out: str,
    ) -> None:  # fmt: skip
        self.config, self.usual_guidance, self.grid, self.out = config, model.usual_guidance, data.grid, Path(out)
        self.accelerator, self.main = accelerator, accelerator.is_main_process
        count, (tokens, channels) = min(config.pictures, len(data)), data.mean.shape[1:]
        rows = [i * len(data) // count for i in range(count)]  # neighbours are often alike
        self.captions, self.mu = [data.captions[row] for row in rows], flow_matching.shift_mu(tokens, scheduler)
        share = -(-count // accelerator.num_processes)
        numbers = [min(accelerator.process_index * share + i, count - 1) for i in range(share)]  # this rank's pictures
        self.batches: list[tuple[Tensor, Conditioning, Conditioning]] = []  # noise, conditioning, null conditioning
        for first in range(0, share, hardware.micro_batch):
            chunk = numbers[first : first + hardware.micro_batch]
            noise = torch.stack([sampling.initial_noise(seed, 0, i, (tokens, channels)) for i in chunk]).to(data.mean)
            prompt, pooled = (empty.expand(len(chunk), *empty.shape) for empty in prompt_encoder.empty)
            of_chunk = [rows[i] for i in chunk]
            conditioning = flux1.build_conditioning(data.prompt[of_chunk], data.pooled[of_chunk], data.grid)
            self.batches.append((noise, conditioning, flux1.build_conditioning(prompt, pooled, data.grid)))
        self.vae = flux1.load_vae(model, prompt_encoder.dtype) if count and self.main else None

    def draw(self, transformer: torch.nn.Module, step: int, guidance: float) -> None:
        """Writes previews/<step>.jpg into `out`. Step 0 starts a new run and first removes previews of an earlier, unfinished one."""
        if step == 0 and self.main:
            for old in (self.out / record.PREVIEWS).glob("[0-9]*.jpg"):
                old.unlink()
        cfg_scale = 1.0 if guidance == self.usual_guidance else self.config.cfg_scale
        if not self.batches:
            return
        latents = [
            sampling.sample(transformer, *batch, guidance=guidance, cfg_scale=cfg_scale, steps=self.config.steps, mu=self.mu)
            for batch in self.batches
        ]
        gathered = self.accelerator.gather(torch.cat(latents))[: len(self.captions)]
        if self.vae:
            label = f"guidance {guidance:g}" + (f", true CFG {cfg_scale:g}" if cfg_scale != 1 else "")
            self._write(step, sheet(f"step {step}, {label}", self.captions, self._decode(self.vae, gathered)))

    def _decode(self, vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
        """Decodes one image at a time, to fit into memory beside the trained model."""
        vae.to(latents.device)
        pixels = [(decode(vae, image, self.grid)[0].float() * 255).round().byte().cpu() for image in latents.split(1)]
        vae.to("cpu")
        return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]

    def _write(self, step: int, data: bytes) -> None:
        partial, whole = self.out / "preview.partial", self.out / record.PREVIEWS / f"{step:06d}.jpg"
        whole.parent.mkdir(exist_ok=True)
        partial.write_bytes(data)
        checkpoint_files.fsync_paths(partial)
        partial.rename(whole)


def sheet(title: str, captions: Sequence[str], pictures: Sequence[Image.Image]) -> bytes:
    """A JPEG of pictures under their captions, ACROSS in a row, of up to BYTES bytes."""
    for side in SIDES:
        rows = [slice(first, first + ACROSS) for first in range(0, len(pictures), ACROSS)]
        strips = [contact_sheet.contact_sheet("" if row.start else title, captions[row], [("", pictures[row])], side) for row in rows]
        file = io.BytesIO()
        contact_sheet.stack_vertically(strips).save(file, "JPEG", quality=QUALITY)
        if file.tell() <= BYTES:
            break
    return file.getvalue()
