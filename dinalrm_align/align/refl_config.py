"""Settings of ReFL, reward feedback learning, and of its recipe `recipes/refl_sd35.py`. Torch-free.

The defaults suit the embedded world on two CPU cores; `recipes/refl_sd35.yaml` holds what the paper's SD3.5-Medium run
does differently, and is read beneath the user's own settings whenever the model is one of that kind.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.align.anchor_config import AnchorConfig
from dinalrm_align.align.config import AlignRun
from dinalrm_align.train.config import LoopConfig
from dinalrm_align.train.settings import check_fields


@dataclass
class ReflConfig:
    """One ReFL update: a rollout without gradient to a late step, gradient steps, the reward of the estimated picture.

    Args:
        variant: refl, ReFL and DRaFT-K: the last steps carry the gradient; draft_lv: finished samples are noised anew,
            several times, and the step from there carries it; drtune: steps spread over the rollout carry it, their
            inputs detached; direct_align: finished samples are noised to any level, and the known noise is taken out
            again after one step, SRPO's way without its relative reward. See dinalrm_align/align/refl.py.
        batch_size: pictures per micro-batch and process; an update takes batch_size x loop.accumulate x processes.
        num_steps: denoising steps of the training rollout; none given, as many as the model samples with.
        guidance_scale: of the rollout without gradient; none given, the model's own.
        guided_gradient: use guidance in the gradient steps too; otherwise they see the prompt alone.
        grad_steps: of refl and drtune, how many steps carry the gradient: 1 is ReFL (and DRaFT-1), K is DRaFT-K.
        renoisings: of draft_lv and direct_align, how many noises each sample is noised anew with.
        stride: of direct_align, over how many of the rollout's levels its step goes.
        discount: of direct_align, the reward's loss is weighted by sigma ** discount, sigma the level of the step, so
            that nearly clean levels, where rewards are hacked, count less; 0: all count alike.
        earliest: the first gradient step is drawn, anew for every micro-batch, from the last part of the rollout: from
            step round(earliest x num_steps) up to the last that leaves room for grad_steps. 1: always the last, as
            DRaFT; direct_align is made for smaller ones. Of drtune this draws the step it stops at.
        loss: linear, mean(target - score), or relu, which lets go of pictures whose score is above the target.
        target: see loss; under linear it shifts the loss and nothing else.
        kl_weight: of the velocity KL, the mean square of velocity less the reference's at the gradient steps. It holds
            the policy near its frozen self; with 0 it is measured and has no effect.
        pretrain_weight: of a flow-matching loss on pictures, as ReFL's pretraining loss; 0 turns it off.
        pretrain_pictures: folder of NAME.png (or .jpg, .webp) beside NAME.txt, its caption, for that loss; none
            given, the base model's own samples are used.
        pretrain_samples: how many of the base model's samples to make for it.
        reward_sigma: noise level the reward reads at, several for its multi-noise ensemble; none given, the reward's
            own.
        reward_sigma_range: draw a level per picture and update, uniformly from this range, instead: a policy can then
            not settle on what fools one level. A pixel reward reads clean pictures and ignores both.
    """

    variant: Literal["refl", "draft_lv", "drtune", "direct_align"] = "refl"
    batch_size: int = 16
    num_steps: int | None = None
    guidance_scale: float | None = None
    guided_gradient: bool = False
    grad_steps: int = 1
    renoisings: int = 2
    stride: int = 1
    discount: float = 1.0
    earliest: float = 0.5
    loss: Literal["linear", "relu"] = "linear"
    target: float = 2.0
    kl_weight: float = 4.0
    pretrain_weight: float = 0.0
    pretrain_pictures: str | None = None
    pretrain_samples: int = 64
    reward_sigma: list[float] | None = None
    reward_sigma_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check_fields(self, "refl")
        if self.batch_size < 1 or self.grad_steps < 1 or self.pretrain_samples < 1:
            raise ValueError(
                f"refl: got batch_size {self.batch_size}, grad_steps {self.grad_steps}, pretrain_samples "
                f"{self.pretrain_samples}; each must be at least 1"
            )
        if self.renoisings < 1 or self.stride < 1 or self.discount < 0:
            raise ValueError(
                f"refl: got renoisings {self.renoisings}, stride {self.stride}, discount {self.discount}; expected at "
                "least 1, 1 and 0"
            )
        if self.num_steps is not None and self.num_steps < self.grad_steps:
            raise ValueError(f"refl: got grad_steps {self.grad_steps} of num_steps {self.num_steps}; take at most all")
        if not 0 <= self.earliest <= 1 or self.kl_weight < 0 or self.pretrain_weight < 0:
            raise ValueError(
                f"refl: got earliest {self.earliest}, kl_weight {self.kl_weight}, pretrain_weight "
                f"{self.pretrain_weight}; expected [0, 1], and weights of at least 0"
            )
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"refl.guidance_scale: got {self.guidance_scale}; expected at least 0 (1 and less: none)")
        if self.reward_sigma is not None and not (self.reward_sigma and all(0 <= s <= 1 for s in self.reward_sigma)):
            raise ValueError(f"refl.reward_sigma: got {self.reward_sigma}; expected one level or more, all in [0, 1]")
        if self.reward_sigma is not None and self.reward_sigma_range is not None:
            raise ValueError("refl: got both reward_sigma and reward_sigma_range; give one of them")
        low, high = self.reward_sigma_range or (0, 1)
        if not 0 <= low <= high <= 1:
            raise ValueError(f"refl: got reward_sigma_range {self.reward_sigma_range}; expected 0 <= low <= high <= 1")


@dataclass
class ReflRun(AlignRun):
    """Everything `python recipes/refl_sd35.py` can be told.

    Args:
        refl: one update.
        anchor: a second reward, climbed beside the first at every n-th update.
        loop: how long, how often saved, averaging.
    """

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=30))
    refl: ReflConfig = field(default_factory=ReflConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
