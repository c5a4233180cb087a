"""Settings of ReFL and of `recipes/refl_sd35.py`. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dinalrm_align.align.config import AlignRun, AnchorConfig
from dinalrm_align.train import settings


@dataclass
class ReflConfig:
    """Settings of ReFL: sample to a random step without gradient, take steps with gradient, and maximise the reward.

    Args:
        variant: steps that carry the gradient. refl: grad_steps consecutive late steps, as in ReFL and DRaFT-K.
            draft_lv: one late step, from several noised copies of a finished sample. drtune: steps spread over the
            rollout, with detached inputs. direct_align: one step at any noise level; known noise is added to a finished
            sample before the step and removed after it, as in SRPO, but without SRPO's relative reward.
        batch_size: images per micro-batch and process; an update uses batch_size x loop.accumulate x processes images.
        sample_batch: images of a rollout: as many micro-batches of an update as fit are sampled together, at least one.
            Affects time and memory, not results, except for rounding. By default batch_size.
        steps_per_rollout: K; each sample gives K micro-batches of the same update, from K different steps. An
            update then uses 1/K of the samples and about 1/K of the rollout's time. K must divide loop.accumulate.
        num_steps: denoising steps of the rollout; by default the model's own number.
        guidance_scale: guidance scale of the rollout without gradient; by default the model's own.
        guided_gradient: use guidance in the steps with gradient as well; otherwise only the rollout uses guidance.
        grad_steps: number of steps with gradient (refl and drtune). refl: 1 is ReFL and DRaFT-1, K is DRaFT-K.
        renoisings: noise draws per sample (draft_lv and direct_align).
        stride: length of the step with gradient, in steps of the rollout (direct_align).
        discount: the reward's loss is multiplied by sigma ** discount (direct_align), where sigma is the noise
            level of the step with gradient; 0: no weighting. The weight is low at low sigma, where hacking is easier.
        earliest: start of the range from which each micro-batch draws its first step with gradient, as a fraction of
            num_steps. The range ends at step num_steps - grad_steps. At 1, this step is always drawn, as in DRaFT.
            For direct_align, choose a smaller value. For drtune, the rollout's last step is drawn from this range.
            For draft_lv, see draft_lv_earliest.
        draft_lv_earliest: the same for draft_lv; 1: always the last step, as DRaFT-LV is defined.
        loss: linear: mean(target - score). relu: mean(relu(target - score)); scores above the target get no gradient.
        target: target score of the loss. With the linear loss, it does not change the gradient.
        kl_weight: weight of the mean squared difference of the policy's and the base model's velocities at the steps
            with gradient; 0: the base model does not run in training, and the metric kl is absent. The evaluation's
            metric drift measures the difference in either case.
        kl_unit: unit of kl_weight. raw: the weight is used as it is. reward_std: the weight is multiplied by the
            standard deviation of the reward among the base model's samples of one prompt, measured once on 16 prompts
            with 4 samples each and stored in the run. Rewards of different scales can then share a weight. The
            recipe's default in the embedded world is reward_std, for SD3.5 raw.
        pretrain_weight: weight of a flow-matching loss on images, in place of ReFL's pretraining loss; 0: none. It is
            not scaled by the reward, whatever kl_unit is.
        pretrain_images: folder of images for the flow-matching loss, NAME.png (or .jpg, .webp) with the caption in
            NAME.txt. By default the base model generates the images.
        pretrain_samples: number of images that the base model generates if pretrain_images is not given.
        reward_sigma: noise level or levels (an ensemble) at which a latent reward scores; by default the reward's own.
        reward_sigma_range: lowest and highest noise level at which a latent reward scores; each image gets a random
            level in this range at each update. Do not combine with reward_sigma. Pixel rewards ignore both settings.
    """

    MAY_CHANGE: ClassVar = ("batch_size", "sample_batch", "discount", "loss", "target", "kl_weight", "pretrain_weight")
    variant: Literal["refl", "draft_lv", "drtune", "direct_align"] = "refl"
    batch_size: settings.PositiveInt = 4
    sample_batch: settings.PositiveInt | None = None
    steps_per_rollout: settings.PositiveInt = 1
    num_steps: settings.PositiveInt | None = None
    guidance_scale: settings.NonNegativeFloat | None = None
    guided_gradient: bool = False
    grad_steps: settings.PositiveInt = 1
    renoisings: settings.PositiveInt = 2
    stride: settings.PositiveInt = 1
    discount: settings.NonNegativeFloat = 1.0
    earliest: settings.ClosedUnitInterval = 0.75
    draft_lv_earliest: settings.ClosedUnitInterval = 1.0
    loss: Literal["linear", "relu"] = "linear"
    target: float = 2.0
    kl_weight: settings.NonNegativeFloat = 0.0
    kl_unit: Literal["raw", "reward_std"] = "raw"
    pretrain_weight: settings.NonNegativeFloat = 0.0
    pretrain_images: settings.PathText | None = None
    pretrain_samples: settings.PositiveInt = 64
    reward_sigma: list[settings.ClosedUnitInterval] | None = None
    reward_sigma_range: tuple[settings.ClosedUnitInterval, settings.ClosedUnitInterval] | None = None

    def __post_init__(self) -> None:
        settings.check_fields(self, "refl")
        settings.check_levels("refl.reward_sigma", self.reward_sigma)
        if self.num_steps is not None:
            self.check_steps(self.num_steps)
        if self.reward_sigma_range is not None:
            if self.reward_sigma is not None:
                raise ValueError("refl.reward_sigma_range: got both this and reward_sigma; expected one of them")
            if self.reward_sigma_range[0] > self.reward_sigma_range[1]:
                raise ValueError(f"refl.reward_sigma_range: got {self.reward_sigma_range}; expected low <= high")

    def check_accumulate(self, accumulate: int) -> None:
        """Raise ValueError unless the micro-steps of an update, `accumulate`, divide among whole rollouts."""
        if accumulate % self.steps_per_rollout:
            raise ValueError(
                f"refl.steps_per_rollout: got {self.steps_per_rollout}; expected a divisor of loop.accumulate, "
                f"{accumulate}: all gradients of a rollout belong to one update"
            )

    def starts(self, num_steps: int) -> range:
        """Return the possible indices of the first step with gradient in a rollout of `num_steps`."""
        last = num_steps - (self.grad_steps if self.variant == "refl" else 1)
        earliest = self.draft_lv_earliest if self.variant == "draft_lv" else self.earliest
        return range(min(round(earliest * num_steps), last), last + 1)

    def check_steps(self, num_steps: int) -> None:
        """Raise ValueError if a rollout of `num_steps` is shorter than grad_steps, or has too few start steps."""
        if self.grad_steps > num_steps:
            raise ValueError(f"refl.grad_steps: got {self.grad_steps}; expected at most num_steps, {num_steps}")
        starts, drawn = self.starts(num_steps), self.steps_per_rollout
        if drawn > len(starts):
            raise ValueError(
                f"refl.steps_per_rollout: got {drawn}; expected at most {len(starts)}, the number of steps "
                f"{starts.start} ... {starts.stop - 1} of {num_steps} from which a gradient step is drawn: lower "
                "refl.earliest, or refl.draft_lv_earliest for draft_lv"
            )


@dataclass
class ReflRun(AlignRun):
    """Settings of `recipes/refl_sd35.py`, the script that aligns a model with ReFL.

    Args:
        refl: settings of ReFL and its variants.
        anchor: settings of a second reward. Every `anchor.every`-th update maximises both rewards.
    """

    refl: ReflConfig = field(default_factory=ReflConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refl.check_accumulate(self.loop.accumulate)

    def check_steps(self, num_steps: int) -> None:
        self.refl.check_steps(self.refl.num_steps or num_steps)

    def graph_images(self, num_steps: int) -> tuple[int, int]:
        config, renoised = self.refl, self.refl.variant in ("draft_lv", "direct_align")
        images = config.batch_size * (config.renoisings if renoised else 1)
        velocities = (1 if renoised else config.grad_steps) * (1 + config.guided_gradient)
        pretrained = config.batch_size if config.pretrain_weight > 0 else 0
        return images * velocities + pretrained, images * len(config.reward_sigma or [0])
