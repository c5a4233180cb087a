"""ReFL: align Stable Diffusion 3.5 Medium, or the small embedded world, to a reward that reads latents.

    python recipes/refl_sd35.py --reward dinalrm              SD3.5-M if its weights are at hand, else the small world
    python recipes/refl_sd35.py --reward pixel --seed 1       the same through the VAE and a CLIP-style reward
    python recipes/refl_sd35.py --resume runs/refl_shapes_dinalrm_seed0

Each update samples without gradient to a random late step, takes one step with gradient, scores the clean latents that
it points to, and climbs the score (arXiv 2304.05977; with --refl.grad_steps K it is DRaFT-K). As in DiNa-LRM's own runs
(arXiv 2602.11146), and unlike the original, the reward reads latents: no VAE is in the graph. Its relatives are
--refl.variant draft_lv (arXiv 2309.17400), drtune (2405.00760) and direct_align (2509.06942, without a VAE).

A run leaves config.yaml, metrics.jsonl, curves.png, grid_*.png of the same prompts and seeds before, during and after,
before_after.png, lora/ for StableDiffusion3Pipeline.load_lora_weights, checkpoints/ and summary.json.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.settle import Settled, settle
from dinalrm_align.train.command import refusing


def align(settled: Settled[ReflRun]) -> None:
    import torch

    from dinalrm_align.align.refl import Refl
    from dinalrm_align.align.setup import Stage
    from dinalrm_align.data.prompts import read_captioned_images
    from dinalrm_align.models.text import Conditions
    from dinalrm_align.models.vae import encode_images

    refl = settled.run.refl
    images, captions = read_captioned_images(Path(refl.pretrain_pictures)) if refl.pretrain_pictures else ([], [])
    stage = Stage.build(settled, also=captions, anchor=settled.run.anchor)
    accelerator, vae = stage.accelerator, stage.pipeline.vae

    method = Refl(
        policy=stage.policy, reward=stage.reward, config=refl, meter=stage.meter, latent_shape=stage.latent_shape,
        sigmas=stage.sigmas(refl.num_steps), guidance_scale=stage.guidance_scale(refl.guidance_scale),
        conditions=stage.conditions, negative=stage.negative,
        seed=settled.run.seed, rank=accelerator.process_index, num_processes=accelerator.num_processes,
    )  # fmt: skip
    if images:  # to keep near, by the base model's own loss
        height, width = stage.size
        latents = torch.cat([encode_images(vae, [image.resize((width, height))]).cpu() for image in images])
        method.pictures = latents, Conditions.encode(stage.encoder, captions)
    elif refl.pretrain_weight > 0:
        method.pictures = method.reference_samples(refl.pretrain_samples)

    stage.align(method, samples=refl.batch_size * settled.run.loop.accumulate)


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(settle(ReflRun, __doc__, Path(__file__), sys.argv[1:] if argv is None else argv, gradient=True))


if __name__ == "__main__":
    main()
