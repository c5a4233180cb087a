"""DiffusionNFT: align Stable Diffusion 3.5 Medium, or the embedded world, by contrasting good and bad samples.

    python recipes/nft_sd35.py --reward dinalrm               SD3.5-M if its weights are found, else the embedded world
    python recipes/nft_sd35.py --model sd35 --config recipes/nft_sd35_flow_factory.yaml        Flow-Factory's settings
    python recipes/nft_sd35.py --resume runs/nft_shapes_dinalrm_seed0

Each rollout draws a group of samples for every prompt, and the reward decides how much each sample counts as good and
how much as bad. The samples are then noised as in pretraining. For velocities v (trained policy) and v_old (sampling
policy), v_old + beta (v - v_old) is fitted to good samples, v_old - beta (v - v_old) to bad ones (arXiv 2509.16117).
Training needs no reward gradient and no log-probabilities. With a latent reward it needs no decoder.

A run writes the same files as recipes/refl_sd35.py. Metrics: `moved`, the mean squared difference between the velocity
of the trained policy and that of the policy that drew the samples.
"""

from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.resolve import Resolved, resolve
from dinalrm_align.train.command import refusing


def align(resolved: Resolved[NftRun]) -> None:
    from dinalrm_align.align.nft import Nft
    from dinalrm_align.align.setup import prepare

    config = resolved.run.nft
    setup = prepare(resolved)
    sampler = setup.sampler(setup.sigmas(config.num_steps, config.schedule), config.guidance_scale)
    nft = Nft(sampler, setup.reward, config)
    reuse = config.epochs * config.minibatches
    # the old policy and its samples are stored in the checkpoints
    setup.align(nft, samples=config.groups, state=nft, reuse=reuse, no_signal=nft.no_signal)


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(resolve(NftRun, __doc__, Path(__file__), argv))


if __name__ == "__main__":
    main()
