"""Settings of LPO, step-level preference optimisation with a reward that reads noisy latents. Torch-free.

The defaults suit the embedded world on two CPU cores; `recipes/lpo_sd35.yaml` holds the settings for SD3.5-Medium.
"""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.align.config import AlignRun
from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.settings import check_fields


@dataclass
class LpoConfig:
    """One rollout that gathers pairs at its steps, and how they are spent on updates.

    Args:
        batch_size: prompts per rollout and process, one trajectory each.
        candidates: next states drawn from each state of a trajectory; best and worst may become a pair, and the
            trajectory goes on from one of them at random.
        sample_batch: trajectories sampled and scored at once, as memory allows; it changes nothing else.
        num_steps: denoising steps of the rollout; none given, as many as the model samples with.
        schedule: noise levels of the rollout. diffusers: the pipeline's own; linear: 1 ... 1/N, shifted, and 0.
        sampler: the stochastic step: flow_sde, flow_cps or dance_sde (see `dinalrm_align.flow.sde`).
        noise_level: of that step; flow_cps takes at most 1.
        guidance_scale: in rollout and training alike; none given, the model's own; 1 and less: none.
        negative_gradient: under guidance, also train through the empty prompt's velocity.
        steps: steps at which pairs are gathered, first and one past the last; the others follow the flow. None given,
            all but the last.
        threshold: what the probability that the best is preferred must exceed the worst's by to make a pair, at the
            step that injects least noise and at the one that injects most; linear in between.
        temperature: of those probabilities, softmax(score / temperature): the reward's unit of score.
        beta: of the preference loss; it multiplies the difference of log-ratios.
        clip_range: how far the ratio to the reference may leave 1, either way, before a candidate stops counting.
        minibatches: updates that the pairs of a rollout are divided between.
        epochs: times that they are gone through.
    """

    batch_size: int = 12
    candidates: int = 4
    sample_batch: int = 64
    num_steps: int | None = 8
    schedule: Literal["diffusers", "linear"] = "diffusers"
    sampler: Literal["flow_sde", "flow_cps", "dance_sde"] = "flow_sde"
    noise_level: float = 0.7
    guidance_scale: float | None = 1.0
    negative_gradient: bool = True
    steps: tuple[int, int] | None = (0, 6)
    threshold: tuple[float, float] = (0.2, 0.3)
    temperature: float = 1.0
    beta: float = 1000.0
    clip_range: float = 0.1
    minibatches: int = 1
    epochs: int = 1

    def __post_init__(self) -> None:
        check_fields(self, "lpo")
        for name, least in (
            ("batch_size", 1), ("candidates", 2), ("sample_batch", 1), ("minibatches", 1), ("epochs", 1),
        ):  # fmt: skip
            if vars(self)[name] < least:
                raise ValueError(f"lpo.{name}: got {vars(self)[name]}; expected at least {least}")
        if self.num_steps is not None and self.num_steps < 2:
            raise ValueError(f"lpo.num_steps: got {self.num_steps}; expected at least 2, as the last is not trained")
        if self.noise_level <= 0 or (self.sampler == "flow_cps" and self.noise_level > 1):
            raise ValueError(
                f"lpo.noise_level: got {self.noise_level} with {self.sampler}; expected more than 0, and at most 1 "
                "with flow_cps"
            )
        if self.guidance_scale is not None and self.guidance_scale < 0:
            raise ValueError(f"lpo.guidance_scale: got {self.guidance_scale}; expected at least 0 (1 and less: none)")
        if self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            raise ValueError(f"lpo.steps: got {self.steps}; expected a first step of at least 0 and one past the last")
        if not 0 <= min(self.threshold) <= max(self.threshold) < 1:
            raise ValueError(f"lpo.threshold: got {self.threshold}; expected differences of probabilities, in [0, 1)")
        if min(self.temperature, self.beta) <= 0 or not 0 < self.clip_range < 1:
            raise ValueError(
                f"lpo: got temperature {self.temperature}, beta {self.beta}, clip_range {self.clip_range}; expected "
                "more than 0, and a clip_range below 1"
            )


@dataclass
class LpoRun(AlignRun):
    """Everything `python recipes/lpo_sd35.py` can be told.

    Args:
        gradient_checkpointing: recompute activations of policy and reward in the backward pass: less memory, about a
            third more time.
        optim: AdamW.
        loop: how long, how often saved, averaging.
        lpo: one rollout, and how it is spent.
    """

    gradient_checkpointing: bool = False
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=4e-4))
    loop: LoopConfig = field(default_factory=lambda: LoopConfig(steps=30))
    lpo: LpoConfig = field(default_factory=LpoConfig)
