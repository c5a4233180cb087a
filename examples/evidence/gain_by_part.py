"""What a gain in the embedded world is made of: the oracle's parts with and without a LoRA, at guidance 1.2 and 3.

A run reports the parts at its own guidance, 1.2, in summary.json.

python examples/evidence/gain_by_part.py runs/refl_shapes_dinalrm_seed0/lora      # the main job's LoRA
python examples/evidence/gain_by_part.py                                          # the base model alone
"""

import argparse

import torch
from diffusers import StableDiffusion3Pipeline

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.models.specs import MODELS
from dinalrm_align.shapes.oracle import oracle_score

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("lora", nargs="?", help="folder of a LoRA; without it, the base model is scored")
parser.add_argument("--samples", type=int, default=192, help="by default those of a run's evaluation, 192")
arguments = parser.parse_args()
LORA, SAMPLES = arguments.lora, arguments.samples
BATCH, SEED = 64, 1234  # SEED: of the noise of a run's default evaluation

spec = MODELS["shapes"]
pipeline = StableDiffusion3Pipeline.from_pretrained(spec.pipeline)
pipeline.set_progress_bar_config(disable=True)
captions = read_prompts(spec.heldout_prompts)


@torch.no_grad()
def score(guidance_scale: float) -> dict[str, torch.Tensor]:
    """The oracle's score, "gold", and its parts for all samples, each (SAMPLES,)."""
    batches = []
    for start in range(0, SAMPLES, BATCH):
        indices = range(start, min(start + BATCH, SAMPLES))
        prompts = [captions[index % len(captions)] for index in indices]
        latents = pipeline(
            prompts,
            negative_prompt=[""] * len(prompts),
            num_inference_steps=spec.num_steps,
            guidance_scale=guidance_scale,
            max_sequence_length=spec.text_length,
            height=spec.height,
            width=spec.width,
            latents=seeded_noise((16, 16, 16), [seeded_generator(SEED, index) for index in indices]),
            output_type="latent",
        ).images
        images = decode_latents(pipeline.vae, latents)
        parts = {}
        batches.append({"gold": oracle_score(images, prompts, parts), **parts})
    return {part: torch.cat([batch[part] for batch in batches]) for part in batches[0]}


scales = (spec.guidance_scale, 3.0)
base = {scale: score(scale) for scale in scales}
if LORA:
    pipeline.load_lora_weights(LORA)
for scale in scales:
    aligned = score(scale) if LORA else base[scale]
    for part in base[scale]:
        gain = aligned[part] - base[scale][part]
        error = gain.std() / SAMPLES**0.5
        print(
            f"guidance {scale:g}, {part}: base {base[scale][part].mean():.3f}, gain {gain.mean():+.3f}, "
            f"standard error {error:.3f}"
        )
