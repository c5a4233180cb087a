"""Several rewards behind one call: the same latents, scored by name, and how far each agrees with the oracle.

python examples/rewards.py
"""

import torch
from diffusers import StableDiffusion3Pipeline

from dinalrm_align import load_reward
from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.models.specs import MODELS

spec = MODELS["shapes"]  # with the weights at hand: MODELS["sd35"], and names such as pickscore or hpsv3
pipeline = StableDiffusion3Pipeline.from_pretrained(spec.pipeline)
pipeline.set_progress_bar_config(disable=True)
pipeline.transformer.requires_grad_(False)  # shared weights must be frozen
prompts = read_prompts(spec.heldout_prompts)[:48]


def mean_value(latents, prompts):
    """A reward of your own: a callable over `latents`, or over `images`, which are then decoded for it."""
    return latents.mean((1, 2, 3))


latents = pipeline(
    prompts,
    negative_prompt=[""] * len(prompts),
    num_inference_steps=spec.num_steps,
    guidance_scale=spec.guidance_scale,
    max_sequence_length=spec.text_length,
    height=spec.height,
    width=spec.width,
    generator=torch.Generator().manual_seed(0),
    output_type="latent",
).images

scores = {}
for name in ("oracle", "dinalrm", "pixel", "dinalrm + 0.2*pixel", mean_value):
    reward = load_reward(name, spec=spec, pipeline=pipeline)
    label = name if isinstance(name, str) else name.__name__
    with torch.no_grad():
        scores[label] = reward(latents, prompts=prompts, sigma=0.4, generator=torch.Generator().manual_seed(1))
    rank = torch.corrcoef(torch.stack([scores["oracle"], scores[label]]).argsort().argsort().float())[0, 1]
    print(
        f"{label}: mean {scores[label].mean():.3f}, first three {[round(x, 3) for x in scores[label][:3].tolist()]}, "
        f"rank correlation with the oracle {rank:.2f}, differentiable {reward.differentiable}"
    )
