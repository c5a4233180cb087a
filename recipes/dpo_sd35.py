"""Diffusion-DPO: align Stable Diffusion 3.5 Medium, or the embedded world, on pairs of images.

    python recipes/dpo_sd35.py --reward dinalrm               SD3.5-M if its weights are found, else the embedded world
    python recipes/dpo_sd35.py --dpo.mode offline --pairs FOLDER        pairs from a data set
    python recipes/dpo_sd35.py --resume runs/dpo_shapes_dinalrm_seed0

Direct preference optimisation (arXiv 2311.12908) for flow matching. Both images of a pair are noised with the same
noise to the same level. Relative to the reference model, the policy learns to denoise the chosen image better and the
rejected image worse. The reward only ranks samples, so it needs no gradient.

In online mode, each update samples several images per prompt; the best and worst by reward form a pair. After every
--dpo.refresh_every updates, the policy becomes the reference. In offline mode, pairs come from a data set: latents from
`python recipes/mine_pairs.py`, a folder of latent pairs, a jsonl file of image paths, or parquet as in verl-omni.

A run writes the same files as recipes/refl_sd35.py. Metrics: `implicit_accuracy`, the share of pairs that DPO's
implicit reward ranks like the label.
"""

from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.resolve import Resolved, resolve
from dinalrm_align.train.command import refusing


def align(resolved: Resolved[DpoRun]) -> None:
    from dinalrm_align.align.dpo import OfflineDpo, OnlineDpo
    from dinalrm_align.align.setup import prepare
    from dinalrm_align.data.source import Encoders, open_pairs

    run, dpo, spec = resolved.run, resolved.run.dpo, resolved.spec
    setup = prepare(resolved)
    sampler = setup.sampler(setup.sigmas(dpo.num_steps), dpo.guidance_scale)
    samples = dpo.batch_size * run.loop.accumulate

    if dpo.mode == "offline":
        # Latents and embeddings are stored with the pairs; images of a jsonl are encoded when their batch is read.
        encoders = Encoders(
            spec.pipeline, text_length=spec.text_length, device=setup.accelerator.device,
            dtype=setup.policy.transformer.dtype,
        )  # fmt: skip
        order = dict(batch_size=dpo.batch_size, seed=run.seed, on_bad=run.on_bad)
        pairs = open_pairs(run.pairs, encoders.manifest(), encoders, size=setup.size, **order)
        setup.accelerator.print(f"pairs: {run.pairs}, {len(pairs)} batches of {dpo.batch_size}")
        shown = ("loss", "implicit_accuracy", "gold", "kl")
        setup.align(OfflineDpo(sampler, pairs, dpo), samples=samples, shown=shown, data={"pairs": pairs.digest()})
    else:
        method = OnlineDpo(sampler, setup.reward, dpo)
        # the refreshed reference is stored in the checkpoints
        setup.align(method, samples=samples, state=method, no_signal=method.no_signal)


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(resolve(DpoRun, __doc__, Path(__file__), argv))


if __name__ == "__main__":
    main()
