"""Reward-guided sampling in diffusers: beside plain sampling, a random direction of equal norm, and best of four.

python examples/reward_guided_sampling.py [CAPTIONS]

The oracle, which guidance does not see, scores samples of held-out captions (by default the first 64), two for each.
All rows start from the same noise and take equal steps. Gains over plain sampling are paired by caption, with 95 %
intervals. The guidance has its default strength, that of arXiv 2608.03929, which was not chosen on these captions.
"""

import sys
import time
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import make_image_grid
from scipy.stats import t

import dinalrm_align
from dinalrm_align import load_reward
from dinalrm_align.adapters.diffusers import RewardGuidance, best_of

shapes = Path(dinalrm_align.__file__).parent / "shapes"  # the embedded world
pipeline = StableDiffusion3Pipeline.from_pretrained(shapes / "weights" / "pipeline")
pipeline.set_progress_bar_config(disable=True)
pipeline.transformer.requires_grad_(False)  # shared weights must be frozen
reward = load_reward(f"dinalrm={shapes / 'weights' / 'dinalrm'}", pipeline=pipeline)  # with SD3.5-M: "dinalrm"
oracle = load_reward("oracle", pipeline=pipeline)
captions = (shapes / "prompts" / "heldout.txt").read_text().splitlines()[: int((sys.argv[1:] or [64])[0])]
prompts = captions * 2


class RandomDirection:
    """A control: its gradient is new noise at every step, to which the guidance gives the norm of the reward's."""

    generator = torch.Generator().manual_seed(1)

    def score_noisy(self, latents, sigma, prompts):
        return (latents * torch.randn(latents.shape, generator=self.generator)).sum((1, 2, 3))


def options():
    sizes = dict(num_inference_steps=12, guidance_scale=3.0, max_sequence_length=16, height=64, width=64)
    noise = torch.Generator().manual_seed(0)
    return dict(negative_prompt=[""] * len(prompts), generator=noise, output_type="latent", **sizes)


def sample(guidance=None):
    return pipeline(prompts, callback_on_step_end=guidance, **options()).images


samplers = {
    "plain": sample,
    "guided by the reward": lambda: sample(RewardGuidance(reward)),
    "guided by random directions": lambda: sample(RewardGuidance(RandomDirection())),
    "best of 4 by the reward": lambda: best_of(4, pipeline, reward, prompts, **options())[0],
}
print("| sampling | oracle | gain [95 % interval] | reward | CPU seconds |\n|---|---:|---:|---:|---:|")
plain, images, shown = None, [], min(8, len(captions))
for name, draw in samplers.items():
    start = time.process_time()
    latents = draw()
    seconds = time.process_time() - start
    with torch.no_grad():
        score = reward(latents, prompts).mean()
        gold = oracle(latents, prompts).view(2, -1).mean(0)  # (captions,)
        first = latents[:shown] / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        images += pipeline.image_processor.postprocess(pipeline.vae.decode(first).sample)
    plain = gold if plain is None else plain
    gains = gold - plain
    half = t.ppf(0.975, len(gains) - 1) * gains.std() / len(gains) ** 0.5
    gain = "" if gold is plain else f"{gains.mean():+.3f} [{gains.mean() - half:+.3f}, {gains.mean() + half:+.3f}]"
    print(f"| {name} | {gold.mean():.3f} | {gain} | {score:.2f} | {seconds:.0f} |", flush=True)
path = Path("runs") / "reward_guided_sampling.png"
path.parent.mkdir(exist_ok=True)
make_image_grid(images, len(samplers), shown).save(path)
print(f"\nThe first {shown} captions, one row of images per row of the table: {path}")
