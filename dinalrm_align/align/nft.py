"""DiffusionNFT (arXiv 2509.16117): train on noised good and bad samples with a contrastive denoising loss.

A rollout draws group_size samples of every prompt (a group) with the old policy, a moving average of the trained
policy. The advantage A of a sample in its group is clipped to [-c, c]. The sample counts as good with weight
r = A / (2 c) + 1/2 and as bad with weight 1 - r. Each clean sample x0 is noised. The trained policy's velocity v and
the old policy's velocity v_old define two implicit policies,

    v_good = beta v + (1 - beta) v_old,       v_bad = (1 + beta) v_old - beta v.

The training fits v_good to good samples and v_bad to bad samples. The loss is

    c / beta [r |x0_good - x0|^2 / w_good + (1 - r) |x0_bad - x0|^2 / w_bad] + kl_beta |v - v_reference|^2,

where x_sigma is the noised sample, x0_good = x_sigma - sigma v_good, and w_good is the mean of |x0_good - x0| without
gradient. x0_bad and w_bad follow from v_bad in the same way. No log-probabilities or stochastic steps are needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinalrm_align.align.groups import STATISTICS, check_whole_groups, group_scores, rollout_advantages
from dinalrm_align.align.nft_config import NftConfig
from dinalrm_align.align.rollouts import Reuse, RolloutBuffer, Sampler
from dinalrm_align.align.signal import equal_scores
from dinalrm_align.flow.noise import add_noise, denoised, seeded_generator
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.device import to_device
from dinalrm_align.train.state import Ema

PATHS, NOISES, LEVELS = 30, 31, 32
"""RNG streams."""
LEAST_WEIGHT = 1e-5
OLD = "old."
"""Prefix of the old policy's weights in the state."""


def goodness(advantages: Tensor, clip: float) -> Tensor:
    """Return the weight r with which each sample counts as good: advantages / (2 clip) + 1/2, clamped to [0, 1]."""
    return (advantages / (2 * clip) + 0.5).clamp(0, 1)


def contrast_loss(
    velocity: Tensor, old: Tensor, x_sigma: Tensor, sigma: Tensor, latents: Tensor, good: Tensor, beta: float
) -> Tensor:
    """Return DiffusionNFT's contrastive loss [r |x0_good - x0|^2 / w_good + (1 - r) |x0_bad - x0|^2 / w_bad] / beta.

    The loss (n,) is averaged over C, H, W. The velocity beta v + (1 - beta) v_old gives the estimate x0_good of x0, and
    (1 + beta) v_old - beta v gives x0_bad. w_good and w_bad are the detached means of |x0_good - x0| and |x0_bad - x0|.

    Args:
        velocity, old: (n, C, H, W), the velocities v of the trained policy and v_old of the old policy at x_sigma.
        x_sigma, latents: (n, C, H, W), the noised samples and the clean samples x0.
        sigma, good: (n,), the noise level of each sample, and the weight r with which it counts as good.
    """
    total = torch.zeros(len(good), device=velocity.device)
    for share, mixed in ((good, beta * velocity + (1 - beta) * old), (1 - good, (1 + beta) * old - beta * velocity)):
        difference = denoised(x_sigma, mixed, sigma) - latents.float()
        weight = difference.detach().abs().mean(dim=(1, 2, 3)).clamp(min=LEAST_WEIGHT)
        total = total + share * difference.square().mean(dim=(1, 2, 3)) / weight
    return total / beta


@dataclass(frozen=True)
class Samples:
    """The N samples of a rollout, on the CPU.

    Args:
        indices: (N,) int64, prompt indices.
        latents: (N, C, H, W), the clean samples.
        good: (N,), the weight r in [0, 1] with which each sample counts as good.
        kept: (N,) bool, False if all samples of the same prompt have equal scores. Updates leave out these samples.
            All True with config.keep_equal.
        statistics: metrics of the rollout in the order of `STATISTICS`.
    """

    number: int
    indices: Tensor
    latents: Tensor
    good: Tensor
    kept: Tensor
    statistics: Tensor


@dataclass(frozen=True)
class NftBatch:
    """A micro-batch of samples, each with a noise level. `count`: number of samples; 0 for a placeholder batch."""

    conditions: Conditions
    sigma: Tensor
    latents: Tensor
    noise: Tensor
    good: Tensor
    count: int
    statistics: dict[str, float]


@dataclass
class Nft:
    """DiffusionNFT for the training loop `train.loop.fit`: `batch_at` runs rollouts, `step` returns the loss.

    Args:
        sampler: samples training prompts.
        reward: scores the samples; must be frozen and on the policy's device. Its gradient is not used.
    """

    sampler: Sampler
    reward: Reward
    config: NftConfig
    buffer: RolloutBuffer[Samples] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config = self.config
        reuse = Reuse(config.epochs, config.minibatches, self.sampler.accumulate)
        self.buffer = RolloutBuffer(reuse, Samples, self.roll_out, self._shapes)
        self.first = self.sampler.rank * config.groups * config.group_size  # global index of this rank's first sample
        self.steps = config.trained_steps(self.sampler.num_steps)
        self.old = Ema(self.sampler.policy.parameters, 0.0)
        self.draws = config.reward_draws if self.reward.reads_noise else 1
        check_whole_groups(self.reward, "nft", config.sample_batch, config.group_size)

    @torch.no_grad()
    def roll_out(self, number: int) -> Samples:
        """Sample rollout `number` with the old policy, score the samples, and return them with their weights."""
        config, sampler = self.config, self.sampler
        indices = torch.tensor(sampler.prompt_indices(config.groups, number)).repeat_interleave(config.group_size)
        latents, scores = [], []
        for samples in torch.arange(len(indices)).split(config.sample_batch):
            conditions = sampler.take(indices[samples].tolist())
            numbers = (self.first + samples).tolist()
            generators = [seeded_generator(PATHS, sampler.seed, number, sample) for sample in numbers]
            with sampler.meter.phase("rollout"), self.old.in_place():
                final = sampler.sample(conditions, sampler.noise(generators))
            with sampler.meter.phase("reward"):
                keys = [(sampler.seed, number, sample // config.group_size) for sample in numbers]
                found = group_scores(
                    lambda *given, **noise: {"reward": self.reward(*given, **noise)}, final, conditions, keys,
                    draws=self.draws, sigma=config.reward_sigma,
                )  # fmt: skip
                scores.append(found["reward"])
            latents.append(final.cpu())
        together = {"reward": torch.cat(scores, dim=1)}
        found = rollout_advantages(together, {"reward": 1.0}, config, sampler.gather, sampler.rank)
        statistics = torch.tensor([found.statistics[name] for name in STATISTICS])
        good, kept = goodness(found.advantages, config.advantage_clip), found.kept | config.keep_equal
        return Samples(number, indices, torch.cat(latents), good, kept, statistics)

    @torch.no_grad()
    def follow(self, number: int) -> None:
        """Update the old policy, which is a moving average of the trained weights. Call before rollout `number`."""
        kept = min(self.config.old_slope * number, self.config.old_limit)
        for name, p in self.sampler.policy.parameters.items():
            self.old.mean[name] = self.old.mean[name].lerp(p.detach(), 1 - kept)

    @property
    def no_signal(self) -> str:
        """Why a rollout gives no learning signal, and what to try."""
        return equal_scores("nft", self.config.group_size)

    def batch_at(self, micro_step: int) -> NftBatch:
        """Return the samples and noise levels that a micro-step trains on. Runs a new rollout when one is due."""
        config, sampler, device = self.config, self.sampler, self.sampler.device
        upcoming = self.buffer.reuse.position(micro_step)
        if upcoming.starts_rollout:
            self.follow(upcoming.rollout)
        position, pending = self.buffer.at(micro_step)
        kept = pending.kept.nonzero().flatten()
        groups = (self.first + kept) // config.group_size
        rows, columns = self.buffer.reuse.select(kept, groups, config.levels, position, sampler.seed)
        count = len(rows)
        if count == 0:
            rows, columns = torch.zeros(2, 1, dtype=torch.long)
        keys = [(sampler.seed, position.rollout, position.epoch, row) for row in (self.first + rows).tolist()]
        steps = [self._steps(key)[column] for key, column in zip(keys, columns.tolist(), strict=True)]
        noises = [seeded_generator(NOISES, *key, column) for key, column in zip(keys, columns.tolist(), strict=True)]
        statistics = dict(zip(STATISTICS, pending.statistics.tolist(), strict=True))
        signal = {"signal": 1 - statistics["dropped_groups"], "rollout": position.rollout}
        return NftBatch(
            conditions=sampler.take(pending.indices[rows].tolist()),
            sigma=sampler.levels(torch.tensor(steps, dtype=torch.long)),
            latents=to_device(pending.latents[rows], device),
            noise=sampler.noise(noises),
            good=to_device(pending.good[rows], device),
            count=count,
            statistics={name: value for name, value in statistics.items() if value == value} | signal,
        )

    def _steps(self, key: tuple[int, ...]) -> list[int]:
        """Draw distinct denoising steps. A sample is trained at the noise levels of these steps. `key`: RNG key."""
        order = torch.randperm(len(self.steps), generator=seeded_generator(LEVELS, *key))
        return (self.steps.start + order[: self.config.levels]).tolist()

    def step(self, batch: NftBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the mean loss of the batch, differentiable in the policy's LoRA, and the metrics.

        Metrics: `moved`, the mean squared difference of the trained and the old policy's velocities; `kl`, the same for
        the trained policy's and the reference's, only with a kl_beta above 0; and the statistics of the rollout.
        """
        config, policy = self.config, self.sampler.policy
        with self.sampler.meter.phase("policy"):
            velocity = self.sampler.velocity_for(batch.conditions)
            x_sigma = add_noise(batch.latents, batch.noise, batch.sigma)
            if config.kl_beta > 0:
                with policy.reference():
                    v_reference = velocity(x_sigma, batch.sigma)
            with torch.no_grad(), self.old.in_place():  # writes into the weights, so before the forward with gradient
                v_old = velocity(x_sigma, batch.sigma)
            v = velocity(x_sigma, batch.sigma)
            contrast = contrast_loss(v, v_old, x_sigma, batch.sigma, batch.latents, batch.good, config.beta)
            loss, measured = config.advantage_clip * contrast, {}
            if config.kl_beta > 0:
                kl = (v - v_reference).square().mean(dim=(1, 2, 3))
                loss, measured["kl"] = loss + config.kl_beta * kl, kl.detach().mean()
        moved = (v.detach() - v_old).square().mean(dim=(1, 2, 3))
        return loss.mean(), {**measured, "moved": moved.mean(), **batch.statistics}

    def state_tensors(self) -> dict[str, Tensor]:
        """Return tensors by name: the old policy's weights, and the fields of the unfinished rollout if any."""
        return {f"{OLD}{name}": mean for name, mean in self.old.mean.items()} | self.buffer.state_tensors()

    def is_common(self) -> bool:
        """Return whether all ranks have equal `state_tensors`. They have if every rollout is finished."""
        return self.buffer.is_common()

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `state_tensors`. Raises ValueError, naming the first tensor that does not fit."""
        device = self.sampler.device
        old = {name.removeprefix(OLD): t.to(device, copy=True) for name, t in tensors.items() if name.startswith(OLD)}
        self.sampler.policy.check_weights(old)
        self.buffer.load_state_tensors({name: t for name, t in tensors.items() if not name.startswith(OLD)})
        self.old.mean = old

    def _shapes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
        """Return {name of a field of a saved rollout: required shape}."""
        count = self.config.groups * self.config.group_size
        return {
            "number": (), "indices": (count,), "latents": (count, *self.sampler.latent_shape), "good": (count,),
            "kept": (count,), "statistics": (len(STATISTICS),),
        }  # fmt: skip
