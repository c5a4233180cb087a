"""Diffusion-DPO (arXiv 2311.12908, equation 14) for flow matching, on given pairs or on the policy's own samples.

A pair is a chosen and a rejected picture of one prompt. Both are noised with the same noise and the same sigma, and

    e    = mean |velocity(x_sigma, sigma) - (noise - x0)|^2        how badly a picture is denoised
    loss = -log sigmoid(-beta / 2 [(e_w - e_w^ref) - (e_l - e_l^ref)])

asks that, measured against the reference, the chosen picture w be denoised better than the rejected l. The argument of
the sigmoid is the margin of the implicit reward -beta / 2 (e - e^ref). No level is weighted. The mean is over C, H, W:
a beta that goes with a sum is smaller by their product.

`OfflineDpo` takes pairs from a data set. `OnlineDpo` samples several pictures per prompt, ranks them by a reward, and
makes a pair of the best and the worst; its reference may be refreshed with the policy's weights now and then. Both
offer the two callables of `loop.fit`. Everything random is drawn from generators keyed by (seed, place of the pair's
prompt in the run), so that an update is the same however it is divided into micro-batches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.align.candidates import Reward, scored_candidates
from dinalrm_align.align.dpo_config import DpoConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.data.batches import PairSource
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.data.prompts import prompt_indices
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.flow.noise import add_noise, sample_sigma, seeded_generator
from dinalrm_align.flow.sampling import Velocity, seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.cost import PhaseMeter

REFERENCE = "reference."
"""How the names of the refreshed reference's tensors begin in a checkpoint."""


def velocity_error(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """velocity, clean latents, noise (B, C, H, W) -> mean over C, H, W of |velocity - (noise - x0)|^2: (B,) float32."""
    return (velocity.float() - (noise.float() - latents.float())).square().mean(dim=(1, 2, 3))


def diffusion_dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_reference: Tensor,
    rejected_reference: Tensor,
    *,
    beta: float,
    label: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The loss of each pair and the margin of its implicit reward, both (N,) float32.

    chosen, rejected (N,): velocity errors of the policy at the SAME noise and sigma; chosen_reference,
    rejected_reference (N,): the reference's. label: the probability that a rater prefers `chosen`, a float or (N,); the
    loss is then -label log sigmoid(margin) - (1 - label) log sigmoid(-margin). Raises ValueError for differing shapes.
    """
    shapes = {tuple(e.shape) for e in (chosen, rejected, chosen_reference, rejected_reference)}
    if len(shapes) != 1 or chosen.dim() != 1:
        raise ValueError(f"velocity errors: got shapes {sorted(shapes)}; expected four of one shape (N,)")
    margin = -beta / 2 * ((chosen - chosen_reference) - (rejected - rejected_reference)).float()
    loss = -label * F.logsigmoid(margin) - (1 - label) * F.logsigmoid(-margin)
    return loss, margin


@dataclass(frozen=True)
class DpoBatch:
    """Pairs and what they are noised with.

    Args:
        pairs: M pictures in G groups, and N pairs of them, on the policy's device.
        noise: (D, M, C, H, W), for each of D draws; one for all pictures of a group.
        sigma: (D, M) in [0, 1], the same.
        metrics: numbers to record about how the pairs came about.
    """

    pairs: PairBatch
    noise: Tensor
    sigma: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N, what its mean is over."""
        return len(self.pairs.chosen)


def noised_pairs(
    pairs: PairBatch,
    generators: Sequence[torch.Generator],
    density: SigmaConfig,
    draws: int,
    metrics: Mapping[str, float] | None = None,
) -> DpoBatch:
    """Draw `draws` noises and levels for each group of `pairs` from its own one of the G generators."""
    shape, device = tuple(pairs.latents.shape[1:]), pairs.latents.device
    noise = torch.stack([seeded_noise(shape, [generator] * draws) for generator in generators], dim=1)
    sigma = torch.stack(
        [sample_sigma(density.density, draws, generator=g, **density.parameters()) for g in generators], dim=1
    )
    return DpoBatch(pairs, noise.to(device)[:, pairs.group], sigma.to(device)[:, pairs.group], metrics or {})


def preference_step(
    velocity: Velocity, reference: Velocity, batch: DpoBatch, beta: float
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The mean loss over draws and pairs, differentiable in the velocity's parameters, and what to record:

    implicit_accuracy, the share of pairs whose margin has the sign of their label (a margin of 0 counts half); margin;
    chosen_gain and rejected_gain, e^ref - e of either, positive where the policy denoises better than the reference;
    kl, the mean square of velocity less the reference's. reference: as velocity, without gradient.
    """
    pairs, losses, margins, gains, kls = batch.pairs, [], [], [], []
    for noise, sigma in zip(batch.noise, batch.sigma, strict=True):
        x = add_noise(pairs.latents, noise, sigma)
        v_reference = reference(x, sigma)
        v = velocity(x, sigma)
        error, error_reference = (velocity_error(each, pairs.latents, noise) for each in (v, v_reference))
        loss, margin = diffusion_dpo_loss(
            error[pairs.chosen], error[pairs.rejected], error_reference[pairs.chosen], error_reference[pairs.rejected],
            beta=beta, label=pairs.label,
        )  # fmt: skip
        losses.append(loss)
        margins.append(margin.detach())
        gains.append((error_reference - error).detach())
        kls.append((v - v_reference).detach().square().mean())
    margin, gain = torch.stack(margins), torch.stack(gains)
    agreement = (margin * (pairs.label - 0.5)).sign()
    return torch.stack(losses).mean(), {
        "implicit_accuracy": (0.5 + 0.5 * agreement).mean(),
        "margin": margin.mean(),
        "chosen_gain": gain[:, pairs.chosen].mean(),
        "rejected_gain": gain[:, pairs.rejected].mean(),
        "kl": torch.stack(kls).mean(),
        **batch.metrics,
    }


def best_and_worst(score: Tensor) -> tuple[Tensor, Tensor]:
    """score (B, n) of n samples of each prompt -> which one is the best and which the worst, (B,) int64 each."""
    return score.argmax(dim=1), score.argmin(dim=1)


def without_gradient(velocity: Velocity, weights: Callable[[], AbstractContextManager[None]]) -> Velocity:
    """`velocity` under other weights: weights() is entered for each call (`Policy.reference`)."""

    def frozen(latents: Tensor, sigma: float | Tensor) -> Tensor:
        with weights():
            return velocity(latents, sigma)

    return frozen


@dataclass
class OfflineDpo:
    """`batch_at` and `step` for `loop.fit`, on pairs of a data set; the reference is the base model.

    policy: on its device. pairs: whose latents and embeddings are of the policy's model. negative: conditions of one
    empty prompt, read when config.loss_guidance_scale is above 1.
    """

    policy: Policy
    pairs: PairSource
    negative: Conditions
    config: DpoConfig
    meter: PhaseMeter
    seed: int
    rank: int = 0
    num_processes: int = 1

    def velocity_for(self, conditions: Conditions, guidance_scale: float) -> Velocity:
        """The policy's velocity under these conditions, as the sampler wants it."""
        return self.policy.velocity_for(conditions, guidance_scale, self.negative)

    def batch_at(self, micro_step: int) -> DpoBatch:
        """This micro-step's pairs, noised: a pure function of it, seed and this process's place."""
        with self.meter.phase("data"):
            pairs = self.pairs.batch_at(micro_step, self.rank, self.num_processes).to(self.policy.device)
            first = (micro_step * self.num_processes + self.rank) * pairs.num_groups
            generators = [seeded_generator(self.seed, first + group, 2) for group in range(pairs.num_groups)]
            return noised_pairs(pairs, generators, self.config.sigma, self.config.draws)

    def step(self, batch: DpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss, differentiable in the policy's LoRA, and what to record (`preference_step`)."""
        velocity = self.velocity_for(batch.pairs.conditions, self.config.loss_guidance_scale)
        with self.meter.phase("policy"):
            return preference_step(velocity, without_gradient(velocity, self.policy.reference), batch, self.config.beta)


@dataclass
class OnlineDpo:
    """`batch_at` and `step` for `loop.fit`, on the best and the worst of several samples of each prompt.

    policy, reward: on one device, the reward frozen. sigmas: of sampling (`schedule_sigmas`). conditions: those of all
    training prompts, on any device. negative: of one empty prompt. latent_shape: (C, H, W). accumulate: micro-steps an
    update, for config.refresh_every. The refreshed reference is state: give this object to `loop.fit` as `state`.
    """

    policy: Policy
    reward: Reward
    sigmas: Sequence[float]
    conditions: Conditions
    negative: Conditions
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    config: DpoConfig
    meter: PhaseMeter
    seed: int
    rank: int = 0
    num_processes: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        self._reference = self.policy.weights() if self.config.refresh_every else None

    def velocity_for(self, conditions: Conditions, guidance_scale: float) -> Velocity:
        """The policy's velocity under these conditions, as the sampler wants it."""
        return self.policy.velocity_for(conditions, guidance_scale, self.negative)

    def reference(self) -> AbstractContextManager[None]:
        """Within the block the policy is the reference, without gradient: the base model, or a copy of itself."""
        return self.policy.reference() if self._reference is None else self.policy.with_weights(self._reference)

    def batch_at(self, micro_step: int) -> DpoBatch:
        """This micro-step's samples, the best and the worst of each prompt noised: a pure function of it, seed,
        weights, this process's place and the reference, which is refreshed here when its time has come.
        """
        config, device = self.config, self.policy.device
        self._refresh(micro_step)
        indices = prompt_indices(
            len(self.conditions), config.batch_size, micro_step, seed=self.seed, rank=self.rank,
            num_processes=self.num_processes,
        )  # fmt: skip
        first = (micro_step * self.num_processes + self.rank) * config.batch_size
        generators = [seeded_generator(self.seed, first + place, 3) for place in range(len(indices))]
        latents, score = scored_candidates(
            self._samplers_velocity, self.reward, self.conditions.take(indices), generators,
            count=config.group_size, latent_shape=self.latent_shape, sigmas=self.sigmas, device=device,
            reward_sigma=config.reward_sigma, batch_size=config.sample_batch, meter=self.meter,
        )  # fmt: skip
        best, worst = best_and_worst(score)
        rows = torch.arange(len(indices))
        pairs = PairBatch.plain(latents[rows, best], latents[rows, worst], self.conditions.take(indices, device))
        metrics = {
            "reward": float(score.mean()),
            "reward_best": float(score.amax(dim=1).mean()),
            "reward_worst": float(score.amin(dim=1).mean()),
        }
        return noised_pairs(pairs, generators, config.sigma, config.draws, metrics)

    def step(self, batch: DpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss, differentiable in the policy's LoRA, and what to record (`preference_step`, and the rewards of all
        samples, of the best and of the worst)."""
        velocity = self.velocity_for(batch.pairs.conditions, self.config.loss_guidance_scale)
        with self.meter.phase("policy"):
            return preference_step(velocity, without_gradient(velocity, self.reference), batch, self.config.beta)

    def state_tensors(self) -> dict[str, Tensor]:
        """The refreshed reference; nothing where the reference is the base model."""
        return {REFERENCE + name: tensor for name, tensor in (self._reference or {}).items()}

    def is_common(self) -> bool:
        """Always: the reference is one for all processes."""
        return True

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave. ValueError when it is not the reference of such a policy."""
        weights = {name.removeprefix(REFERENCE): t.to(self.policy.device, copy=True) for name, t in tensors.items()}
        if self._reference is None and weights:
            raise ValueError(
                f"got the {len(weights)} tensors of a refreshed reference, and dpo.refresh_every is 0: resume with the "
                "settings that the run was started with"
            )
        if self._reference is not None:
            self.policy.check_weights(weights)
            self._reference = weights

    def _samplers_velocity(self, conditions: Conditions) -> Velocity:
        velocity = self.velocity_for(conditions, self.guidance_scale)
        return velocity if self.config.sampler == "policy" else without_gradient(velocity, self.reference)

    def _refresh(self, micro_step: int) -> None:
        """At the first micro-step of every refresh_every-th update, but for the very first, copy the policy."""
        every = self.config.refresh_every * self.accumulate
        if every and micro_step and micro_step % every == 0:
            self._reference = self.policy.weights()
