"""Settings of DiffusionNFT and of `recipes/nft_sd35.py`. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dinalrm_align.align.config import AlignRun, GroupRolloutConfig
from dinalrm_align.train import settings


@dataclass
class NftConfig(GroupRolloutConfig):
    """Settings of DiffusionNFT, which trains on noised good and bad samples with a contrastive loss.

    The sampling policy draws the rollouts. Its weights are a moving average of the trained policy's weights.

    Args:
        num_steps: denoising steps of the rollout; None: the model's own number.
        schedule: noise levels of the rollout: the pipeline's (diffusers), or 1, ..., 1/N, shifted, then 0 (linear).
        levels: number of noise levels per sample and epoch, drawn from those of the steps between earliest and latest.
        earliest: start of the range of steps, as a fraction of num_steps; 0: the first step, pure noise.
        latest: end of the range of steps, as a fraction of num_steps; 1: the last step.
        beta: factor in the implicit good and bad velocities v_old +- beta (v - v_old), where v is the velocity of the
            trained policy and v_old is the velocity of the sampling policy.
        kl_beta: weight of the mean squared difference of the trained policy's and the base model's velocities; 0: the
            base model does not run in training, and the metric kl is absent. The reward enters by normalised
            advantages, so the weight does not depend on the reward's scale.
        keep_equal: also train on groups whose scores are all equal, as DiffusionNFT's public code does. Their samples
            count as half good and half bad; by default updates leave them out.
        old_slope: before rollout k, the moving average is updated with the decay min(old_slope k, old_limit). With
            old_slope 0, every rollout samples from the trained policy.
        old_limit: largest decay of the moving average.
    """

    MAY_CHANGE: ClassVar = ("beta", "kl_beta", "old_slope", "old_limit")
    num_steps: settings.PositiveInt | None = None
    schedule: Literal["diffusers", "linear"] = "diffusers"
    levels: settings.PositiveInt = 1
    earliest: settings.ClosedUnitInterval = 0.0
    latest: settings.ClosedUnitInterval = 1.0
    beta: settings.PositiveFloat = 1.0
    kl_beta: settings.NonNegativeFloat = 1e-4
    keep_equal: bool = False
    old_slope: settings.NonNegativeFloat = 0.001
    old_limit: settings.HalfOpenUnitInterval = 0.5

    def __post_init__(self) -> None:
        self.check("nft")
        if self.earliest >= self.latest:
            raise ValueError(f"nft.earliest: got {self.earliest}; expected less than nft.latest, {self.latest}")

    def trained_steps(self, num_steps: int) -> range:
        """Return the steps, of `num_steps` in a rollout, whose levels are trained. Raises ValueError if it is short."""
        steps = range(int(self.earliest * num_steps), round(self.latest * num_steps))
        if len(steps) < self.levels:
            raise ValueError(
                f"nft.levels: got {self.levels}; expected at most the {len(steps)} steps {steps.start} ... "
                f"{steps.stop - 1} of {num_steps} between nft.earliest and nft.latest"
            )
        return steps


@dataclass
class NftRun(AlignRun):
    """Settings of `recipes/nft_sd35.py`.

    Args:
        nft: settings of DiffusionNFT.
    """

    nft: NftConfig = field(default_factory=NftConfig)

    def check_steps(self, num_steps: int) -> None:
        self.nft.trained_steps(self.nft.num_steps or num_steps)

    def graph_images(self, num_steps: int) -> tuple[int, int]:
        return self.nft.micro_batch(self.nft.levels, self.loop.accumulate), 0
