"""Diffusion-DPO (arXiv 2311.12908, equation 14) for flow matching, on given pairs or on the policy's own samples.

A pair is a chosen and a rejected image of one prompt. Both are noised with the same noise to the same sigma, and

    e    = mean |velocity(x_sigma, sigma) - (noise - x0)|^2        the denoising error of an image
    loss = -log sigmoid(-beta / 2 [(e_w - e_w^ref) - (e_l - e_l^ref)])

makes the policy denoise the chosen image w better, relative to the reference, than the rejected image l. The argument
of the sigmoid is the margin of the implicit reward -beta / 2 (e - e^ref). Noise levels are not weighted. Means are over
C, H, W: a beta for sums is smaller by their product.

`OfflineDpo` reads pairs from a data set. `OnlineDpo` samples several images per prompt, ranks them by a reward, and
pairs the best with the worst; its reference may be refreshed with the policy's weights. RNG streams are keyed by (seed,
global index of the pair's prompt), so that an update does not depend on its division into micro-batches.
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
    """Pairs and their noise.

    Args:
        pairs: M images in G groups, and N pairs of them, on the policy's device.
        noise: (D, M, C, H, W), for each of D draws; equal within a group.
        sigma: (D, M) in [0, 1]; equal within a group.
        metrics: numbers to record about the pairs.
    """

    pairs: PairBatch
    noise: Tensor
    sigma: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """N, the number of items that the loss is the mean over."""
        return len(self.pairs.chosen)


def noised_pairs(
    pairs: PairBatch,
    generators: Sequence[torch.Generator],
    density: SigmaConfig,
    draws: int,
    metrics: Mapping[str, float] | None = None,
) -> DpoBatch:
    """Draw `draws` noises and levels for each of the G groups, each group from its own generator."""
    shape, device = tuple(pairs.latents.shape[1:]), pairs.latents.device
    noise = torch.stack([seeded_noise(shape, [generator] * draws) for generator in generators], dim=1)
    sigma = torch.stack(
        [sample_sigma(density.density, draws, generator=g, **density.parameters()) for g in generators], dim=1
    )
    return DpoBatch(pairs, noise.to(device)[:, pairs.group], sigma.to(device)[:, pairs.group], metrics or {})


def dpo_step(
    velocity: Velocity, reference: Velocity, batch: DpoBatch, beta: float
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The mean loss over draws and pairs, differentiable in the velocity's parameters, and metrics.

    implicit_accuracy: share of pairs whose margin has the sign of their label (0 counts half); margin; chosen_gain and
    rejected_gain: e^ref - e, positive where the policy denoises better than the reference; kl: mean square of
    velocity - reference velocity. reference: as velocity, without gradient.
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
    """`velocity` with other weights: the context manager weights() is entered for each call (`Policy.reference`)."""

    def frozen(latents: Tensor, sigma: float | Tensor) -> Tensor:
        with weights():
            return velocity(latents, sigma)

    return frozen


@dataclass
class OfflineDpo:
    """`batch_at` and `step` for `train.loop.fit`, on pairs of a data set; the reference is the base model.

    Args:
        sampler: with the policy, and the negative conditions for config.loss_guidance_scale above 1.
        pairs: latents and embeddings made with the policy's model.
        config: see `DpoConfig`.
    """

    sampler: Sampler
    pairs: PairSource
    config: DpoConfig

    def batch_at(self, micro_step: int) -> DpoBatch:
        """This micro-step's pairs, noised: a pure function of micro-step, seed and rank."""
        sampler = self.sampler
        with sampler.meter.phase("data"):
            pairs = self.pairs.batch_at(micro_step, sampler.rank, sampler.num_processes).to(sampler.device)
            first = sampler.first_sample(pairs.num_groups, micro_step)
            generators = [seeded_generator(sampler.seed, first + group, 2) for group in range(pairs.num_groups)]
            return noised_pairs(pairs, generators, self.config.sigma, self.config.draws)

    def step(self, batch: DpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss, differentiable in the policy's LoRA, and the metrics of `dpo_step`."""
        velocity = self.sampler.velocity_for(batch.pairs.conditions, self.config.loss_guidance_scale)
        reference = without_gradient(velocity, self.sampler.policy.reference)
        with self.sampler.meter.phase("policy"):
            return dpo_step(velocity, reference, batch, self.config.beta)


@dataclass
class OnlineDpo:
    """`batch_at` and `step` for `train.loop.fit`, on the best and the worst of several samples of each prompt.

    The refreshed reference is method state: pass this object to the run as `state`.

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
        """Within the block the policy is the reference, without gradient: the base model, or a copy of the policy."""
        policy = self.sampler.policy
        return policy.reference() if self._reference is None else policy.with_weights(self._reference)

    def batch_at(self, micro_step: int) -> DpoBatch:
        """This micro-step's best and worst samples, noised: a pure function of micro-step, seed, weights, rank and the
        reference, which is refreshed here when it is due.
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
        """The loss, differentiable in the policy's LoRA, and metrics: those of `dpo_step`, and the rewards of all
        samples, of the best and of the worst."""
        velocity = self.sampler.velocity_for(batch.pairs.conditions, self.config.loss_guidance_scale)
        with self.sampler.meter.phase("policy"):
            return dpo_step(velocity, without_gradient(velocity, self.reference), batch, self.config.beta)

    def state_tensors(self) -> dict[str, Tensor]:
        """The refreshed reference; empty where the reference is the base model."""
        return {REFERENCE + name: tensor for name, tensor in (self._reference or {}).items()}

    def is_common(self) -> bool:
        """Always true: all ranks have the same reference."""
        return True

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. ValueError when it is not the reference of such a policy."""
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
