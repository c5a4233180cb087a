"""Settings of LPO and of `recipes/lpo_sd35.py`. Imports no torch."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dinalrm_align.align.config import AlignRun, check_noise_level
from dinalrm_align.train import settings


@dataclass
class LpoConfig:
    """Settings of LPO, which trains on preference pairs of noisy latents. The pairs are collected in rollouts.

    Args:
        batch_size: prompts per rollout and process, with one trajectory each.
        candidates: number of candidates for the next state, drawn at each state of a trajectory. The best and the worst
            candidate may become a pair; the trajectory continues from a random candidate.
        sample_batch: trajectories sampled and scored at once; affects memory, not results.
        num_steps: denoising steps of the rollout; None: the model's own number. The last step is not trained.
        schedule: noise levels of the rollout. diffusers: as in the pipeline. linear: equally spaced before the shift.
        sampler: kind of the stochastic steps, flow_sde or flow_cps (`dinalrm_align.flow.sde`).
        noise_level: noise scale of the stochastic steps; at most 1 with flow_cps.
        guidance_scale: guidance scale of rollout and training; None: the model's own. 1 or less: no guidance.
        negative_gradient: with guidance, also backpropagate through the velocity of the empty prompt.
        steps: denoising steps at which pairs are collected, as two numbers: first step (from 0) and one past the last
            step. None: all steps except the last step of the rollout.
        threshold: margin that a pair must exceed, as two numbers: for the step that adds the least noise, and for the
            step that adds the most. For other steps, the threshold is linear in the noise std. The margin is the
            difference of the probabilities softmax((best score, worst score) / temperature).
        temperature: temperature of the softmax in the margin.
        beta: factor of log ratio(chosen) - log ratio(rejected) in the preference loss.
        clip_range: the ratio p / p_base_model is clipped to 1 +- clip_range. A clipped ratio has no gradient.
        minibatches: updates per pass over the pairs of a rollout.
        epochs: passes over the pairs of a rollout.
    """

    MAY_CHANGE: ClassVar = ("batch_size", "sample_batch", "threshold", "temperature", "beta", "clip_range")
    batch_size: settings.PositiveInt = 4
    candidates: settings.IntAboveOne = 4
    sample_batch: settings.PositiveInt = 4
    num_steps: settings.IntAboveOne | None = None
    schedule: Literal["diffusers", "linear"] = "diffusers"
    sampler: Literal["flow_sde", "flow_cps"] = "flow_sde"
    noise_level: settings.PositiveFloat = 0.7
    guidance_scale: settings.NonNegativeFloat | None = None
    negative_gradient: bool = True
    steps: tuple[settings.NonNegativeInt, settings.PositiveInt] | None = None
    threshold: tuple[settings.HalfOpenUnitInterval, settings.HalfOpenUnitInterval] = (0.45, 0.6)
    temperature: settings.PositiveFloat = 1.0
    beta: settings.PositiveFloat = 500.0
    clip_range: settings.OpenUnitInterval = 0.1
    minibatches: settings.PositiveInt = 1
    epochs: settings.PositiveInt = 1

    def __post_init__(self) -> None:
        settings.check_fields(self, "lpo")
        check_noise_level("lpo", self.sampler, self.noise_level)
        if self.steps is not None and self.steps[0] >= self.steps[1]:
            raise ValueError(f"lpo.steps: got {self.steps}; expected a first step and one past the last")

    def trained_steps(self, num_steps: int) -> range:
        """Return the steps, of `num_steps` in a rollout, with pairs. Raises ValueError if the rollout is too short."""
        last = num_steps - 1
        steps = range(*(self.steps or (0, last)))
        if steps.stop > last:
            expected = f"expected at most {(0, last)} of {num_steps} steps: the last step is not trained"
            raise ValueError(f"lpo.steps: got {self.steps}; {expected}")
        return steps


@dataclass
class LpoRun(AlignRun):
    """Settings of `recipes/lpo_sd35.py`.

    Args:
        lpo: settings of LPO, step-level preference optimisation.
    """

    lpo: LpoConfig = field(default_factory=LpoConfig)

    def check_steps(self, num_steps: int) -> None:
        self.lpo.trained_steps(self.lpo.num_steps or num_steps)

    def graph_images(self, num_steps: int) -> tuple[int, int]:
        config = self.lpo
        pairs = config.batch_size * len(config.trained_steps(config.num_steps or num_steps))
        guided = 2 if config.guidance_scale is None or config.guidance_scale > 1 else 1
        return 2 * guided * -(-pairs // (config.minibatches * self.loop.accumulate)), 0
