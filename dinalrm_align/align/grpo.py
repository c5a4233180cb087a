"""Flow-GRPO (arXiv 2505.05470): policy gradients on the stochastic steps of a flow, with advantages within groups.

A rollout draws group_size samples of every prompt; these samples are a group. The denoising steps in a window of
consecutive steps are stochastic (see `flow.sde`), and the rollout keeps their log-probabilities. The steps outside the
window follow the ODE. The reward scores the FINAL latents. The advantage of a sample with reward r is

    A = clamp((r - mean of the group) / (std + floor)),

where std is the standard deviation of the rewards in the group or in the whole rollout. A group whose rewards are all
equal is left out. An update minimises, over the remaining samples and the steps in the window,

    mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl_beta KL,      rho = p(x') / p_rollout(x'), c = clip_range

Here x' is the state after a step. A random window gives Flow-GRPO-Fast; a window that moves from the first steps to
the last gives MixGRPO (arXiv 2507.21802). Unlike in public code, steps that are not trained are never stochastic.

If the reward is a weighted sum, A can instead be the weighted sum of the rewards' own advantages, and this sum can be
divided by its standard deviation over the rollout (GDPO, arXiv 2601.05242); see `GrpoConfig.advantage_of`.

A second reward (the anchor) is optional: in every `anchor.every`-th rollout, A = A_reward + weight A_anchor.

In half precision, the rounding of velocities depends on the batch size, and moves rho by more than a clip range of 3e-6
(measured with SD3.5-M in bfloat16: by 3.6e-5). So p_rollout is then computed in the micro-batches of the updates, with
the weights that drew the rollout. In the first update after a rollout these are the present weights, and p_rollout is p
without gradient, at no cost. For each further micro-step, a forward pass follows the rollout. Batches of the rollout
(`sample_batch`) and micro-batches may therefore differ in size, and dropped groups do no harm.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinalrm_align.align.anchor import ANCHOR, Anchor, terms
from dinalrm_align.align.groups import STATISTICS, check_whole_groups, group_scores, rollout_advantages
from dinalrm_align.align.grpo_config import GrpoConfig
from dinalrm_align.align.rollouts import Position, Reuse, RolloutBuffer, Sampler
from dinalrm_align.align.signal import equal_scores
from dinalrm_align.align.surrogate import clipped_loss, guarded_ratio, step_kl
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import Velocity, rollout
from dinalrm_align.flow.sde import Transition, transition
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.checks import check
from dinalrm_align.train.device import to_device

PATHS, STARTS, WINDOWS = 10, 11, 13
"""First keys of the generators that draw sample noise, shared initial noise, and windows."""
RECORDED = (*STATISTICS, ANCHOR, "window_start")


def trained_steps(config: GrpoConfig, num_steps: int, number: int, generator: torch.Generator) -> range:
    """Return the indices of the steps in the window of rollout `number`. These steps are stochastic and trained.

    The last step, num_steps - 1, is never in the window. Raises ValueError if the window does not fit.
    """
    low, high = config.window_room(num_steps)
    if config.window == "all":
        return range(low, high)
    last = high - config.window_size
    if config.window == "random":
        start = int(torch.randint(low, last + 1, (), generator=generator))
    else:
        positions = -(-(last - low) // config.window_stride) + 1
        moves = number // config.window_rollouts
        moves = moves % positions if config.window_wraps else min(moves, positions - 1)
        start = min(low + moves * config.window_stride, last)
    return range(start, start + config.window_size)


@dataclass(frozen=True)
class Rollout:
    """The N samples of a rollout, on the CPU. Updates train on K consecutive denoising steps of each sample.

    Args:
        start: index of the first trained step.
        indices: (N,) int64, prompt indices.
        latents: (N, K + 1, C, H, W), the latents before each trained step, and those after the last trained step.
        log_probs: (N, K), log-probabilities of the trained steps; in half precision, (N, epochs K), K for each epoch.
        means: (N, K or epochs K, C, H, W), means of the trained steps' normal distributions; (N, 0) if GrpoConfig.guard
            is False.
        advantages: (N,), after clipping.
        kept: (N,) bool, False if all scores in the sample's group are equal; updates leave these samples out.
        statistics: metrics of the rollout in the order of `RECORDED`, NaN where not measured.
    """

    number: int
    start: int
    indices: Tensor
    latents: Tensor
    log_probs: Tensor
    means: Tensor
    advantages: Tensor
    kept: Tensor
    statistics: Tensor


@dataclass(frozen=True)
class GrpoBatch:
    """Pairs (sample, denoising step) on the device. A batch without pairs has `count` 0 and holds one dummy pair."""

    position: Position
    conditions: Conditions
    steps: Tensor
    latents: Tensor
    following: Tensor
    old_log_prob: Tensor
    old_mean: Tensor
    advantage: Tensor
    count: int
    statistics: dict[str, float]


@dataclass
class Grpo:
    """Flow-GRPO as a method for `train.loop.fit`: `batch_at` draws rollouts, `step` returns the loss.

    Args:
        sampler: samples training prompts. `sampler.sigmas` must come from `flow.sampling.named_sigmas`.
        reward: scores the samples; must be frozen and on the policy's device. Its gradient is not used.
        anchor: a second reward, whose advantages are added to those of `reward` in every `anchor.every`-th rollout.
    """

    sampler: Sampler
    reward: Reward
    config: GrpoConfig
    anchor: Anchor | None = None
    buffer: RolloutBuffer[Rollout] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config, sampler = self.config, self.sampler
        reuse = Reuse(config.epochs, config.minibatches, sampler.accumulate)
        self.buffer = RolloutBuffer(reuse, Rollout, self.roll_out, self._shapes)
        self.first = sampler.rank * config.groups * config.group_size  # global index of this rank's first sample
        trained_steps(config, sampler.num_steps, 0, seeded_generator(0))
        self.draws = config.reward_draws if self.reward.reads_noise else 1
        for reward in (self.reward, *([self.anchor.reward] if self.anchor else [])):
            check_whole_groups(reward, "grpo", config.sample_batch, config.group_size)

    def velocity_for(self, conditions: Conditions) -> Velocity:
        return self.sampler.velocity_for(conditions, negative_gradient=self.config.negative_gradient)

    def roll_out(self, number: int) -> Rollout:
        """Sample and score rollout `number` without gradient. The result depends on number, seed, weights, rank."""
        config, sampler = self.config, self.sampler
        indices = torch.tensor(sampler.prompt_indices(config.groups, number)).repeat_interleave(config.group_size)
        window = trained_steps(config, sampler.num_steps, number, seeded_generator(WINDOWS, sampler.seed, number))
        parts: list[tuple[Tensor, ...]] = []
        scores: list[dict[str, Tensor]] = []
        for samples in torch.arange(len(indices)).split(config.sample_batch):
            conditions = sampler.take(indices[samples].tolist())
            with sampler.meter.phase("rollout"), torch.no_grad():
                final, *kept = self.trajectories(number, samples.tolist(), conditions, window)
            with sampler.meter.phase("reward"):
                scores.append(self.scores(number, samples.tolist(), final, conditions))
            parts.append(tuple(kept))
        latents, log_probs, means = (torch.cat(column) for column in zip(*parts, strict=True))
        together = {name: torch.cat([part[name] for part in scores], dim=1) for name in scores[0]}
        found = rollout_advantages(
            together, self._weights(number), config, sampler.gather, sampler.rank, config.advantage_of == "gdpo"
        )
        recorded = {**found.statistics, "window_start": window.start}
        statistics = torch.tensor([recorded.get(name, float("nan")) for name in RECORDED])
        drawn = Rollout(
            number, window.start, indices, latents, log_probs, means, found.advantages, found.kept, statistics
        )
        return self._in_micro_batches(drawn) if self._rounds else drawn

    @property
    def _rounds(self) -> bool:
        """Whether the policy runs in half precision, so that its rounding depends on the batch size."""
        return self.sampler.policy.dtype != torch.float32

    def _in_micro_batches(self, drawn: Rollout) -> Rollout:
        """Return `drawn` with log-probabilities and means computed in the micro-batches of all but the first update.

        All ranks run equally many forward passes, as sharded base weights need. Gradients are enabled as in training,
        because compiled blocks may round differently without.
        """
        epochs, width, guard = self.config.epochs, drawn.log_probs.shape[1], self.config.guard
        found: list[tuple[Tensor, ...]] = []
        for position in self.buffer.reuse.after_first_update(drawn.number):
            rows, columns = self._pairs(position, drawn)
            batch = self._batch(position, drawn, rows, columns)
            with self.sampler.meter.phase("rollout"), torch.enable_grad():
                step = self._transitions(batch, alone=True)[0]
            log_prob, mean = step.log_prob(batch.following).detach(), step.mean.detach()
            del step  # holds the activations, which must be free before the next forward
            columns = columns + position.epoch * width
            found.append((rows, columns, log_prob[: batch.count], mean[: batch.count if guard else 0]))
        if not found:
            return drawn
        rows, columns, log_prob, mean = (torch.cat(each).cpu() for each in zip(*found, strict=True))
        log_probs = drawn.log_probs.repeat(1, epochs)
        log_probs[rows, columns] = log_prob
        means = drawn.means.repeat(1, epochs, 1, 1, 1) if guard else drawn.means
        if guard:
            means[rows, columns] = mean
        return dataclasses.replace(drawn, log_probs=log_probs, means=means)

    def trajectories(
        self, number: int, samples: Sequence[int], conditions: Conditions, window: range
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample B latents, with stochastic steps in the window of K steps and ODE steps outside it.

        Returns four tensors: final latents (B, C, H, W), on the device; then, on the CPU, `latents`, `log_probs` and
        `means` as in `Rollout`. `samples`: indices of the B samples in this rank's rollout.
        """
        config, sampler = self.config, self.sampler
        generators = [seeded_generator(PATHS, sampler.seed, number, self.first + sample) for sample in samples]
        latents = self._before(number, samples, conditions, generators, window.start)
        velocity = self.velocity_for(conditions)
        states, log_probs, means = [latents], [], []
        for index in window:
            v = velocity(latents, sampler.sigmas[index])
            step = transition(config.sampler, latents, v, sampler.sigmas, index, config.noise_level)
            latents = step.draw(sampler.noise(generators))
            log_probs.append(step.log_prob(latents))
            means.append(step.mean)
            states.append(latents)
        latents = rollout(velocity, latents, sampler.sigmas[window.stop :])
        kept_means = torch.stack(means, dim=1) if config.guard else torch.zeros(len(samples), 0)
        return latents, torch.stack(states, dim=1).cpu(), torch.stack(log_probs, dim=1).cpu(), kept_means.cpu()

    def _before(
        self,
        number: int,
        samples: Sequence[int],
        conditions: Conditions,
        generators: Sequence[torch.Generator],
        steps: int,
    ) -> Tensor:
        """Return latents (B, C, H, W) after `steps` ODE steps. With shared_start, all samples of a group are equal."""
        sampler = self.sampler
        if not self.config.shared_start:
            return sampler.sample(conditions, sampler.noise(generators), steps)
        groups = [(self.first + sample) // self.config.group_size for sample in samples]
        firsts = {group: row for row, group in reversed(list(enumerate(groups)))}  # the first row of each group
        ordered = sorted(firsts)
        noise = sampler.noise([seeded_generator(STARTS, sampler.seed, number, group) for group in ordered])
        latents = sampler.sample(conditions.take([firsts[group] for group in ordered]), noise, steps)
        rows = torch.tensor([ordered.index(group) for group in groups])
        return latents[to_device(rows, latents.device)]

    def scores(self, number: int, samples: Sequence[int], latents: Tensor, conditions: Conditions) -> dict[str, Tensor]:
        """Score the final latents of B samples. Return a dict: name of the reward -> scores (draws, B)."""
        keys = [(self.sampler.seed, number, (self.first + sample) // self.config.group_size) for sample in samples]
        objective = terms(self.reward, self.anchor, number)

        def score_parts(latents: Tensor, conditions: Conditions, **noise: object) -> dict[str, Tensor]:
            if self.config.advantage_of != "sum":
                scores = self.reward.score_parts(latents, conditions, **noise)
            else:
                scores = {"reward": self.reward(latents, conditions, **noise)}
            if ANCHOR in objective:
                scores[ANCHOR] = objective[ANCHOR][1](latents, conditions, **noise)
            return scores

        return group_scores(score_parts, latents, conditions, keys, draws=self.draws, sigma=self.config.reward_sigma)

    def _weights(self, number: int) -> Mapping[str, float]:
        """Return a dict: name of a reward -> weight of the reward's advantages in rollout `number`."""
        weights = {"reward": 1.0} if self.config.advantage_of == "sum" else dict(self.reward.weights)
        objective = terms(self.reward, self.anchor, number)
        return weights | ({ANCHOR: objective[ANCHOR][0]} if ANCHOR in objective else {})

    @property
    def no_signal(self) -> str:
        """Why a rollout gives no learning signal, and what to try."""
        return equal_scores("grpo", self.config.group_size)

    def batch_at(self, micro_step: int) -> GrpoBatch:
        """Return the samples and steps that a micro-step trains on. Draws a new rollout when one is due."""
        position, drawn = self.buffer.at(micro_step)
        return self._batch(position, drawn, *self._pairs(position, drawn))

    def _pairs(self, position: Position, drawn: Rollout) -> tuple[Tensor, Tensor]:
        """Return rows (samples) and columns (steps) of the rollout that a micro-step trains on, (n,); n may be 0."""
        kept = drawn.kept.nonzero().flatten()
        groups = (self.first + kept) // self.config.group_size
        return self.buffer.reuse.select(kept, groups, drawn.latents.shape[1] - 1, position, self.sampler.seed)

    def _batch(self, position: Position, drawn: Rollout, rows: Tensor, columns: Tensor) -> GrpoBatch:
        count, device, width = len(rows), self.sampler.device, drawn.latents.shape[1] - 1
        if count == 0:
            rows, columns = torch.zeros(2, 1, dtype=torch.long)
        old = (columns + position.epoch * width) % drawn.log_probs.shape[1]
        statistics = dict(zip(RECORDED, drawn.statistics.tolist(), strict=True))
        signal = {"signal": 1 - statistics["dropped_groups"], "rollout": position.rollout}
        return GrpoBatch(
            position=position,
            conditions=self.sampler.take(drawn.indices[rows].tolist()),
            steps=drawn.start + columns,
            latents=to_device(drawn.latents[rows, columns], device),
            following=to_device(drawn.latents[rows, columns + 1], device),
            old_log_prob=to_device(drawn.log_probs[rows, old], device),
            old_mean=to_device(drawn.means[rows, old] if self.config.guard else drawn.means[rows], device),
            advantage=to_device(drawn.advantages[rows], device),
            count=count,
            statistics={name: value for name, value in statistics.items() if value == value} | signal,
        )

    def _transitions(self, batch: GrpoBatch, *, alone: bool) -> tuple[Transition, Transition, Tensor]:
        """Return the result of `Sampler.transitions` for a batch."""
        return self.sampler.transitions(
            self.velocity_for(batch.conditions), batch.latents, batch.steps, self.config.sampler,
            self.config.noise_level, alone=alone,
        )  # fmt: skip

    def _ratio(self, step: Transition, log_prob: Tensor, old_log_prob: Tensor, old_mean: Tensor) -> Tensor:
        if self.config.guard:
            return guarded_ratio(step, old_mean, log_prob, old_log_prob)
        return torch.exp(log_prob - old_log_prob)

    def step(self, batch: GrpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the mean loss of the batch, differentiable in the policy's LoRA, and the metrics.

        Metrics: `ratio_spread`, the mean distance of the probability ratios from 1; `clipped`, the share of ratios
        outside the clip range; only with a kl_beta above 0, `kl`, the mean square of velocity - reference velocity,
        and `step_kl`, the KL as config.kl_form defines it; and the statistics of the rollout.

        Raises FloatingPointError if a ratio in a rollout's first update, to the probability that was computed in the
        rollout, differs from 1 by more than ratio_tolerance.
        """
        config = self.config
        with self.sampler.meter.phase("policy"):
            step, reference, difference = self._transitions(batch, alone=config.kl_beta == 0)
            log_prob = step.log_prob(batch.following)
            ratio = self._ratio(step, log_prob, batch.old_log_prob, batch.old_mean)
            if batch.position.in_first_update:
                self._check_ratio(ratio, batch.position.rollout)
                if self._rounds:
                    ratio = self._ratio(step, log_prob, log_prob.detach(), step.mean.detach())
            loss = clipped_loss(ratio, batch.advantage, config.clip_range)
            if config.guard:
                loss = loss / -to_device(step.delta.to(loss.dtype), loss.device)
            moved = (ratio.detach() - 1).abs()
            means = {"ratio_spread": moved, "clipped": (moved > config.clip_range).float()}
            if config.kl_beta > 0:
                kl = step_kl(config.kl_form, step, reference, difference)
                loss = loss + config.kl_beta * kl
                means |= {"kl": step_kl("velocity", step, reference, difference), "step_kl": kl}
        return loss.mean(), {**{name: values.detach().mean() for name, values in means.items()}, **batch.statistics}

    def _check_ratio(self, ratio: Tensor, number: int) -> None:
        limit = max(self.config.largest_mismatch, torch.finfo(self.sampler.policy.dtype).eps)

        def judge(worst: list[float]) -> None:
            if not worst[0] <= limit:
                raise FloatingPointError(
                    f"the first ratio after rollout {number} differs from 1 by {worst[0]:.2g}; expected at most "
                    f"{limit:.2g}. Rollout and training compute different probabilities for the same steps: look for "
                    "dropout, for TF32 (turn it off, or use half precision), or for weights that changed in between"
                )

        check((ratio.detach() - 1).abs().max(), judge)

    def _shapes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes that the tensors of a saved `Rollout` must have, by name."""
        count, width = self.config.groups * self.config.group_size, tensors["latents"].shape[1] - 1
        latent_shape, old = self.sampler.latent_shape, tensors["log_probs"].shape[-1]
        old = old if old in (width, self.config.epochs * width) else width
        return {
            "number": (), "start": (), "indices": (count,), "latents": (count, width + 1, *latent_shape),
            "log_probs": (count, old), "advantages": (count,), "kept": (count,), "statistics": (len(RECORDED),),
            "means": (count, old, *latent_shape) if self.config.guard else (count, 0),
        }  # fmt: skip
