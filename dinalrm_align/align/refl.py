"""ReFL (reward feedback learning, arXiv 2304.05977) on flow matching, and related methods with reward gradients.

As in DiNa-LRM's alignment runs (arXiv 2602.11146), each update:

1. samples from noise to a random step, at the earliest `earliest`, without gradient and with guidance;
2. takes K steps with gradient, by default without guidance, and estimates the clean latents after the last of these
   steps, x0_hat = x - sigma velocity;
3. scores x0_hat with a frozen reward and minimises
   mean(target - score) + kl_weight u mean|velocity - velocity_reference|^2
   (+ pretrain_weight times a flow-matching loss on images), where u is 1 or, with kl_unit reward_std, the reward's
   standard deviation over base-model samples (`align.spread`).

The variants (`ReflConfig.variant`) differ in the steps that carry the gradient:

    refl           ReFL; with K consecutive gradient steps, this is DRaFT-K (arXiv 2309.17400)
    draft_lv       DRaFT-LV: a finished sample is noised n times, and each copy takes one step (`renoised_steps`)
    drtune         DRTune (arXiv 2405.00760): K steps spread over the rollout, with detached inputs (`drtune_steps`)
    direct_align   SRPO's Direct-Align (arXiv 2509.06942): known noise is added and removed (`direct_align_steps`)

The RNG stream of a sample is keyed by (seed, global sample index), so that updates do not depend on the world size. The
random step is keyed by (seed, micro-step), so that all ranks take the same number of steps.

The rollout takes most of an update's time. Two settings shorten it. With `sample_batch`, several micro-batches of an
update are sampled together. With `steps_per_rollout` K, a rollout gives K micro-batches, one for each of K steps.
The weights are those of the same update, so the gradient stays on-policy and its expectation is unchanged, but the K
micro-batches share prompts and initial noise: their gradients are correlated, and an update sees 1/K of the samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dinalrm_align.align.anchor import Anchor, terms
from dinalrm_align.align.refl_config import ReflConfig
from dinalrm_align.align.refl_steps import (
    direct_align_steps,
    draw_starts,
    draw_trained,
    drtune_steps,
    flow_matching_loss,
    gradient_steps,
    renoised_steps,
    reward_loss,
    rollout_states,
)
from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.align.spread import base_spreads
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.device import to_device

STEPS, SAMPLES = 4, 5
"""RNG streams."""


@dataclass(frozen=True)
class ReflBatch:
    """A micro-batch: the latents from which the steps with gradient start, and the RNG streams of the samples.

    Args:
        latents: (B, C, H, W). For variant refl, at noise level sigmas[start]; for drtune, at sigmas[trained[0]];
            for draft_lv and direct_align, finished samples.
        start: index of the first step with gradient. For drtune: index of the step that estimates the clean latents.
        conditions: conditions of the B samples.
        generators: RNG streams of the B samples, for the draws of the training step.
        update: number of the update, counted from 0.
        trained: indices of the steps with gradient (only drtune).
    """

    latents: Tensor
    start: int
    conditions: Conditions
    generators: Sequence[torch.Generator]
    update: int
    trained: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """B, the number of samples that the loss is averaged over."""
        return len(self.latents)


@dataclass
class Refl:
    """ReFL for the training loop `train.loop.fit`: `batch_at` samples a rollout, and `step` returns its loss.

    Args:
        sampler: samples training prompts with the policy.
        reward: differentiable reward; must be frozen and on the policy's device.
        anchor: a second reward. Every n-th update adds its weighted scores to those of `reward`.
        reward_std: standard deviation of the reward over base-model samples; None: not measured (see `measure`).
        pretrain_data: latents (N, C, H, W) and N conditions for the pretraining loss; required if
            config.pretrain_weight is above 0.
    """

    sampler: Sampler
    reward: Reward
    config: ReflConfig
    anchor: Anchor | None = None
    pretrain_data: tuple[Tensor, Conditions] | None = None
    reward_std: float | None = None
    _sampled: dict[int, ReflBatch] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.config.check_steps(self.sampler.num_steps)
        self.config.check_accumulate(self.sampler.accumulate)

    @property
    def no_signal(self) -> str:
        """Why an update gives no learning signal, and what to try."""
        return (
            "the gradient of the reward is zero. Check that the reward does not round, clip or saturate, and that its "
            f"scores are below refl.target {self.config.target} if refl.loss is relu (it is {self.config.loss})"
        )

    @property
    def kl_weight(self) -> float:
        """The weight that multiplies the KL in the loss. Raises ValueError for unit reward_std before `measure`."""
        if self.config.kl_unit == "raw":
            return self.config.kl_weight
        if self.reward_std is None:
            raise ValueError("refl.kl_unit: got reward_std without reward_std; call Refl.measure first")
        return self.config.kl_weight * self.reward_std

    def measure(self, resumed: bool = False) -> None:
        """Measure reward_std, if config.kl_unit needs it, and scale the anchor to the spread of the reward.

        resumed: whether `load_state_tensors` restores reward_std from a checkpoint, so that it is not measured again.
        """
        if self.config.kl_unit == "reward_std" and not resumed:
            [self.reward_std] = base_spreads(self.sampler, [self.reward], self._reward_sigma, per_prompt=4)
        if self.anchor is not None:
            rewards = [self.reward, self.anchor.reward]
            own, second = base_spreads(self.sampler, rewards, self._reward_sigma, per_prompt=1)
            self.anchor = replace(self.anchor, weight=self.anchor.weight * (own / second))

    def state_tensors(self) -> dict[str, Tensor]:
        return {"reward_std": torch.tensor(self.reward_std, dtype=torch.float64)}

    def is_common(self) -> bool:
        return True

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        if tensors.keys() != {"reward_std"} or not tensors["reward_std"].item() > 0:
            raise ValueError(f"state of ReFL: got {tensors}; expected a positive number reward_std")
        self.reward_std = tensors["reward_std"].item()

    def batch_at(self, micro_step: int) -> ReflBatch:
        """Sample a micro-step's latents without gradient. Micro-step, seed, rank and weights determine the batch.

        The micro-steps of an update that share a rollout are sampled at the first of them, and then returned in turn.
        """
        config, accumulate = self.config, self.sampler.accumulate
        update, place = divmod(micro_step, accumulate)
        together = config.steps_per_rollout * max(1, (config.sample_batch or 0) // config.batch_size)
        if place % together == 0 or micro_step not in self._sampled:
            first = micro_step - place % together
            self._sampled = self._roll_out(range(first, min(first + together, (update + 1) * accumulate)))
        return self._sampled.pop(micro_step)

    @torch.no_grad()
    def _roll_out(self, micro_steps: range) -> dict[int, ReflBatch]:
        """Sample the latents of several micro-steps together. Return {micro-step: batch}."""
        sampler, config, shared = self.sampler, self.config, self.config.steps_per_rollout
        size, numbers = config.batch_size, [step // shared for step in micro_steps[::shared]]
        firsts = [sampler.first_sample(size, number) for number in numbers]
        samples = [first + index for first in firsts for index in range(size)]
        plans: dict[int, tuple[int, int, tuple[int, ...]]] = {}  # micro-step: (start, steps of the rollout, trained)
        for number in numbers:
            generator = seeded_generator(sampler.seed, number, STEPS)
            for part, start in enumerate(draw_starts(config.starts(sampler.num_steps), shared, generator)):
                steps, trained = start if config.variant == "refl" else sampler.num_steps, ()
                if config.variant == "drtune":
                    trained = draw_trained(start, min(config.grad_steps, start + 1), generator)
                    steps = trained[0]
                plans[number * shared + part] = start, steps, trained
        conditions = sampler.take([i for number in numbers for i in sampler.prompt_indices(size, number)])
        generators = [seeded_generator(sampler.seed, sample, SAMPLES) for sample in samples]
        noise = sampler.noise(generators)
        stops = [
            {plans[number * shared + part][1] for part in range(shared)} for number in numbers for _ in range(size)
        ]
        with sampler.meter.phase("rollout"):
            states = rollout_states(sampler.velocity_for, conditions, noise, sampler.sigmas, stops)
        batches = {}
        for step, (start, steps, trained) in plans.items():
            begin, part = (step - micro_steps.start) // shared * size, step % shared
            rows = range(begin, begin + size)
            own = [
                generators[row] if part == 0 else seeded_generator(sampler.seed, samples[row], SAMPLES, part)
                for row in rows
            ]
            latents = torch.stack([states[row][steps] for row in rows])
            batches[step] = ReflBatch(latents, start, conditions.take(rows), own, step // sampler.accumulate, trained)
        return batches

    def step(self, batch: ReflBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss, differentiable in the policy's LoRA, and the metrics.

        Metrics: `reward`, the mean score; `kl`, the mean squared difference of the policy's and the base model's
        velocities, only with a kl_weight above 0, since it costs a forward; `start_sigma`, the noise level of step
        batch.start; `signal`, the share of samples for which the reward's gradient is not zero, known after the
        backward pass. Updates with a second reward add `anchor`, the second reward's mean score. A pretrain_weight
        above 0 adds `pretrain`, the pretraining loss.
        """
        config, meter = self.config, self.sampler.meter
        with meter.phase("policy"):
            latents, kl, conditions = self._clean_latents(batch)
        generators = [*batch.generators] * (len(latents) // len(batch.generators))  # copies of a sample draw in turn
        signal = torch.zeros((), device=latents.device)

        def measure(gradient: Tensor) -> None:
            signal.copy_((gradient.flatten(1) != 0).any(dim=1).float().mean())

        if latents.requires_grad:
            latents.register_hook(measure)
        sigma = self._reward_sigma(generators)
        noise = self.sampler.noise(generators)
        objective = terms(self.reward, self.anchor, batch.update)
        with meter.phase("reward"):
            scores = {
                name: reward(latents, conditions, sigma=sigma, noise=noise) for name, (_, reward) in objective.items()
            }
        loss = reward_loss(scores["reward"], config.loss, config.target)  # the target is the first reward's
        loss = loss - sum(objective[name][0] * scores[name].mean() for name in scores if name != "reward")
        if config.variant == "direct_align":
            loss = loss * self.sampler.sigmas[batch.start] ** config.discount
        metrics = {name: own.mean() for name, own in scores.items()}
        if config.kl_weight > 0:
            loss = loss + self.kl_weight * kl.mean()
            metrics["kl"] = kl.mean()
        metrics |= {"start_sigma": self.sampler.sigmas[batch.start], "signal": signal}
        if config.pretrain_weight > 0:
            metrics["pretrain"] = self._pretrain_loss(batch.generators)
            loss = loss + config.pretrain_weight * metrics["pretrain"]
        return loss, metrics

    def reference_samples(self, count: int) -> tuple[Tensor, Conditions]:
        """Sample the first `count` training prompts with the base model. Return CPU latents and the conditions."""
        sampler, size = self.sampler, self.config.batch_size
        conditions = sampler.conditions.take(range(min(count, len(sampler.conditions))))
        parts = []
        with sampler.policy.reference():
            for start in range(0, len(conditions), size):
                indices = range(start, min(start + size, len(conditions)))
                noise = sampler.noise([seeded_generator(sampler.seed, index, 0, 1) for index in indices])
                parts.append(sampler.sample(conditions.take(indices, sampler.device), noise).cpu())
        return torch.cat(parts), conditions

    def _clean_latents(self, batch: ReflBatch) -> tuple[Tensor, Tensor, Conditions]:
        """Return the estimated clean latents, the velocity KL and the conditions. The first two carry gradients."""
        config, sampler, start = self.config, self.sampler, batch.start
        sigmas = sampler.sigmas
        copies = config.renoisings if config.variant in ("draft_lv", "direct_align") else 1
        conditions = batch.conditions.take([*range(len(batch.conditions))] * copies)
        velocity = sampler.velocity_for(conditions, None if config.guided_gradient else 1.0)

        def base_model(latents: Tensor, sigma: float) -> Tensor:
            with sampler.policy.reference():
                return velocity(latents, sigma)

        reference = base_model if config.kl_weight > 0 else None
        match config.variant:
            case "refl":
                clean = gradient_steps(velocity, reference, batch.latents, sigmas, start, config.grad_steps)
            case "drtune":
                free, first = sampler.velocity_for(conditions), batch.trained[0]
                clean = drtune_steps(velocity, free, reference, batch.latents, sigmas, first, start, batch.trained)
            case "draft_lv" | "direct_align":
                samples = torch.cat([batch.latents] * copies)
                noise = sampler.noise([*batch.generators] * copies)
                if config.variant == "draft_lv":
                    clean = renoised_steps(velocity, reference, samples, noise, sigmas[start])
                else:
                    after = min(start + config.stride, sampler.num_steps)
                    clean = direct_align_steps(velocity, reference, samples, noise, sigmas[start], sigmas[after])
        return *clean, conditions

    def _reward_sigma(self, generators: Sequence[torch.Generator]) -> Tensor | Sequence[float] | None:
        """Return one noise level per sample, a list of levels for all samples, or None for the reward's own level."""
        if self.config.reward_sigma_range is None:
            return self.config.reward_sigma
        low, high = self.config.reward_sigma_range
        drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        return to_device(low + (high - low) * drawn, self.sampler.device)

    def _pretrain_loss(self, generators: Sequence[torch.Generator]) -> Tensor:
        if self.pretrain_data is None:
            raise ValueError(f"refl.pretrain_weight: got {self.config.pretrain_weight} without pretrain_data")
        latents, conditions = self.pretrain_data
        chosen = [int(torch.randint(len(latents), (), generator=generator)) for generator in generators]
        velocity = self.sampler.velocity_for(conditions.take(chosen, self.sampler.device), 1.0)
        with self.sampler.meter.phase("pretrain"):
            return flow_matching_loss(velocity, to_device(latents[chosen], self.sampler.device), generators)
