"""Score a pipeline's own latents at several noise levels. No image is decoded; the base weights are shared.

python examples/score_latents.py
"""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

import dinalrm_align
from dinalrm_align import LatentReward

# The embedded world's weights. For SD3.5-M: "stabilityai/stable-diffusion-3.5-medium" and
# "liuhuohuo/DiNa-LRM-SD35M-12layers", 40 steps, guidance 4.5, and sizes of your choice.
weights = Path(dinalrm_align.__file__).parent / "shapes" / "weights"
pipeline = StableDiffusion3Pipeline.from_pretrained(weights / "pipeline")
pipeline.transformer.requires_grad_(False)  # shared weights must be frozen
reward = LatentReward.from_pretrained(weights / "dinalrm", pipeline=pipeline)

prompts = ["a small red circle left of a large blue square on gray", "three small green crosses on black"]
latents = pipeline(
    prompts,
    negative_prompt=["", ""],
    num_inference_steps=12,
    guidance_scale=3.0,
    max_sequence_length=reward.config.text_length,
    height=64,
    width=64,
    generator=torch.Generator().manual_seed(0),
    output_type="latent",
).images

with torch.no_grad():
    for sigma in (0.1, 0.4, 0.7, (0.2, 0.5, 0.7)):  # the last is the multi-noise ensemble
        own = reward(latents, prompts, sigma=sigma, generator=torch.Generator().manual_seed(1))
        swapped = reward(latents, prompts[::-1], sigma=sigma, generator=torch.Generator().manual_seed(1))
        print(f"sigma {sigma}: own prompts {own.tolist()}, swapped prompts {swapped.tolist()}")
