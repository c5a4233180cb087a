"""Settings of Diffusion-DPO and of `recipes/dpo_sd35.py`. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dinalrm_align.align.config import AlignRun
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.train import settings


@dataclass
class DpoConfig:
    """Diffusion-DPO: denoise the preferred image of a pair better than the rejected one, relative to a reference.

    Args:
        mode: online: each pair is the best and the worst sample of a prompt, ranked by the reward. offline:
            pairs are read from a data set.
        batch_size: prompts per micro-batch and process. A prompt has one pair, or several pairs if the
            data set has ranked lists. An update uses batch_size x loop.accumulate x processes prompts.
        beta: strength of the penalty on leaving the reference. The loss is -log sigmoid(-beta / 2 [(e_w - e_w^ref) -
            (e_l - e_l^ref)]), where e is the mean squared velocity error of the preferred (w) or rejected (l) image.
            Public runs use 100 to 5000. Rewards only rank the samples, so beta does not depend on a reward's scale.
        sigma: distribution from which the noise level of a pair is drawn.
        draws: number of (noise, noise level) draws for each pair of an update; more draws make the gradient less noisy.
        loss_batch: images per forward pass of the loss: as many draws as fit, a divisor of `draws`, are computed at
            once. Affects speed, and results by rounding only. By default one draw at a time.
        loss_guidance_scale: guidance scale of the velocities in the loss; usually 1, which means no guidance.
        group_size: samples per prompt (online only).
        num_steps: denoising steps of the samples (online only); None: the model's own number.
        guidance_scale: guidance scale of the samples (online only); None: the model's own scale.
        sampler: model that draws the samples, policy or reference (online only).
        refresh_every: number of updates after which the current policy replaces the reference (online only); 0: never.
        sample_batch: images sampled and scored at once (online only); by default a whole micro-batch.
        reward_sigma: noise level or levels (an ensemble) at which a latent reward scores (online only); by default the
            reward's own levels.
    """

    MAY_CHANGE: ClassVar = ("batch_size", "beta", "loss_batch", "sample_batch")
    mode: Literal["online", "offline"] = "online"
    batch_size: settings.PositiveInt = 1
    beta: settings.PositiveFloat = 100.0
    sigma: SigmaConfig = field(default_factory=lambda: SigmaConfig(density="logit_normal"))
    draws: settings.PositiveInt = 1
    loss_batch: settings.PositiveInt | None = None
    loss_guidance_scale: settings.NonNegativeFloat = 1.0
    group_size: settings.IntAboveOne = 6
    num_steps: settings.PositiveInt | None = None
    guidance_scale: settings.NonNegativeFloat | None = None
    sampler: Literal["policy", "reference"] = "policy"
    refresh_every: settings.NonNegativeInt = 0
    sample_batch: settings.PositiveInt | None = None
    reward_sigma: list[settings.ClosedUnitInterval] | None = None

    def __post_init__(self) -> None:
        settings.check_fields(self, "dpo")
        settings.check_levels("dpo.reward_sigma", self.reward_sigma)

    def draws_together(self, images: int) -> int:
        """Return the draws per forward pass: the largest divisor of `draws` that fits with `images` images a draw."""
        limit = (self.loss_batch or 1) // images
        return max((count for count in range(1, limit + 1) if self.draws % count == 0), default=1)


@dataclass
class DpoRun(AlignRun):
    """Settings of `recipes/dpo_sd35.py`.

    Args:
        pairs: source of the preference pairs (offline only). A folder written by recipes/mine_pairs.py, a parquet file
            in verl-omni's format, a folder of latent pairs, or a jsonl file whose lines have the keys "prompt",
            "chosen" (path of an image) and "rejected" (path of an image).
        on_bad: action on pairs that cannot be read: refuse (exit) or skip (warn, and leave them out).
        dpo: settings of Diffusion-DPO.
    """

    MAY_CHANGE: ClassVar = ("pairs",)
    pairs: settings.PathText | None = None
    on_bad: Literal["refuse", "skip"] = "refuse"
    dpo: DpoConfig = field(default_factory=DpoConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dpo.mode == "offline" and self.pairs is None:
            raise ValueError("--dpo.mode offline needs --pairs; recipes/mine_pairs.py makes some from samples")
        if self.dpo.mode == "online" and self.pairs is not None:
            raise ValueError(f"pairs: got {self.pairs} in online mode; add --dpo.mode offline, or leave out --pairs")

    def graph_images(self, num_steps: int) -> tuple[int, int]:
        return 2 * self.dpo.batch_size * self.dpo.draws, 0
