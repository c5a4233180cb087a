"""Flow-GRPO: align Stable Diffusion 3.5 Medium, or the embedded world, by policy gradients on a reward.

    python recipes/grpo_sd35.py --reward dinalrm              SD3.5-M if its weights are found, else the embedded world
    python recipes/grpo_sd35.py --grpo.window all --grpo.sampler flow_sde --grpo.shared_start false       every step
    python recipes/grpo_sd35.py --resume runs/grpo_shapes_dinalrm_seed0

Each rollout draws a group of samples for every prompt. Only the steps in a window are stochastic and therefore have
log-probabilities. The reward scores the final latents. Training makes samples above their group's mean score
more probable, and those below less probable (arXiv 2505.05470). The reward needs no gradient, and a latent reward needs
no decoder. A latent reward adds the same noise to all samples of a group, so that they are compared fairly.

Variants are options. Window: all steps, a random window (Flow-GRPO-Fast), or a moving one (MixGRPO,
--grpo.window progressive). Stochastic step: flow_sde or flow_cps. Constraints: --grpo.clip_range, --grpo.guard true
(GRPO-Guard), --grpo.kl_beta. With a weighted sum of rewards (--reward "dinalrm + 0.2*pickscore"),
--grpo.advantage_of parts normalises each reward separately, and gdpo also their sum (GDPO). --anchor.reward pickscore
--anchor.every 4 adds the advantages of a second reward in every fourth rollout.

A run writes the same files as recipes/refl_sd35.py. Metrics: `group_variance`, the variance of the scores in a group;
`reward_noise_variance`, the variance that would be added if each sample had its own reward noise; `ratio_spread`, the
mean distance of the probability ratios from 1. A run stops with an error if the first ratio after a rollout is not 1.
"""

from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.resolve import Resolved, resolve
from dinalrm_align.train.command import refusing


def align(resolved: Resolved[GrpoRun]) -> None:
    from dinalrm_align.align.grpo import Grpo
    from dinalrm_align.align.setup import prepare

    config = resolved.run.grpo
    setup = prepare(resolved, in_advantages=True)
    sampler = setup.sampler(setup.sigmas(config.num_steps, config.schedule), config.guidance_scale)
    grpo = Grpo(sampler, setup.reward, config, setup.anchor)
    reuse = config.epochs * config.minibatches
    # the current rollout is stored in the checkpoints
    setup.align(grpo, samples=config.groups, state=grpo.buffer, reuse=reuse, no_signal=grpo.no_signal)


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(resolve(GrpoRun, __doc__, Path(__file__), argv))


if __name__ == "__main__":
    main()
