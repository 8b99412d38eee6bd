"""The least that a training can do, as a floor for others: `python -m bench.bare (lora | full) MODEL SIDE BATCH TOKENS STEPS`.

Encodings are there before, the optimizer is fused, nothing is read back from the device, clipped, averaged, logged or saved. Written with
diffusers and peft alone, so that nothing of dev2pro is in it.
"""

import sys

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig

RANK = 8
LAYERS = (
    "attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
)  # fmt: skip
"""What diffusers' script trains by default."""


def main(kind: str, path: str, side: int, batch: int, tokens: int, steps: int) -> None:
    model = FluxTransformer2DModel.from_pretrained(path, subfolder="transformer").train()
    if kind == "lora":
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    across = side // 16
    x0 = torch.randn(batch, across * across, model.config.in_channels)
    prompt, pooled = torch.randn(batch, tokens, model.config.joint_attention_dim), torch.randn(batch, model.config.pooled_projection_dim)
    ids, text_ids = FluxPipeline._prepare_latent_image_ids(1, across, across, "cpu", torch.float32), torch.zeros(tokens, 3)
    guidance = torch.ones(batch)
    for _ in range(steps):
        noise, t = torch.randn_like(x0), torch.rand(batch)
        x_t = torch.lerp(x0, noise, t[:, None, None])
        predicted = model(
            hidden_states=x_t, timestep=t, guidance=guidance, pooled_projections=pooled, encoder_hidden_states=prompt, txt_ids=text_ids,
            img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        torch.nn.functional.mse_loss(predicted, noise - x0).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
