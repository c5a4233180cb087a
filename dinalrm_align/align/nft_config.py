"""Settings of DiffusionNFT, contrast of good and bad samples on the forward process. Torch-free.

The defaults suit the embedded world on two CPU cores; `recipes/nft_sd35.yaml` holds what public SD3.5-Medium runs do
differently.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.align.config import AlignRun
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import check_fields


@dataclass
class NftConfig:
    """One rollout of groups of samples, and how it is spent on updates.

    Args:
        groups: prompts per rollout and process.
        group_size: samples per prompt; their scores are compared with one another.
        sample_batch: samples drawn and scored at once, as memory allows; it changes nothing else.
        num_steps: denoising steps of the rollout; none given, as many as the model samples with.
        guidance_scale: in rollout and training alike; none given, the model's own; 1 and less: none.
        levels: noise levels that each sample is trained at per epoch.
        earliest: they are drawn from the rollout's, from this share of its steps on; 0: from pure noise on.
        latest: up to this share; 1: to the last step.
        reward_draws: noise draws that a reward of noised latents is averaged over; each is shared by the whole group.
        reward_sigma: noise level the reward reads at, several for its multi-noise ensemble; none given, the reward's
            own.
        advantage_std: what a score's distance from its group's mean is divided by: the standard deviation of the group,
            or that of the whole rollout over all processes (global).
        advantage_floor: added to that standard deviation.
        advantage_clip: the advantage, either way, at which a sample counts as wholly good or bad.
        beta: how far apart the good and the bad policy are: v_old +- beta (v - v_old).
        kl_beta: weight of the mean square of velocity less the reference's.
        old_slope: the sampling policy keeps min(old_slope x rollouts, old_limit) of itself at each rollout and takes
            the rest from the trained one; 0: it is the trained one.
        old_limit: see old_slope.
        minibatches: updates that the samples of a rollout are divided between.
        epochs: times that a rollout is gone through.
    """

    groups: int = 6
    group_size: int = 8
    sample_batch: int = 64
    num_steps: int | None = 8
    guidance_scale: float | None = 1.0
    levels: int = 2
    earliest: float = 0.0
    latest: float = 1.0
    reward_draws: int = 2
    reward_sigma: list[float] | None = None
    advantage_std: Literal["group", "global"] = "group"
    advantage_floor: float = 1e-4
    advantage_clip: float = 5.0
    beta: float = 1.0
    kl_beta: float = 1.0
    old_slope: float = 0.001
    old_limit: float = 0.5
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        check_fields(self, "nft")
        for name in ("groups", "sample_batch", "levels", "reward_draws", "minibatches", "epochs"):
            if vars(self)[name] < 1:
                raise ValueError(f"nft.{name}: got {vars(self)[name]}; expected at least 1")
        if self.group_size < 2:
            raise ValueError(f"nft.group_size: got {self.group_size}; a sample needs another one to be compared with")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"nft.num_steps: got {self.num_steps}; expected at least 1")
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"nft.guidance_scale: got {self.guidance_scale}; expected at least 0 (1 and less: none)")
        if not 0 <= self.earliest < self.latest <= 1:
            raise ValueError(
                f"nft: got earliest {self.earliest}, latest {self.latest}; expected 0 <= earliest < latest <= 1"
            )
        if self.reward_sigma is not None and not (self.reward_sigma and all(0 <= s <= 1 for s in self.reward_sigma)):
            raise ValueError(f"nft.reward_sigma: got {self.reward_sigma}; expected one level or more, all in [0, 1]")
        if min(self.advantage_floor, self.advantage_clip, self.beta) <= 0 or min(self.kl_beta, self.old_slope) < 0:
            raise ValueError(
                f"nft: got advantage_floor {self.advantage_floor}, advantage_clip {self.advantage_clip}, beta "
                f"{self.beta}; expected more than 0; kl_beta {self.kl_beta}, old_slope {self.old_slope}; at least 0"
            )
        if not 0 <= self.old_limit < 1:
            raise ValueError(f"nft.old_limit: got {self.old_limit}; expected [0, 1)")


@dataclass
class NftRun(AlignRun):
    """Everything `python recipes/nft_sd35.py` can be told.

    Args:
        gradient_checkpointing: recompute activations of policy and reward in the backward pass: less memory, about a
            third more time.
        optim: AdamW.
        loop: how long, how often saved, averaging.
        nft: one rollout, and how it is spent.
    """

    gradient_checkpointing: bool = False
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=8e-4))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=20))
    nft: NftConfig = field(default_factory=NftConfig)
