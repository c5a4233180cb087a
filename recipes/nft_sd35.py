"""DiffusionNFT: align Stable Diffusion 3.5 Medium, or the small embedded world, by contrast of good and bad samples.

    python recipes/nft_sd35.py --reward dinalrm               SD3.5-M if its weights are at hand, else the small world
    python recipes/nft_sd35.py --nft.levels 4 --nft.latest 0.5            four noise levels a sample, the noisier half
    python recipes/nft_sd35.py --resume runs/nft_shapes_dinalrm_seed0

Each rollout takes a group of samples for every prompt, and the reward says which are good for their group. Then each
sample is noised, as in pretraining: a policy moved towards the trained one is to denoise what is good, one moved the
other way what is bad (arXiv 2509.16117). No gradient passes through the reward, and nothing is known of the sampler's
steps: clean latents and their scores are all it takes, and a latent reward gives both without a decoder.

A run leaves what recipes/refl_sd35.py leaves: config.yaml, metrics.jsonl, curves.png, pictures, lora/, checkpoints/ and
summary.json. In the metrics moved is how far the policy is from the one that sampled.
"""

import sys
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
    nft = Nft(setup.sampler(setup.sigmas(config.num_steps), config.guidance_scale), setup.reward, config)
    setup.align(nft, samples=config.groups, state=nft)  # the old policy and its samples are stored in the checkpoints


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(resolve(NftRun, __doc__, Path(__file__), sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
