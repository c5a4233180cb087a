"""LPO: align Stable Diffusion 3.5 Medium, or the embedded world, by preferences between single denoising steps.

    python recipes/lpo_sd35.py --reward dinalrm               SD3.5-M if its weights are found, else the embedded world
    python recipes/lpo_sd35.py --lpo.candidates 8 --lpo.threshold "[0.2, 0.4]"     more candidates, clearer preferences
    python recipes/lpo_sd35.py --resume runs/lpo_shapes_dinalrm_seed0

At every sampling step the policy draws several candidates for the next noisy latents, and the reward scores the
candidates at their noise level. If the scores of the best and the worst candidate differ enough, the two form a pair.
Relative to the reference model, the policy learns to make the best candidate more probable and the worst less probable
(arXiv 2502.01051). Sampling continues from a random candidate. No image is finished or decoded.

LPO needs a reward that reads noisy latents, as DiNa-LRM does; image rewards cannot be used. The original method is for
UNets and DDIM, and its authors' SD3 version was not released. This recipe uses the stochastic step of a flow
(Flow-SDE). The threshold for a pair increases with the noise that the step adds.

A run writes the same files as recipes/refl_sd35.py. Metrics: `pairs`, the number of pairs in a rollout; `pairs_kept`,
the share of sampling steps that gave a pair; `preference`, the mean margin (see `LpoConfig.threshold`) over
all steps; `accuracy`, the share of pairs that the policy ranks like the reward.
"""

from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.resolve import Resolved, resolve
from dinalrm_align.train.command import refuse, refusing


def align(resolved: Resolved[LpoRun]) -> None:
    from dinalrm_align.align.lpo import Lpo
    from dinalrm_align.align.setup import prepare

    run, config = resolved.run, resolved.run.lpo
    setup = prepare(resolved)
    if setup.reward.reads_images or not setup.reward.noise_parts:
        refuse(f"reward: got {run.reward}; LPO needs a reward that reads noisy latents, as dinalrm")
    sampler = setup.sampler(setup.sigmas(config.num_steps, config.schedule), config.guidance_scale)
    lpo = Lpo(sampler, setup.reward, config)
    shown = ("accuracy", "pairs", "gold", "kl")
    reuse = config.epochs * config.minibatches
    # its pairs are stored in checkpoints
    setup.align(lpo, samples=config.batch_size, state=lpo.buffer, shown=shown, reuse=reuse, no_signal=lpo.no_signal)


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(resolve(LpoRun, __doc__, Path(__file__), argv))


if __name__ == "__main__":
    main()
