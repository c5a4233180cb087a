"""Settings of Flow-GRPO and of `recipes/grpo_sd35.py`. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dinalrm_align.align.config import AlignRun, AnchorConfig, GroupRolloutConfig, check_noise_level
from dinalrm_align.train import settings


@dataclass
class GrpoConfig(GroupRolloutConfig):
    """Settings of Flow-GRPO: policy gradients on stochastic denoising steps, with a clipped probability ratio.

    Args:
        num_steps: denoising steps of the rollout; None: the model's own number. The last step is not trained.
        schedule: noise levels of the rollout. diffusers: as in the pipeline. linear: equally spaced before the shift.
        sampler: kind of the stochastic steps, flow_sde or flow_cps (`dinalrm_align.flow.sde`).
        noise_level: noise scale of the stochastic steps; at most 1 with flow_cps.
        negative_gradient: with guidance, also backpropagate through the velocity of the empty prompt.
        window: steps that are stochastic and trained; all others follow the ODE. all: every step except the last.
            random: window_size consecutive steps, drawn anew for every rollout (Flow-GRPO-Fast). progressive:
            window_size consecutive steps, which move from the first steps to the last (MixGRPO).
        window_size: number of steps in a random or progressive window.
        window_range: range of steps that contains the window, as two numbers: the range's first step, and one past its
            last step. None: all but the rollout's last step.
        window_rollouts: number of rollouts after which a progressive window moves.
        window_stride: number of steps by which a progressive window moves each time.
        window_wraps: when a progressive window has reached the end of window_range, move it back to the start;
            otherwise it stays at the end.
        shared_start: start all samples of a group from the same noise, as DanceGRPO and MixGRPO do, so that the samples
            differ by the stochastic steps only. The steps before the window are then computed once per group.
        advantage_of: advantage used if the reward is a weighted sum. sum: the advantage of the summed score. parts: the
            weighted sum of the rewards' advantages: each reward's scores become z-scores in their group, so that the
            weights do not depend on the scales of the scores. gdpo: as parts, and the sum is divided by its standard
            deviation over the rollout (GDPO, arXiv 2601.05242), so that advantages have the same size for any number
            of rewards and any weights.
        clip_range: c; the loss clips the probability ratio to [1 - c, 1 + c].
        guard: normalise the ratios of all steps to the same mean and scale, as in GRPO-Guard (arXiv 2510.22319); only
            with flow_sde.
        kl_beta: weight of the KL to the frozen base model in the loss; 0: the base model does not run in training, and
            the metrics kl and step_kl are absent. Advantages are normalised, so the weight is per unit of advantage and
            does not depend on the reward's scale.
        kl_form: normalisation of the KL. scale: squared difference of the step means / (2 s^2), where s is the SDE's
            noise scale, as in flow_grpo. std: the same, with the step's standard deviation as s; the exact KL
            per dimension. velocity: mean squared difference of the velocities. Each form needs its own kl_beta.
        ratio_tolerance: largest distance of the probability ratios from 1 in the first update after a rollout, less
            than clip_range; None: a third of clip_range. The run stops at a larger distance: the weights have not
            changed yet, so a difference means that rollout and training compute different probabilities. The limit is
            never below the eps of the policy's dtype: 1.2e-7 in float32, 1/128 in bfloat16. There, the rounding of
            velocities depends on the batch size, and the updates use old probabilities that were computed in their own
            micro-batches (see `align.grpo`), so that the first ratios are exactly 1.
    """

    MAY_CHANGE: ClassVar = (
        "window_size", "window_range", "window_rollouts", "window_stride", "window_wraps", "clip_range", "kl_beta",
        "ratio_tolerance",
    )  # fmt: skip
    num_steps: settings.IntAboveOne | None = None
    schedule: Literal["diffusers", "linear"] = "diffusers"
    sampler: Literal["flow_sde", "flow_cps"] = "flow_cps"
    noise_level: settings.PositiveFloat = 0.7
    negative_gradient: bool = False
    window: Literal["all", "random", "progressive"] = "random"
    window_size: settings.PositiveInt = 2
    window_range: tuple[settings.NonNegativeInt, settings.NonNegativeInt] | None = None
    window_rollouts: settings.PositiveInt = 25
    window_stride: settings.PositiveInt = 1
    window_wraps: bool = False
    shared_start: bool = False
    advantage_of: Literal["sum", "parts", "gdpo"] = "sum"
    clip_range: settings.PositiveFloat = 1e-4
    guard: bool = False
    kl_beta: settings.NonNegativeFloat = 0.01
    kl_form: Literal["scale", "std", "velocity"] = "scale"
    ratio_tolerance: settings.PositiveFloat | None = None

    def __post_init__(self) -> None:
        self.check("grpo")
        check_noise_level("grpo", self.sampler, self.noise_level)
        if self.window_range is not None and self.window_range[1] - self.window_range[0] < self.window_size:
            room = f"room for window_size {self.window_size}"
            raise ValueError(f"grpo.window_range: got {self.window_range}; expected {room}")
        if self.ratio_tolerance is not None and self.ratio_tolerance >= self.clip_range:
            raise ValueError(
                f"grpo.ratio_tolerance: got {self.ratio_tolerance:g}; expected less than clip_range, "
                f"{self.clip_range:g}, since ratios beyond it are clipped; null means a third of clip_range"
            )
        if self.guard and self.sampler == "flow_cps":
            raise ValueError("grpo.guard: got true with sampler flow_cps; expected flow_sde: it needs a density")

    def window_room(self, num_steps: int) -> tuple[int, int]:
        """Return the first step, and one past the last, of the range that holds the window in a rollout of `num_steps`.

        Raises ValueError if the range has no room for the window.
        """
        if self.window == "all":
            return 0, num_steps - 1
        low, high = self.window_range or (0, num_steps - 1)
        if high > num_steps - 1 or high - self.window_size < low:
            raise ValueError(
                f"grpo.window_range: got steps {low} ... {high - 1} for a window of {self.window_size}; expected room "
                f"for it in the first {num_steps - 1} of {num_steps} steps: the last step is not trained"
            )
        return low, high

    @property
    def largest_mismatch(self) -> float:
        """`ratio_tolerance`, or a third of `clip_range` if it is None."""
        return self.clip_range / 3 if self.ratio_tolerance is None else self.ratio_tolerance


@dataclass
class GrpoRun(AlignRun):
    """Settings of `recipes/grpo_sd35.py`.

    Args:
        grpo: settings of Flow-GRPO.
        anchor: settings of a second reward, whose advantages are added in every `anchor.every`-th rollout.
    """

    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)

    def check_steps(self, num_steps: int) -> None:
        self.grpo.window_room(self.grpo.num_steps or num_steps)

    def graph_images(self, num_steps: int) -> tuple[int, int]:
        steps = num_steps if self.grpo.window == "all" else self.grpo.window_size
        return self.grpo.micro_batch(steps, self.loop.accumulate), 0
