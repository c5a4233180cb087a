"""Settings of ReFL, reward feedback learning, and of `recipes/refl_sd35.py`. Torch-free.

The defaults suit the embedded world. `recipes/refl_sd35.yaml` has those of the paper's run on SD3.5-Medium.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.align.config import AlignRun, AnchorConfig
from dinalrm_align.train import settings
from dinalrm_align.train.config import LoopConfig


@dataclass
class ReflConfig:
    """ReFL: a rollout without gradient up to a late step, steps with gradient, and the reward of the estimated image.

    Args:
        variant: steps that carry the gradient. refl: the last grad_steps steps, as in ReFL and DRaFT-K. draft_lv: the
            last step, repeated from finished samples with new noise. drtune: steps spread over the rollout, with
            detached inputs. direct_align: one step at any noise level, from a finished sample with known noise, which
            is then removed; SRPO without its relative reward. See dinalrm_align/align/refl.py.
        batch_size: images per micro-batch and process; an update takes batch_size x loop.accumulate x processes.
        num_steps: denoising steps of the rollout; by default the model's own number.
        guidance_scale: guidance scale of the rollout without gradient; by default the model's own.
        guided_gradient: use guidance in the steps with gradient as well; otherwise they use the prompt alone.
        grad_steps: refl and drtune: number of steps with gradient. 1 is ReFL and DRaFT-1, K is DRaFT-K.
        renoisings: draft_lv and direct_align: noise draws per sample.
        stride: direct_align: number of the rollout's steps that its one step covers.
        discount: direct_align: the reward's loss is multiplied by sigma ** discount, where sigma is the noise level of
            the step, because rewards are hacked at nearly clean levels; 0: no weighting.
        earliest: earliest step that may be the first gradient step, as a fraction of num_steps. That step is drawn for
            every micro-batch; the last choice leaves room for grad_steps. 1: always the last choice, as in DRaFT.
            direct_align needs smaller values. drtune: the drawn step is where the rollout stops.
        loss: linear: mean(target - score). relu: mean(relu(target - score)); above the target there is no gradient.
        target: target score of the loss; with linear it only shifts the loss.
        kl_weight: weight of the mean squared difference of the policy's and the base model's velocities at the steps
            with gradient; 0: it is only measured.
        pretrain_weight: weight of a flow-matching loss on images, which stands for ReFL's pretraining loss; 0: none.
        pretrain_pictures: folder of images for that loss: NAME.png (or .jpg, .webp), with the caption in NAME.txt. By
            default pretrain_samples samples of the base model are used.
        pretrain_samples: number of samples of the base model if pretrain_pictures is not given.
        reward_sigma: noise level or levels (an ensemble) at which a latent reward scores; by default the reward's own.
        reward_sigma_range: lowest and highest noise level of a latent reward; a level is drawn in between for each
            image and update. Cannot be combined with reward_sigma. Pixel rewards ignore both.
    """

    variant: Literal["refl", "draft_lv", "drtune", "direct_align"] = "refl"
    batch_size: settings.PositiveInt = 16
    num_steps: settings.PositiveInt | None = None
    guidance_scale: settings.NonNegativeFloat | None = None
    guided_gradient: bool = False
    grad_steps: settings.PositiveInt = 1
    renoisings: settings.PositiveInt = 2
    stride: settings.PositiveInt = 1
    discount: settings.NonNegativeFloat = 1.0
    earliest: settings.ClosedUnitInterval = 0.5
    loss: Literal["linear", "relu"] = "linear"
    target: float = 2.0
    kl_weight: settings.NonNegativeFloat = 4.0
    pretrain_weight: settings.NonNegativeFloat = 0.0
    pretrain_pictures: str | None = None
    pretrain_samples: settings.PositiveInt = 64
    reward_sigma: list[settings.ClosedUnitInterval] | None = None
    reward_sigma_range: tuple[settings.ClosedUnitInterval, settings.ClosedUnitInterval] | None = None

    def __post_init__(self) -> None:
        settings.check_fields(self, "refl")
        settings.check_levels("refl.reward_sigma", self.reward_sigma)
        if self.num_steps is not None and self.grad_steps > self.num_steps:
            raise ValueError(f"refl.grad_steps: got {self.grad_steps}; expected at most num_steps, {self.num_steps}")
        if self.reward_sigma_range is not None:
            if self.reward_sigma is not None:
                raise ValueError("refl.reward_sigma_range: got both this and reward_sigma; expected one of them")
            if self.reward_sigma_range[0] > self.reward_sigma_range[1]:
                raise ValueError(f"refl.reward_sigma_range: got {self.reward_sigma_range}; expected low <= high")


@dataclass
class ReflRun(AlignRun):
    """Settings of `recipes/refl_sd35.py`.

    Args:
        refl: ReFL and its variants.
        anchor: second reward, maximised together with the first at every n-th update.
    """

    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=30))
    refl: ReflConfig = field(default_factory=ReflConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
