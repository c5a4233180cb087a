"""LPO: align Stable Diffusion 3.5 Medium, or the small embedded world, by preferences between single denoising steps.

    python recipes/lpo_sd35.py --reward dinalrm               SD3.5-M if its weights are at hand, else the small world
    python recipes/lpo_sd35.py --lpo.candidates 8 --lpo.threshold "[0.2, 0.4]"          more to choose from, choosier
    python recipes/lpo_sd35.py --resume runs/lpo_shapes_dinalrm_seed0

At every step of a trajectory a few candidates for the next state are drawn from one state. The reward scores them as
they are, noisy, at their own level; where its preference is clear enough, best and worst make a pair, and the policy is
to make the better one more probable, the worse one less, than the reference does (arXiv 2502.01051). The trajectory
goes on from a candidate at random. So every step is judged by itself, at once, and no picture is finished or decoded.

It takes a reward that reads noisy latents, which is what DiNa-LRM was trained on; one that reads pictures cannot judge
a step. The original is for UNets and DDIM; its authors' run on SD3 was never released, and this is not it: the step is
that of a flow (Flow-SDE), the threshold runs with the noise that such a step injects.

A run leaves what recipes/refl_sd35.py leaves: config.yaml, metrics.jsonl, curves.png, pictures, lora/, checkpoints/ and
summary.json. In the metrics pairs is how many a rollout gave, pairs_kept their share of all, preference how clear they
were, and accuracy the share of pairs that the policy already ranks as the reward does.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.resolve import Resolved, resolve
from dinalrm_align.train.command import refuse, refusing


def align(resolved: Resolved[LpoRun]) -> None:
    from dinalrm_align.align.lpo import Lpo
    from dinalrm_align.align.setup import prepare
    from dinalrm_align.flow.sampling import named_sigmas

    run, config = resolved.run, resolved.run.lpo
    setup = prepare(resolved)
    if setup.reward.reads_images or not setup.reward.noise_parts:
        refuse(f"reward: got {run.reward}; LPO needs a reward that reads noisy latents, as dinalrm")
    num_steps = config.num_steps or resolved.spec.num_steps
    sampler = setup.sampler(named_sigmas(config.schedule, setup.pipeline.scheduler, num_steps), config.guidance_scale)
    lpo = Lpo(sampler, setup.reward, config)
    shown = ("accuracy", "pairs", "gold", "kl")
    setup.align(lpo, samples=config.batch_size, state=lpo.buffer, shown=shown)  # its pairs are stored in checkpoints


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(resolve(LpoRun, __doc__, Path(__file__), sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
