"""Score a pipeline's own latents: no picture is decoded, the base weights are shared.

python examples/score_latents.py
"""

import torch
from diffusers import StableDiffusion3Pipeline

from dinalrm_align import LatentReward
from dinalrm_align.models.specs import MODELS

spec = MODELS["shapes"]  # with the weights at hand: MODELS["sd35"], or your own folders
pipeline = StableDiffusion3Pipeline.from_pretrained(spec.pipeline)
pipeline.transformer.requires_grad_(False)  # shared weights must be frozen
reward = LatentReward.from_pretrained(spec.reward, pipeline=pipeline)

prompts = ["a small red circle left of a large blue square on gray", "three small green crosses on black"]
latents = pipeline(
    prompts,
    negative_prompt=["", ""],
    num_inference_steps=spec.num_steps,
    guidance_scale=spec.guidance_scale,
    max_sequence_length=spec.text_length,
    height=spec.height,
    width=spec.width,
    generator=torch.Generator().manual_seed(0),
    output_type="latent",
).images

with torch.no_grad():
    for sigma in (0.1, 0.4, 0.7, (0.2, 0.5, 0.7)):  # the last is the multi-noise ensemble
        right = reward(latents, prompts, sigma=sigma, generator=torch.Generator().manual_seed(1))
        swapped = reward(latents, prompts[::-1], sigma=sigma, generator=torch.Generator().manual_seed(1))
        print(f"sigma {sigma}: own prompts {right.tolist()}, swapped prompts {swapped.tolist()}")
