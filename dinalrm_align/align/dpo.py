"""Diffusion-DPO (arXiv 2311.12908, equation 14) for flow matching, on given pairs or on the policy's own samples.

A pair is a chosen image w and a rejected image l of one prompt. Both get the same noise and the same sigma. With

    e    = mean |velocity(x_sigma, sigma) - (noise - x0)|^2        the denoising error of an image
    loss = -log sigmoid(-beta / 2 [(e_w - e_w^ref) - (e_l - e_l^ref)])

the policy learns to denoise w better than l, relative to the reference. The argument of the sigmoid is the margin of
the implicit reward -beta / 2 (e - e^ref). Noise levels are not weighted. Errors are means over C, H, W; code that uses
sums needs a beta that is smaller by the factor C H W.

`OfflineDpo` reads pairs from a data set. `OnlineDpo` samples several images per prompt, ranks them by a reward, and
pairs the best with the worst; the policy can replace its reference at intervals. RNG streams are keyed by (seed, global
index of the pair's prompt), so that an update does not depend on its division into micro-batches.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.align.candidates import scored_candidates
from dinalrm_align.align.dpo_config import DpoConfig
from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.data.batches import PairSource
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.flow.noise import add_noise, sample_sigma, seeded_generator
from dinalrm_align.flow.sampling import Velocity, seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward

REFERENCE = "reference."
"""Prefix of the refreshed reference's tensors in a checkpoint."""


def velocity_error(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Return mean |velocity - (noise - x0)|^2 over C, H, W: (B,) float32. All arguments are (B, C, H, W)."""
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
    """Return the loss of each pair and the margin of its implicit reward, both (N,) float32.

    Raises ValueError unless all velocity errors have the same shape (N,).

    Args:
        chosen, rejected: velocity errors of the policy, at the SAME noise and sigma.
        chosen_reference, rejected_reference: velocity errors of the reference, at this noise and sigma.
        label: p, the probability that a rater prefers `chosen`, a float or (N,), in
            loss = -p log sigmoid(margin) - (1 - p) log sigmoid(-margin).
    """
    shapes = {tuple(e.shape) for e in (chosen, rejected, chosen_reference, rejected_reference)}
    if len(shapes) != 1 or chosen.dim() != 1:
        raise ValueError(f"velocity errors: got shapes {sorted(shapes)}; expected four of one shape (N,)")
    margin = -beta / 2 * ((chosen - chosen_reference) - (rejected - rejected_reference)).float()
    loss = -label * F.logsigmoid(margin) - (1 - label) * F.logsigmoid(-margin)
    return loss, margin


@dataclass(frozen=True)
class DpoBatch:
    """Pairs and their noise.

    Args:
        pairs: M images of G prompts (groups), and N pairs of these images, on the policy's device.
        noise: (D, M, C, H, W), D draws; equal within a group.
        sigma: (D, M) in [0, 1]; equal within a group.
        metrics: metrics of the pairs, to be recorded.
    """

    pairs: PairBatch
    noise: Tensor
    sigma: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N, the number of pairs that the loss is averaged over."""
        return len(self.pairs.chosen)


def noised_pairs(
    pairs: PairBatch,
    generators: Sequence[torch.Generator],
    density: SigmaConfig,
    draws: int,
    metrics: Mapping[str, float] | None = None,
) -> DpoBatch:
    """Draw noise and sigma `draws` times for each of the G groups, with one generator per group. Return the batch."""
    shape, device = tuple(pairs.latents.shape[1:]), pairs.latents.device
    noise = torch.stack([seeded_noise(shape, [generator] * draws) for generator in generators], dim=1)
    sigma = torch.stack(
        [sample_sigma(density.density, draws, generator=g, **density.parameters()) for g in generators], dim=1
    )
    return DpoBatch(pairs, noise.to(device)[:, pairs.group], sigma.to(device)[:, pairs.group], metrics or {})


def dpo_step(
    velocity: Velocity, reference: Velocity, batch: DpoBatch, beta: float
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Return the mean loss over draws and pairs, differentiable in the velocity's parameters, and metrics by name.

    implicit_accuracy: share of pairs whose margin has the sign of label - 1/2 (0 counts half). margin: mean margin.
    chosen_gain, rejected_gain: mean e^ref - e, positive if the policy denoises better than the reference. kl: mean
    square of velocity - reference. reference: the reference's velocity, without gradient.
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


def without_gradient(velocity: Velocity, weights: Callable[[], AbstractContextManager[None]]) -> Velocity:
    """Return `velocity` computed without gradient within the context manager weights(), which sets other weights."""

    def frozen(latents: Tensor, sigma: float | Tensor) -> Tensor:
        with weights():
            return velocity(latents, sigma)

    return frozen


@dataclass
class OfflineDpo:
    """Diffusion-DPO for `train.loop.fit`, on the pairs of a data set. The reference is the base model.

    Args:
        sampler: has the policy, and the negative conditions that config.loss_guidance_scale above 1 needs.
        pairs: latents and embeddings made with the policy's base model.
        config: see `DpoConfig`.
    """

    sampler: Sampler
    pairs: PairSource
    config: DpoConfig

    def batch_at(self, micro_step: int) -> DpoBatch:
        """Return this micro-step's pairs with noise; they depend only on micro-step, seed and rank."""
        sampler = self.sampler
        with sampler.meter.phase("data"):
            pairs = self.pairs.batch_at(micro_step, sampler.rank, sampler.num_processes).to(sampler.device)
            first = sampler.first_sample(pairs.num_groups, micro_step)
            generators = [seeded_generator(sampler.seed, first + group, 2) for group in range(pairs.num_groups)]
            return noised_pairs(pairs, generators, self.config.sigma, self.config.draws)

    def step(self, batch: DpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss, differentiable in the policy's LoRA, and the metrics of `dpo_step`."""
        velocity = self.sampler.velocity_for(batch.pairs.conditions, self.config.loss_guidance_scale)
        reference = without_gradient(velocity, self.sampler.policy.reference)
        with self.sampler.meter.phase("policy"):
            return dpo_step(velocity, reference, batch, self.config.beta)


@dataclass
class OnlineDpo:
    """Diffusion-DPO for `train.loop.fit`, on the best and the worst of several samples of each prompt.

    Pass this object to the run as `state`, so that checkpoints contain the refreshed reference.

    Args:
        sampler: samples training prompts.
        reward: frozen, on the policy's device; no gradient is needed.
        config: see `DpoConfig`.
    """

    sampler: Sampler
    reward: Reward
    config: DpoConfig

    def __post_init__(self) -> None:
        self._reference = self.sampler.policy.weights() if self.config.refresh_every else None

    def reference(self) -> AbstractContextManager[None]:
        """Within the block, the policy has the reference's weights (base model or earlier policy) and no gradient."""
        policy = self.sampler.policy
        return policy.reference() if self._reference is None else policy.with_weights(self._reference)

    def batch_at(self, micro_step: int) -> DpoBatch:
        """Refresh the reference if it is due; return this micro-step's best and worst samples with noise.

        The batch depends only on micro-step, seed, rank, and the weights of policy and reference.
        """
        config, sampler = self.config, self.sampler
        self._refresh(micro_step)
        indices = sampler.prompt_indices(config.batch_size, micro_step)
        first = sampler.first_sample(config.batch_size, micro_step)
        generators = [seeded_generator(sampler.seed, first + index, 3) for index in range(len(indices))]
        latents, score = scored_candidates(
            sampler, self.reward, sampler.conditions.take(indices), generators, count=config.group_size,
            reward_sigma=config.reward_sigma, batch_size=config.sample_batch, velocity_for=self._sampling_velocity,
        )  # fmt: skip
        rows, best, worst = torch.arange(len(indices)), score.argmax(dim=1), score.argmin(dim=1)
        pairs = PairBatch.plain(latents[rows, best], latents[rows, worst], sampler.take(indices))
        metrics = {
            "reward": float(score.mean()),
            "reward_best": float(score.amax(dim=1).mean()),
            "reward_worst": float(score.amin(dim=1).mean()),
        }
        return noised_pairs(pairs, generators, config.sigma, config.draws, metrics)

    def step(self, batch: DpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss, differentiable in the policy's LoRA, and metrics by name.

        The metrics are those of `dpo_step`, and the mean scores of all, the best and the worst samples.
        """
        velocity = self.sampler.velocity_for(batch.pairs.conditions, self.config.loss_guidance_scale)
        with self.sampler.meter.phase("policy"):
            return dpo_step(velocity, without_gradient(velocity, self.reference), batch, self.config.beta)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the refreshed reference by name; empty if the reference is the base model."""
        return {REFERENCE + name: tensor for name, tensor in (self._reference or {}).items()}

    def is_common(self) -> bool:
        """Return True: all ranks have the same reference."""
        return True

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_tensors`. Raises ValueError if the tensors do not fit this policy."""
        device = self.sampler.device
        weights = {name.removeprefix(REFERENCE): t.to(device, copy=True) for name, t in tensors.items()}
        if self._reference is None and weights:
            raise ValueError(
                f"dpo.refresh_every: got 0 for a run whose checkpoint holds a refreshed reference ({len(weights)} "
                "tensors): resume with the settings of the run"
            )
        if self._reference is not None:
            self.sampler.policy.check_weights(weights)
            self._reference = weights

    def _sampling_velocity(self, conditions: Conditions) -> Velocity:
        velocity = self.sampler.velocity_for(conditions)
        return velocity if self.config.sampler == "policy" else without_gradient(velocity, self.reference)

    def _refresh(self, micro_step: int) -> None:
        """Copy the policy at the first micro-step of every refresh_every-th update, except the very first."""
        every = self.config.refresh_every * self.sampler.accumulate
        if every and micro_step and micro_step % every == 0:
            self._reference = self.sampler.policy.weights()
