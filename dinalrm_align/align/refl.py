"""ReFL (reward feedback learning, arXiv 2304.05977) on flow matching, and its relatives: rewards followed by gradient.

An update, as DiNa-LRM's alignment runs make it (arXiv 2602.11146):

1. roll out from noise without gradient, with guidance, to a late step m drawn at random;
2. take K steps with gradient, on the prompt alone unless asked otherwise; the last gives x0_hat = x - sigma velocity;
3. score x0_hat with a frozen reward and descend  mean(target - score) + kl_weight mean|velocity - velocity_reference|^2
   (+ pretrain_weight times a flow-matching loss on pictures).

The relatives (`ReflConfig.variant`) differ in the steps that carry the gradient:

    refl           ReFL; with K gradient steps, all one after the other, DRaFT-K (arXiv 2309.17400)
    draft_lv       DRaFT-LV: a finished sample, noised anew n times, and one step from each (`renoised_steps`)
    drtune         DRTune (arXiv 2405.00760): K steps spread over the rollout, inputs detached (`drtune_steps`)
    direct_align   SRPO's Direct-Align (arXiv 2509.06942): known noise in and out again (`direct_align_steps`)

With a latent reward nothing is decoded. The arithmetic is in plain functions; `Refl` holds what they need and offers
the two callables of `loop.fit`. What is drawn for a sample depends on the seed and on the sample's number among those
of all processes, which step carries the gradient on the seed and the micro-step: so an update is the same however many
processes share its samples, and all of them have as many steps to make.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.align.anchor import Reward, Terms, terms
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.refl_config import ReflConfig
from dinalrm_align.data.prompts import prompt_indices
from dinalrm_align.flow.noise import add_noise, denoised, sample_sigma, seeded_generator
from dinalrm_align.flow.sampling import Velocity, ode_step, rollout, seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.cost import PhaseMeter

STEPS, SAMPLES = 4, 5
"""Keys of the generators."""


def draw_start(num_steps: int, grad_steps: int, earliest: float, generator: torch.Generator) -> int:
    """The first gradient step, uniform over round(earliest num_steps) ... num_steps - grad_steps; the last if none."""
    last = num_steps - grad_steps
    first = min(round(earliest * num_steps), last)
    return int(torch.randint(first, last + 1, (), generator=generator))


def gradient_steps(
    velocity: Velocity, reference: Velocity, latents: Tensor, sigmas: Sequence[float], start: int, count: int
) -> tuple[Tensor, Tensor]:
    """`count` steps with gradient from latents (B, C, H, W) at sigmas[start].

    Returns x0_hat (B, C, H, W), the last step's estimate of the clean latents, and the velocity KL (B,): the mean
    square of velocity less reference over C, H, W and the steps, both at one input, which the reference gets detached.
    Both are float32 and differentiable in the velocity's parameters. (Other projects divide this square by 2 sigma^2 or
    by a step's variance: coefficients do not carry over.)
    """
    kl = torch.zeros(len(latents), device=latents.device)
    for index in range(start, start + count):
        v = velocity(latents, sigmas[index])
        v_reference = reference(latents.detach(), sigmas[index])
        kl = kl + (v - v_reference).square().mean(dim=(1, 2, 3)) / count
        if index < start + count - 1:
            latents = ode_step(latents, v, sigmas[index], sigmas[index + 1])
    return denoised(latents, v, sigmas[start + count - 1]), kl


def draw_trained(stop: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """DRTune's trained steps: `count` of the steps 0 ... stop, evenly spaced, the first drawn at random."""
    interval = (stop + 1) // count
    first = int(torch.randint(stop + 1 - (count - 1) * interval, (), generator=generator))
    return tuple(first + place * interval for place in range(count))


def drtune_steps(
    velocity: Velocity,
    free: Velocity,
    reference: Velocity,
    latents: Tensor,
    sigmas: Sequence[float],
    first: int,
    stop: int,
    trained: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """DRTune (arXiv 2405.00760): every step from sigmas[first] to sigmas[stop], where the clean latents are estimated.

    The network's input is detached at every step, so that the gradient takes the linear road of the update alone: of
    x0_hat = x_first + sum_i (sigma_i+1 - sigma_i) v_i - sigma_stop v_stop only the v_i with i in `trained` carry one,
    and none passes through another. These come from `velocity`, the others from `free`, without gradient.

    Returns x0_hat (B, C, H, W) and the velocity KL (B,) over the trained steps, as `gradient_steps` does.
    """
    kl = torch.zeros(len(latents), device=latents.device)
    for index in range(first, stop + 1):
        x = latents.detach()
        if index in trained:
            v = velocity(x, sigmas[index])
            kl = kl + (v - reference(x, sigmas[index])).square().mean(dim=(1, 2, 3)) / len(trained)
        else:
            with torch.no_grad():
                v = free(x, sigmas[index])
        if index < stop:
            latents = ode_step(latents, v, sigmas[index], sigmas[index + 1])
    return denoised(latents, v, sigmas[stop]), kl


def renoised_steps(
    velocity: Velocity, reference: Velocity, latents: Tensor, noise: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """DRaFT-LV (arXiv 2309.17400): the last step again, from finished samples that are noised anew.

    latents, noise (B, C, H, W): samples, and noise to take them back to `sigma` with; they carry no gradient. For n
    noises of each sample repeat the samples n times: the mean over all is the average that lowers the variance.
    Returns x0_hat (B, C, H, W) and the velocity KL (B,), as `gradient_steps` does.
    """
    x = add_noise(latents.detach(), noise, sigma)
    return gradient_steps(velocity, reference, x, [sigma], 0, 1)


def direct_align_steps(
    velocity: Velocity, reference: Velocity, latents: Tensor, noise: Tensor, sigma: float, sigma_next: float
) -> tuple[Tensor, Tensor]:
    """Direct-Align (SRPO, arXiv 2509.06942): one step from known noise, then what is left of it is taken out.

    A finished sample x0 is noised with known noise to sigma and takes one step to sigma_next < sigma, x'; what is left
    of the noise is known, so that x0_hat = (x' - sigma_next noise) / (1 - sigma_next) is nearly clean at any sigma.
    With the true velocity it is x0 itself; its derivative in the velocity is -(sigma - sigma_next) / (1 - sigma_next).

    latents, noise (B, C, H, W) carry no gradient. Returns x0_hat and the velocity KL (B,), as `gradient_steps` does.
    """
    x = add_noise(latents.detach(), noise, sigma)
    v = velocity(x, sigma)
    kl = (v - reference(x, sigma)).square().mean(dim=(1, 2, 3))
    return (ode_step(x, v, sigma, sigma_next) - sigma_next * noise) / (1 - sigma_next), kl


def reward_loss(score: Tensor, form: str, target: float) -> Tensor:
    """score (B,) -> a scalar to descend: mean(target - score), or with form "relu" mean(relu(target - score))."""
    gap = target - score
    match form:
        case "linear":
            return gap.mean()
        case "relu":
            return F.relu(gap).mean()
    raise ValueError(f"unknown reward loss {form!r}; known: linear, relu")


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], latents: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """The pretraining loss of the base model, a scalar: mean |velocity(x_sigma, sigma) - (noise - x0)|^2.

    latents (B, C, H, W), clean and scaled; sigma (B,) logit-normal(0, 1) as SD3 was trained; generators: B, CPU.
    """
    noise = seeded_noise(tuple(latents.shape[1:]), generators).to(latents.device)
    sigma = torch.cat([sample_sigma("logit_normal", 1, generator=generator) for generator in generators])
    sigma = sigma.to(latents.device)
    return (velocity(add_noise(latents, noise, sigma), sigma) - (noise - latents)).square().mean()


@dataclass(frozen=True)
class ReflBatch:
    """Where the gradient begins, and all that was drawn for it.

    latents: (B, C, H, W) at sigmas[start]; of draft_lv and direct_align the finished samples; of drtune those at
        sigmas[trained[0]].
    start: the step that the gradient is of; of drtune the last, where the clean latents are estimated.
    conditions: of the B samples.
    generators: of the B samples, for what is drawn later.
    terms: what is climbed in this micro-step.
    trained: the steps that drtune trains.
    """

    latents: Tensor
    start: int
    conditions: Conditions
    generators: Sequence[torch.Generator]
    terms: Terms
    trained: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """B, what the loss is the mean over."""
        return len(self.latents)


@dataclass
class Refl:
    """`batch_at` and `step` for `loop.fit`.

    policy, reward: on one device, the reward frozen. sigmas: of the training rollout (`schedule_sigmas`). conditions:
    those of all training prompts, on any device. negative: of one empty prompt. latent_shape: (C, H, W). pictures:
    latents (N, C, H, W) and their N conditions, for the pretraining loss, if it is on.
    """

    policy: Policy
    reward: Reward
    sigmas: Sequence[float]
    conditions: Conditions
    negative: Conditions
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    config: ReflConfig
    meter: PhaseMeter
    seed: int
    rank: int = 0
    num_processes: int = 1
    pictures: tuple[Tensor, Conditions] | None = None

    def __post_init__(self) -> None:
        if len(self.sigmas) - 1 < self.config.grad_steps:
            raise ValueError(f"got grad_steps {self.config.grad_steps} in a rollout of {len(self.sigmas) - 1} steps")

    def velocity_for(self, conditions: Conditions, guidance_scale: float) -> Velocity:
        """The policy's velocity under these conditions."""
        return self.policy.velocity_for(conditions, guidance_scale, self.negative)

    def batch_at(self, micro_step: int) -> ReflBatch:
        """This micro-step's rollout, without gradient: a pure function of it, seed, weights and the process's place."""
        size = self.config.batch_size
        first = (micro_step * self.num_processes + self.rank) * size
        generators = [seeded_generator(self.seed, first + place, SAMPLES) for place in range(size)]
        generator = seeded_generator(self.seed, micro_step, STEPS)
        indices = prompt_indices(
            len(self.conditions), size, micro_step, seed=self.seed, rank=self.rank, num_processes=self.num_processes
        )
        conditions = self.conditions.take(indices, self.policy.device)
        noise = seeded_noise(self.latent_shape, generators).to(self.policy.device)
        variant, grad_steps, trained = self.config.variant, self.config.grad_steps, ()
        together = grad_steps if variant == "refl" else 1
        start = draw_start(len(self.sigmas) - 1, together, self.config.earliest, generator)
        rolled = start if variant == "refl" else len(self.sigmas) - 1
        if variant == "drtune":
            trained = draw_trained(start, min(grad_steps, start + 1), generator)
            rolled = trained[0]
        with self.meter.phase("rollout"), torch.no_grad():
            velocity = self.velocity_for(conditions, self.guidance_scale)
            latents = rollout(velocity, noise, self.sigmas[: rolled + 1])
        return ReflBatch(latents, start, conditions, generators, terms(self.reward, micro_step), trained)

    def step(self, batch: ReflBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss, differentiable in the policy's LoRA, and what to record: reward (and anchor),
        kl and the level m was at.
        """
        config = self.config
        with self.meter.phase("policy"):
            latents, kl, conditions = self._clean_latents(batch)
        generators = [*batch.generators] * (len(latents) // len(batch.generators))  # a sample's copies draw in turn
        sigma = self._reward_sigma(generators)
        noise = seeded_noise(self.latent_shape, generators).to(latents.device)
        asked = dict(prompts=conditions.prompts, sigma=sigma, noise=noise)
        with self.meter.phase("reward"):
            scores = {name: reward(latents, **asked) for name, (_, reward) in batch.terms.items()}
        score = sum(weight * scores[name] for name, (weight, _) in batch.terms.items())
        loss = reward_loss(score, config.loss, config.target)
        if config.variant == "direct_align":
            loss = loss * self.sigmas[batch.start] ** config.discount
        if config.kl_weight > 0:
            loss = loss + config.kl_weight * kl.mean()
        metrics = {name: own.mean() for name, own in scores.items()}
        metrics |= {"kl": kl.mean(), "start_sigma": self.sigmas[batch.start]}
        if config.pretrain_weight > 0:
            metrics["pretrain"] = self._pretrain_loss(batch.generators)
            loss = loss + config.pretrain_weight * metrics["pretrain"]
        return loss, metrics

    def reference_samples(self, count: int) -> tuple[Tensor, Conditions]:
        """The base model's own samples for the first `count` training prompts (all, if fewer): latents and conditions.

        What `pictures` can be when there are no others: the pretraining loss then holds the policy to its beginnings.
        """
        conditions = self.conditions.take(range(min(count, len(self.conditions))))
        parts = []
        with self.policy.reference():
            for start in range(0, len(conditions), self.config.batch_size):
                indices = range(start, min(start + self.config.batch_size, len(conditions)))
                generators = [seeded_generator(self.seed, index, 0, 1) for index in indices]
                noise = seeded_noise(self.latent_shape, generators).to(self.policy.device)
                velocity = self.velocity_for(conditions.take(indices, self.policy.device), self.guidance_scale)
                parts.append(rollout(velocity, noise, self.sigmas).cpu())
        return torch.cat(parts), conditions

    def _clean_latents(self, batch: ReflBatch) -> tuple[Tensor, Tensor, Conditions]:
        """What is scored, differentiable in the LoRA, its velocity KL, and its conditions."""
        config, sigmas, start = self.config, self.sigmas, batch.start
        copies = config.renoisings if config.variant in ("draft_lv", "direct_align") else 1
        conditions = batch.conditions.take([*range(len(batch.conditions))] * copies)
        velocity = self.velocity_for(conditions, self.guidance_scale if config.guided_gradient else 1.0)

        def reference(latents: Tensor, sigma: float) -> Tensor:
            with self.policy.reference():
                return velocity(latents, sigma)

        match config.variant:
            case "refl":
                clean = gradient_steps(velocity, reference, batch.latents, sigmas, start, config.grad_steps)
            case "drtune":
                free, first = self.velocity_for(conditions, self.guidance_scale), batch.trained[0]
                clean = drtune_steps(velocity, free, reference, batch.latents, sigmas, first, start, batch.trained)
            case "draft_lv" | "direct_align":
                samples = torch.cat([batch.latents] * copies)
                noise = seeded_noise(self.latent_shape, [*batch.generators] * copies).to(samples.device)
                if config.variant == "draft_lv":
                    clean = renoised_steps(velocity, reference, samples, noise, sigmas[start])
                else:
                    after = min(start + config.stride, len(sigmas) - 1)
                    clean = direct_align_steps(velocity, reference, samples, noise, sigmas[start], sigmas[after])
        return *clean, conditions

    def _reward_sigma(self, generators: Sequence[torch.Generator]) -> Tensor | Sequence[float] | None:
        """What the reward is told: a level per picture, the configured levels, or None for the reward's own."""
        if self.config.reward_sigma_range is None:
            return self.config.reward_sigma
        low, high = self.config.reward_sigma_range
        drawn = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        return (low + (high - low) * drawn).to(self.policy.device)

    def _pretrain_loss(self, generators: Sequence[torch.Generator]) -> Tensor:
        if self.pictures is None:
            raise ValueError(f"pretrain_weight is {self.config.pretrain_weight}, and Refl was given no pictures")
        latents, conditions = self.pictures
        chosen = [int(torch.randint(len(latents), (), generator=generator)) for generator in generators]
        velocity = self.velocity_for(conditions.take(chosen, self.policy.device), 1.0)
        with self.meter.phase("pretrain"):
            return flow_matching_loss(velocity, latents[chosen].to(self.policy.device), generators)
