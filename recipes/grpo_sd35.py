"""Flow-GRPO: align Stable Diffusion 3.5 Medium, or the small embedded world, by policy gradients on a latent reward.

    python recipes/grpo_sd35.py --reward dinalrm              SD3.5-M if its weights are at hand, else the small world
    python recipes/grpo_sd35.py --grpo.window all --grpo.sampler flow_sde --grpo.shared_start false       every step
    python recipes/grpo_sd35.py --resume runs/grpo_shapes_dinalrm_seed0

Each rollout takes a group of samples for every prompt. Within a window of steps the flow is made stochastic, so that a
sample's way has a probability; the reward scores the final latents; and what scores above its group is made more
probable, what scores below less (arXiv 2505.05470). No gradient passes through the reward: any will do, and one that
reads latents needs no decoder. A group shares the reward's noise, so that samples are compared, not draws.

The variants are settings. Where the window lies: all steps, a random few (Flow-GRPO-Fast), or moving as training goes
(MixGRPO, --grpo.window progressive). How a step is drawn: flow_sde or flow_cps. What keeps the policy near
its beginnings: --grpo.clip_range, --grpo.guard true (GRPO-Guard), --grpo.kl_beta. With a weighted sum of rewards
(--reward "dinalrm + 0.2*pickscore"), --grpo.advantage_of parts normalises each by itself; --anchor.reward pickscore
--anchor.every 4 asks the second one at every fourth rollout alone.

A run leaves what recipes/refl_sd35.py leaves: config.yaml, metrics.jsonl, curves.png, pictures, lora/, checkpoints/ and
summary.json. In the metrics reward_noise_variance is what separate draws of the reward's noise would have added to
group_variance, ratio_spread how far probabilities moved since the rollout. A run whose first ratio is not 1 stops.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.resolve import Resolved, resolve
from dinalrm_align.train.command import refusing


def align(resolved: Resolved[GrpoRun]) -> None:
    from dinalrm_align.align.grpo import Grpo
    from dinalrm_align.align.setup import prepare
    from dinalrm_align.flow.sampling import named_sigmas

    run, config = resolved.run, resolved.run.grpo
    setup = prepare(resolved, anchor=run.anchor, in_advantages=True)
    num_steps = config.num_steps or resolved.spec.num_steps
    sampler = setup.sampler(named_sigmas(config.schedule, setup.pipeline.scheduler, num_steps), config.guidance_scale)
    grpo = Grpo(sampler, setup.reward, config, setup.anchor)
    setup.align(grpo, samples=config.groups, state=grpo.buffer)  # the current rollout is stored in the checkpoints


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(resolve(GrpoRun, __doc__, Path(__file__), sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
