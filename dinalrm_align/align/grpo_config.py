"""Settings of Flow-GRPO, policy gradients on a flow's stochastic steps. Torch-free.

The defaults suit the embedded world on two CPU cores; `recipes/grpo_sd35.yaml` holds what public SD3.5-Medium runs do
differently.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.align.anchor_config import AnchorConfig
from dinalrm_align.align.config import AlignRun
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import check_fields


@dataclass
class GrpoConfig:
    """One rollout of groups of samples, and how it is spent on updates.

    Args:
        groups: prompts per rollout and process.
        group_size: samples per prompt; their scores are compared with one another.
        sample_batch: samples drawn and scored at once, as memory allows; it changes nothing else.
        num_steps: denoising steps of the rollout; none given, as many as the model samples with.
        schedule: noise levels of the rollout. diffusers: the pipeline's own, flow_grpo's; linear: 1 ... 1/N, shifted,
            and 0, Flow-Factory's.
        sampler: the stochastic step: flow_sde, flow_cps or dance_sde (see `dinalrm_align.flow.sde`).
        noise_level: of that step; flow_cps takes at most 1.
        guidance_scale: in rollout and training alike; none given, the model's own; 1 and less: none.
        negative_gradient: under guidance, also train through the empty prompt's velocity.
        window: which steps are stochastic and trained; the others follow the flow. all: every one but the last; random:
            window_size of them in a row, drawn anew for every rollout (Flow-GRPO-Fast); progressive: window_size of
            them in a row, moving from the first steps to the last (MixGRPO).
        window_size: steps of a random or progressive window.
        window_range: steps that a random or progressive window stays in, first and one past the last; none given, all
            but the last.
        window_rollouts: rollouts before a progressive window moves on.
        window_stride: steps that it then moves by.
        window_wraps: begin again once it has passed the last place; otherwise it stays there.
        shared_start: let a group start from one initial noise, as DanceGRPO and MixGRPO do: its samples then differ by
            the stochastic steps alone, which is what is trained, and what comes before them is sampled once.
        reward_draws: noise draws that a reward of noised latents is averaged over. A draw is shared by the whole group,
            so that it does not enter the advantages; from two on, the variance that a draw for every sample would have
            added is measured.
        reward_sigma: noise level the reward reads at, several for its multi-noise ensemble; none given, the reward's
            own.
        advantage_std: what a score's distance from its group's mean is divided by: the standard deviation of the group,
            or that of the whole rollout over all processes (global).
        advantage_floor: added to that standard deviation.
        advantage_clip: largest advantage, either way.
        advantage_of: with a reward of several parts, the advantage of their weighted sum (sum), or the weighted sum of
            each part's own advantage (parts).
        minibatches: updates that the samples of a rollout are divided between.
        epochs: times that a rollout is gone through.
        clip_range: how far the ratio of probabilities may leave 1 before a sample stops counting.
        guard: GRPO-Guard's ratio normalisation (arXiv 2510.22319), which makes ratios of all steps alike and centres
            them on 1.
        kl_beta: weight of the KL to the frozen reference in the loss; with 0 it is measured and has no effect.
        kl_form: its denominator. scale: 2 s^2, as flow_grpo has it; std: 2 std^2, the KL of the two steps' densities
            per dimension; velocity: none, the mean square of the velocities' difference. Coefficients do not carry
            over from one to another.
        ratio_tolerance: how far the ratios of the first update after a rollout may be from 1 before the run is stopped:
            rollout and training then compute different things.
    """

    groups: int = 6
    group_size: int = 8
    sample_batch: int = 64
    num_steps: int | None = 8
    schedule: Literal["diffusers", "linear"] = "diffusers"
    sampler: Literal["flow_sde", "flow_cps", "dance_sde"] = "flow_cps"
    noise_level: float = 0.7
    guidance_scale: float | None = 1.0
    negative_gradient: bool = False
    window: Literal["all", "random", "progressive"] = "random"
    window_size: int = 2
    window_range: tuple[int, int] | None = (0, 4)
    window_rollouts: int = 25
    window_stride: int = 1
    window_wraps: bool = False
    shared_start: bool = True
    reward_draws: int = 2
    reward_sigma: list[float] | None = None
    advantage_std: Literal["group", "global"] = "group"
    advantage_floor: float = 1e-4
    advantage_clip: float = 5.0
    advantage_of: Literal["sum", "parts"] = "sum"
    minibatches: int = 1
    epochs: int = 1
    clip_range: float = 1e-4
    guard: bool = False
    kl_beta: float = 0.01
    kl_form: Literal["scale", "std", "velocity"] = "scale"
    ratio_tolerance: float = 1e-5

    def __post_init__(self) -> None:
        check_fields(self, "grpo")
        counts = (
            "groups", "sample_batch", "window_size", "window_rollouts", "window_stride", "reward_draws", "minibatches",
            "epochs",
        )  # fmt: skip
        for name in counts:
            if vars(self)[name] < 1:
                raise ValueError(f"grpo.{name}: got {vars(self)[name]}; expected at least 1")
        if self.group_size < 2:
            raise ValueError(f"grpo.group_size: got {self.group_size}; a sample needs another one to be compared with")
        if self.num_steps is not None and self.num_steps < 2:
            raise ValueError(f"grpo.num_steps: got {self.num_steps}; expected at least 2, as the last is not trained")
        if self.noise_level <= 0 or (self.sampler == "flow_cps" and self.noise_level > 1):
            raise ValueError(
                f"grpo.noise_level: got {self.noise_level} with {self.sampler}; expected more than 0, and at most 1 "
                "with flow_cps"
            )
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"grpo.guidance_scale: got {self.guidance_scale}; expected at least 0 (1 and less: none)")
        low, high = self.window_range or (0, self.window_size)
        if low < 0 or high - low < self.window_size:
            raise ValueError(
                f"grpo.window_range: got {self.window_range}; expected a first step of at least 0 and room for "
                f"window_size {self.window_size}"
            )
        if self.reward_sigma is not None and not (self.reward_sigma and all(0 <= s <= 1 for s in self.reward_sigma)):
            raise ValueError(f"grpo.reward_sigma: got {self.reward_sigma}; expected one level or more, all in [0, 1]")
        if min(self.advantage_floor, self.advantage_clip, self.clip_range, self.ratio_tolerance) <= 0:
            raise ValueError(
                f"grpo: got advantage_floor {self.advantage_floor}, advantage_clip {self.advantage_clip}, clip_range "
                f"{self.clip_range}, ratio_tolerance {self.ratio_tolerance}; expected more than 0"
            )
        if self.kl_beta < 0:
            raise ValueError(f"grpo.kl_beta: got {self.kl_beta}; expected at least 0")
        if self.guard and self.sampler == "flow_cps":
            raise ValueError(
                "grpo.guard: it normalises ratios of normal densities, and flow_cps's log-probability leaves the "
                "variance out; use flow_sde or dance_sde"
            )


@dataclass
class GrpoRun(AlignRun):
    """Everything `python recipes/grpo_sd35.py` can be told.

    Args:
        gradient_checkpointing: recompute activations of policy and reward in the backward pass: less memory, about a
            third more time.
        optim: AdamW.
        loop: how long, how often saved, averaging.
        grpo: one rollout, and how it is spent.
        anchor: a second reward, whose advantages are added to the first's at every n-th rollout; it needs no gradient.
    """

    gradient_checkpointing: bool = False
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=7e-4))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=20))
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
