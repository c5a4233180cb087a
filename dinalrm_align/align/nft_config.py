"""Settings of DiffusionNFT, which contrasts good and bad samples, and of `recipes/nft_sd35.py`. Torch-free.

The defaults suit the embedded world. `recipes/nft_sd35.yaml` has those of public runs on SD3.5-Medium.
"""

from dataclasses import dataclass, field

from dinalrm_align.align.config import AlignRun, GroupRolloutConfig
from dinalrm_align.train import settings
from dinalrm_align.train.config import LoopConfig, OptimConfig


@dataclass
class NftConfig(GroupRolloutConfig):
    """DiffusionNFT: a rollout of groups of samples, reused for updates on the forward process.

    The sampling policy v_old, which draws the rollouts, is a moving average of the trained policy v.

    Args:
        num_steps: denoising steps of the rollout; by default the model's own number.
        levels: noise levels at which each sample is trained per epoch.
        earliest: first of the rollout's steps whose levels are drawn, as a fraction of num_steps; 0: pure noise.
        latest: end of this range of steps, as a fraction of num_steps; 1: the last step.
        beta: distance of the implicit good and bad policies from the sampling policy: v_old +- beta (v - v_old).
        kl_beta: weight of the mean squared difference of the policy's and the base model's velocities.
        old_slope: before rollout k the sampling policy is averaged with the trained one, with decay min(old_slope k,
            old_limit); 0: it equals the trained policy.
        old_limit: largest decay of this average.
    """

    num_steps: settings.PositiveInt | None = 8
    levels: settings.PositiveInt = 2
    earliest: settings.ClosedUnitInterval = 0.0
    latest: settings.ClosedUnitInterval = 1.0
    beta: settings.PositiveFloat = 1.0
    kl_beta: settings.NonNegativeFloat = 1.0
    old_slope: settings.NonNegativeFloat = 0.001
    old_limit: settings.HalfOpenUnitInterval = 0.5

    def __post_init__(self) -> None:
        self.check("nft")
        if self.earliest >= self.latest:
            raise ValueError(f"nft.earliest: got {self.earliest}; expected less than nft.latest, {self.latest}")


@dataclass
class NftRun(AlignRun):
    """Settings of `recipes/nft_sd35.py`.

    Args:
        nft: DiffusionNFT.
    """

    gradient_checkpointing: bool = False
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=8e-4))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=20))
    nft: NftConfig = field(default_factory=NftConfig)
