"""Several rewards behind one call: the same latents scored by each, and their rank correlation with the oracle.

python examples/rewards.py
"""

from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

import dinalrm_align
from dinalrm_align import load_reward

shapes = Path(dinalrm_align.__file__).parent / "shapes"  # the embedded world
pipeline = StableDiffusion3Pipeline.from_pretrained(shapes / "weights" / "pipeline")
pipeline.set_progress_bar_config(disable=True)
pipeline.transformer.requires_grad_(False)  # shared weights must be frozen
prompts = (shapes / "prompts" / "heldout.txt").read_text().splitlines()[:48]


def mean_value(latents, prompts):
    """A reward of your own: a callable over `latents`, or over `images`, for which latents are decoded."""
    return latents.mean((1, 2, 3))


latents = pipeline(
    prompts,
    negative_prompt=[""] * len(prompts),
    num_inference_steps=12,
    guidance_scale=3.0,
    max_sequence_length=16,
    height=64,
    width=64,
    generator=torch.Generator().manual_seed(0),
    output_type="latent",
).images

dinalrm = f"dinalrm={shapes / 'weights' / 'dinalrm'}"  # NAME=SOURCE; with SD3.5-M "dinalrm" alone
rewards = {"oracle": "oracle", "dinalrm": dinalrm, "pixel": "pixel", "sum": f"{dinalrm} + 0.2*pixel", "own": mean_value}
scores = {}
for name, source in rewards.items():
    reward = load_reward(source, pipeline=pipeline)
    with torch.no_grad():
        scores[name] = reward(latents, prompts, sigma=0.4, generator=torch.Generator().manual_seed(1))
    rank = torch.corrcoef(torch.stack([scores["oracle"], scores[name]]).argsort().argsort().float())[0, 1]
    print(
        f"{name}: mean {scores[name].mean():.3f}, first three {[round(x, 3) for x in scores[name][:3].tolist()]}, "
        f"rank correlation with the oracle {rank:.2f}, differentiable {reward.differentiable}"
    )
