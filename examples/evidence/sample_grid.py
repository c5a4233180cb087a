"""Quality of the embedded world's networks by the oracle: renders, the autoencoder, and the base model's samples.

python examples/evidence/sample_grid.py
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.models.grids import save_grid
from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.models.specs import MODELS
from dinalrm_align.shapes.build import random_images, vae_gate
from dinalrm_align.shapes.oracle import oracle_parts, oracle_score

spec = MODELS["shapes"]
pipeline = StableDiffusion3Pipeline.from_pretrained(spec.pipeline)
pipeline.set_progress_bar_config(disable=True)
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("captions", nargs="?", type=int, default=64, help="number of held-out captions to sample")
parser.add_argument("--images", type=int, default=256, help="number of renders; the autoencoder encodes twice as many")
given = parser.parse_args()
captions = read_prompts(Path(spec.heldout_prompts))[: given.captions]

images, scenes, _ = random_images(given.images, np.random.default_rng(0), spec.height)
faithfulness = oracle_parts(images, [scene.caption for scene in scenes])["faithfulness"].mean()
print(f"rendered images: faithfulness {faithfulness:.3f}")
gate = vae_gate(pipeline.vae.requires_grad_(False), seed=0, number=2 * given.images)
print("autoencoder, correlation of the oracle before and after:", {name: round(gate[name], 3) for name in gate})

for guidance_scale in (1.0, spec.guidance_scale):
    with torch.no_grad():
        latents = pipeline(
            captions,
            negative_prompt=[""] * len(captions),
            num_inference_steps=spec.num_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=spec.text_length,
            height=spec.height,
            width=spec.width,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        samples = decode_latents(pipeline.vae, latents)
    parts = {name: round(value.mean().item(), 3) for name, value in oracle_parts(samples, captions).items()}
    path = Path("runs") / f"samples_guidance_{guidance_scale}.png"
    save_grid(samples, captions, path)
    print(f"guidance {guidance_scale}: oracle {oracle_score(samples, captions).mean():.3f}, {parts}, {path}")
