"""Diffusion-DPO (arXiv 2311.12908, equation 14) for flow matching, on given pairs or on the policy's own samples.

A pair is a chosen image w and a rejected image l of one prompt. Both get the same noise and the same sigma. The loss is

    loss = -log sigmoid(-beta / 2 [(e_w - e_w^ref) - (e_l - e_l^ref)]),
    e    = mean |velocity(x_sigma, sigma) - (noise - x0)|^2        denoising error of the policy (e^ref: reference)

The policy learns to denoise w better than l, relative to the reference. The implicit reward of an image is -beta / 2
(e - e^ref). The sigmoid's argument, called margin, is the implicit reward of w minus that of l. All noise levels
have the same weight. Errors are means over C, H, W. A beta from code that uses sums must be multiplied by C H W here.

`OfflineDpo` reads pairs from a data set. `OnlineDpo` samples several images per prompt, ranks them by a reward, and
pairs the best with the worst; it can replace the reference by the current policy at intervals. RNG streams are keyed by
(seed, global index of the pair's prompt), so that an update does not depend on its division into micro-batches.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.align.candidates import scored_candidates
from dinalrm_align.align.dpo_config import DpoConfig
from dinalrm_align.align.groups import check_whole_groups
from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.align.signal import equal_scores, has_spread
from dinalrm_align.data.batches import PairSource
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.flow.noise import add_noise, sample_sigma, seeded_generator
from dinalrm_align.flow.sampling import Velocity, seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.device import to_device

REFERENCE = "reference."
"""Prefix of the names of the reference's LoRA tensors in a checkpoint."""


def velocity_error(velocity: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
    """Return the denoising error (B,) float32: the mean of |velocity - (noise - latents)|^2 over C, H, W."""
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
    """Return the Diffusion-DPO loss and the margin of N pairs, both (N,) float32.

    margin = -beta / 2 [(chosen - chosen_reference) - (rejected - rejected_reference)]
    loss   = -p log sigmoid(margin) - (1 - p) log sigmoid(-margin)

    Args:
        chosen, rejected: `velocity_error` of the policy for the two images of each pair, (N,). Both images of a pair
            must have the same noise and sigma.
        chosen_reference, rejected_reference: `velocity_error` of the reference, (N,), with the same noise and sigma.
        label: p, the probability that a rater prefers the chosen image; a float or (N,).
    """
    shapes = {tuple(e.shape) for e in (chosen, rejected, chosen_reference, rejected_reference)}
    if len(shapes) != 1 or chosen.dim() != 1:
        raise ValueError(f"velocity errors: got shapes {sorted(shapes)}; expected four of one shape (N,)")
    margin = -beta / 2 * ((chosen - chosen_reference) - (rejected - rejected_reference)).float()
    loss = -label * F.logsigmoid(margin) - (1 - label) * F.logsigmoid(-margin)
    return loss, margin


@dataclass(frozen=True)
class DpoBatch:
    """A micro-batch of preference pairs, with the noise and the noise levels at which the loss is computed.

    Args:
        pairs: N pairs formed from M images, on the policy's device. The images of one prompt are a group.
        noise: (D, M, C, H, W), D noise draws per image. All images of a group have the same noise.
        sigma: (D, M), noise levels in [0, 1]. All images of a group have the same noise level.
        metrics: scalar metrics by name, which `dpo_step` adds to its own metrics.
        placeholder: whether no pair can be trained on. The batch then has one pair, which counts as none.
    """

    pairs: PairBatch
    noise: Tensor
    sigma: Tensor
    metrics: Mapping[str, float] = field(default_factory=dict)
    placeholder: bool = False

    @property
    def count(self) -> int:
        """N, the number of pairs that the loss is averaged over; 0 for a placeholder."""
        return 0 if self.placeholder else len(self.pairs.chosen)


def noised_pairs(
    pairs: PairBatch,
    generators: Sequence[torch.Generator],
    density: SigmaConfig,
    draws: int,
    metrics: Mapping[str, float] | None = None,
) -> DpoBatch:
    """Return a `DpoBatch` of the pairs, with `draws` noise tensors and `draws` noise levels for each group.

    A group is the images of one prompt. generators[i] draws the noise and sigma that group i shares.
    """
    shape, device = tuple(pairs.latents.shape[1:]), pairs.latents.device
    noise = torch.stack([seeded_noise(shape, [generator] * draws) for generator in generators], dim=1)
    sigma = torch.stack(
        [sample_sigma(density.density, draws, generator=g, **density.parameters()) for g in generators], dim=1
    )
    noise, sigma = to_device(noise, device)[:, pairs.group], to_device(sigma, device)[:, pairs.group]
    return DpoBatch(pairs, noise, sigma, metrics or {})


def dpo_step(
    velocity: Velocity, reference: Velocity, batch: DpoBatch, beta: float, together: int = 1
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Return the mean Diffusion-DPO loss of the batch, differentiable in the velocity's parameters, and the metrics.

    `velocity` and `reference` get `together` draws of the M images at once, (together M, C, H, W); `together` must
    divide D. `reference` must compute the reference's velocity without gradient. Metrics: `margin`, the mean margin
    of the pairs; `implicit_accuracy`, the share of pairs whose margin has the sign of label - 1/2; `chosen_gain` and
    `rejected_gain`, the mean denoising error of the reference minus that of the policy, for chosen and rejected images;
    `kl`, the mean of (velocity - reference)^2; and the metrics in batch.metrics.
    """
    pairs, losses, margins, gains, kls = batch.pairs, [], [], [], []
    latents, label = pairs.latents.repeat(together, 1, 1, 1), pairs.label.repeat(together)
    for noise, sigma in zip(batch.noise.split(together), batch.sigma.split(together), strict=True):
        noise, sigma = noise.flatten(0, 1), sigma.flatten()
        x = add_noise(latents, noise, sigma)
        v_reference = reference(x, sigma)
        v = velocity(x, sigma)
        error, error_reference = (velocity_error(each, latents, noise).view(together, -1) for each in (v, v_reference))
        chosen, rejected, chosen_reference, rejected_reference = (
            each[:, rows].flatten() for each in (error, error_reference) for rows in (pairs.chosen, pairs.rejected)
        )
        loss, margin = diffusion_dpo_loss(
            chosen, rejected, chosen_reference, rejected_reference, beta=beta, label=label
        )
        losses.append(loss)
        margins.append(margin.detach().view(together, -1))
        gains.append((error_reference - error).detach())
        kls.append((v - v_reference).detach().square().mean())
    margin, gain = torch.cat(margins), torch.cat(gains)
    agreement = (margin * (pairs.label - 0.5)).sign()
    return torch.stack(losses).mean(), {
        "implicit_accuracy": (0.5 + 0.5 * agreement).mean(),
        "margin": margin.mean(),
        "chosen_gain": gain[:, pairs.chosen].mean(),
        "rejected_gain": gain[:, pairs.rejected].mean(),
        "kl": torch.stack(kls).mean(),
        **batch.metrics,
    }


def dpo_velocity(sampler: Sampler, config: DpoConfig, batch: DpoBatch) -> tuple[Velocity, int]:
    """Return the velocity of the loss for `dpo_step`, and the number of draws that it gets at once."""
    images, conditions = len(batch.pairs.latents), batch.pairs.conditions
    if (together := config.draws_together(images)) > 1:
        conditions = conditions.take([*range(images)] * together, sampler.device)
    return sampler.velocity_for(conditions, config.loss_guidance_scale), together


def without_gradient(velocity: Velocity, weights: Callable[[], AbstractContextManager[None]]) -> Velocity:
    """Return a function that calls `velocity` inside weights(), a context with the reference's weights, no gradient."""

    def frozen(latents: Tensor, sigma: float | Tensor) -> Tensor:
        with weights():
            return velocity(latents, sigma)

    return frozen


@dataclass
class OfflineDpo:
    """Diffusion-DPO as a method for `train.loop.fit`, on the pairs of a data set. The reference is the base model.

    Args:
        sampler: provides the policy; if config.loss_guidance_scale is above 1, also the empty prompt's conditions.
        pairs: source of pairs. Latents and embeddings must come from the VAE and text encoders of the base model.
    """

    sampler: Sampler
    pairs: PairSource
    config: DpoConfig

    def batch_at(self, micro_step: int) -> DpoBatch:
        """Return the pairs, noise and noise levels of one micro-step. They depend only on micro-step, seed and rank."""
        sampler = self.sampler
        with sampler.meter.phase("data"):
            pairs = self.pairs.batch_at(micro_step, sampler.rank, sampler.num_processes).to(sampler.device)
            first = sampler.first_sample(pairs.num_groups, micro_step)
            generators = [seeded_generator(sampler.seed, first + group, 2) for group in range(pairs.num_groups)]
            return noised_pairs(pairs, generators, self.config.sigma, self.config.draws)

    def step(self, batch: DpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss, differentiable in the policy's LoRA, and the metrics of `dpo_step`."""
        velocity, together = dpo_velocity(self.sampler, self.config, batch)
        reference = without_gradient(velocity, self.sampler.policy.reference)
        with self.sampler.meter.phase("policy"):
            return dpo_step(velocity, reference, batch, self.config.beta, together)


@dataclass
class OnlineDpo:
    """Diffusion-DPO as a method for `train.loop.fit`, on the best and the worst of several samples of each prompt.

    Also pass this object to `Setup.align` as the argument `state`, so that checkpoints contain the current reference.

    Args:
        sampler: samples training prompts.
        reward: ranks the samples; must be frozen and on the policy's device. Its gradient is not used.
    """

    sampler: Sampler
    reward: Reward
    config: DpoConfig

    def __post_init__(self) -> None:
        self._reference = self.sampler.policy.weights() if self.config.refresh_every else None
        group = self.config.group_size
        check_whole_groups(self.reward, "dpo", self.config.sample_batch or group, group)

    def reference(self) -> AbstractContextManager[None]:
        """Return a context manager in which the policy has the reference's weights and gradients are disabled."""
        policy = self.sampler.policy
        return policy.reference() if self._reference is None else policy.with_weights(self._reference)

    @property
    def no_signal(self) -> str:
        """Why a rollout gives no learning signal, and what to try."""
        return equal_scores("dpo", self.config.group_size)

    def batch_at(self, micro_step: int) -> DpoBatch:
        """Sample the prompts of one micro-step, and return the best and the worst sample of each prompt, with noise.

        Prompts whose samples have equal scores are left out. If no prompt remains, the batch is a placeholder.
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
        score = score.cpu()  # the only wait: all that follows is decided on the host
        kept = has_spread(score)
        rows = kept.nonzero().flatten() if kept.any() else torch.zeros(1, dtype=torch.long)
        ends = torch.stack([rows, score.argmax(dim=1)[rows], score.argmin(dim=1)[rows]])
        prompt, best, worst = to_device(ends, sampler.device)
        conditions = sampler.take([indices[row] for row in rows.tolist()])
        pairs = PairBatch.plain(latents[prompt, best], latents[prompt, worst], conditions)
        metrics = {
            "reward": float(score.mean()),
            "reward_best": float(score.amax(dim=1).mean()),
            "reward_worst": float(score.amin(dim=1).mean()),
            "signal": float(kept.double().mean()),
        }
        own = [generators[row] for row in rows.tolist()]
        batch = noised_pairs(pairs, own, config.sigma, config.draws, metrics)
        return batch if kept.any() else dataclasses.replace(batch, placeholder=True)

    def step(self, batch: DpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the loss, differentiable in the policy's LoRA, and the metrics.

        Metrics: those of `dpo_step`; `reward`, the mean score of all samples; `reward_best` and `reward_worst`, the
        mean score of each prompt's best and worst sample; `signal`, the share of prompts whose scores differ.
        """
        velocity, together = dpo_velocity(self.sampler, self.config, batch)
        reference = without_gradient(velocity, self.reference)
        with self.sampler.meter.phase("policy"):
            return dpo_step(velocity, reference, batch, self.config.beta, together)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the reference's LoRA tensors by name, for checkpoints; an empty dict if `refresh_every` is 0."""
        return {REFERENCE + name: tensor for name, tensor in (self._reference or {}).items()}

    def is_common(self) -> bool:
        """Return True, because all ranks have the same reference and so the same `state_tensors`."""
        return True

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the result of `state_tensors`. Raises ValueError if the tensors do not fit this policy."""
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
        """Replace the reference by the current policy if `refresh_every` updates have passed since the last refresh."""
        every = self.config.refresh_every * self.sampler.accumulate
        if every and micro_step and micro_step % every == 0:
            self._reference = self.sampler.policy.weights()
