"""ReFL: align Stable Diffusion 3.5 Medium, or the embedded world, to a differentiable reward.

    python recipes/refl_sd35.py --reward dinalrm              SD3.5-M if its weights are found, else the embedded world
    python recipes/refl_sd35.py --reward pixel --seed 1       a CLIP-style reward on decoded images
    python recipes/refl_sd35.py --resume runs/refl_shapes_dinalrm_seed0

Each update samples without gradient to a random step (--refl.earliest: of the last quarter for SD3.5, any in the
embedded world), takes one step with gradient, and maximises the reward of the predicted clean latents (arXiv
2304.05977; --refl.grad_steps K is DRaFT-K). As in the DiNa-LRM paper (arXiv 2602.11146), a latent reward needs no VAE
in the graph. Variants: --refl.variant draft_lv (arXiv 2309.17400), drtune (2405.00760) and direct_align (2509.06942,
without a VAE).

A run writes config.yaml, metrics.jsonl, curves.png, grid_*.png, before_after.png, lora/, checkpoints/ and summary.json.
The grids show the same prompts and seeds over training. StableDiffusion3Pipeline.load_lora_weights reads lora/.
"""

from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import Resolved, resolve
from dinalrm_align.train.command import refusing


def align(resolved: Resolved[ReflRun]) -> None:
    import torch

    from dinalrm_align.align.refl import Refl
    from dinalrm_align.align.setup import prepare
    from dinalrm_align.data.prompts import read_captioned_images
    from dinalrm_align.models.pipeline import encode_images
    from dinalrm_align.train.digest import digest

    run, refl = resolved.run, resolved.run.refl
    images, captions = read_captioned_images(Path(refl.pretrain_images)) if refl.pretrain_images else ([], [])
    setup = prepare(resolved, extra_prompts=captions)
    method = Refl(setup.sampler(setup.sigmas(refl.num_steps), refl.guidance_scale), setup.reward, refl, setup.anchor)
    if images:  # data of the pretraining loss
        height, width = setup.size
        vae = setup.pipeline.vae
        latents = torch.cat([encode_images(vae, [image.resize((width, height))]).cpu() for image in images])
        method.pretrain_data = latents, setup.text.extra
    elif refl.pretrain_weight > 0:
        method.pretrain_data = method.reference_samples(refl.pretrain_samples)

    data = {"pretraining images": digest({" ".join(captions): method.pretrain_data[0]})[:16]} if images else None
    method.measure(resumed=resolved.checkpoint is not None)
    stored = refl.kl_unit == "reward_std"  # a resumed run keeps the number in its checkpoint
    if method.reward_std is not None:
        setup.accelerator.print(f"reward_std {method.reward_std:.6g}: KL weight {method.kl_weight:.6g}")
    samples = refl.batch_size * run.loop.accumulate // refl.steps_per_rollout
    setup.align(
        method, samples=samples, data=data, no_signal=method.no_signal,
        state=method if stored else None,
        facts=lambda: {"reward_std": method.reward_std, "kl_weight": method.kl_weight} if stored else {},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(resolve(ReflRun, __doc__, Path(__file__), argv, gradient=True))


if __name__ == "__main__":
    main()
