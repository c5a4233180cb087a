"""LPO (arXiv 2502.01051): preference optimisation of single denoising steps, with a reward that scores noisy latents.

At each state x_t of a trajectory, one stochastic step is drawn K times, which gives K candidates for the next state.
The reward scores the candidates at the noise level of the next state. A softmax of the best and the worst score gives
two probabilities; their difference is the margin. The best and the worst candidate form a pair if the margin exceeds a
threshold, which is higher at steps that add more noise. The trajectory continues from a random candidate. An update
minimises the mean of SPO's step-DPO loss (arXiv 2406.04314) over pairs,

    -log sigmoid(beta [log clip(r_best) - log clip(r_worst)]),      r = p(x') / p_reference(x'), clipped to 1 +- c

where x' is a candidate and the reference is the policy without its LoRA. The paper trains UNets with DDIM. This
module trains flow models such as SD3, with stochastic steps from `flow.sde` and the latent reward DiNa-LRM.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.align.lpo_config import LpoConfig
from dinalrm_align.align.rollouts import Position, Reuse, RolloutBuffer, Sampler
from dinalrm_align.align.signal import has_spread
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import Velocity, ode_step
from dinalrm_align.flow.sde import transition
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.device import to_device

PATHS = 20
"""RNG stream of the trajectories."""
STATISTICS = ("reward", "pairs", "pairs_kept", "preference")


def clearest_pair(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors (B,): the index of the best of K candidates, the index of the worst, and the margin.

    `scores`: (B, K). A margin is the difference of the probabilities softmax((best score, worst score) / temperature).
    """
    best, worst = scores.argmax(dim=1), scores.argmin(dim=1)
    ends = scores.gather(1, torch.stack([best, worst], dim=1)) / temperature
    high, low = ends.softmax(dim=1).unbind(dim=1)
    return best, worst, high - low


def dynamic_threshold(stds: Tensor, low: float, high: float) -> Tensor:
    """Return the margin (S,) that a pair must exceed at each of S steps, linear in the std of the step's noise.

    `stds`: (S,), the std of each step's noise. The result is `low` at the smallest std and `high` at the largest. If
    all entries of `stds` are equal, the result is `low` at every step.
    """
    least, most = stds.min(), stds.max()
    if most == least:
        return torch.full_like(stds, low)
    return low + (high - low) * (stds - least) / (most - least)


def step_preference_loss(
    log_ratio_chosen: Tensor, log_ratio_rejected: Tensor, beta: float, clip_range: float
) -> Tensor:
    """Return -log sigmoid(beta [log clip(r_chosen) - log clip(r_rejected)]) for n pairs, (n,).

    clip(r) limits the ratio r = p / p_reference to 1 +- clip_range. A clipped ratio has no gradient.
    `log_ratio_chosen`, `log_ratio_rejected`: log r of the chosen and the rejected candidates, (n,).
    """
    chosen, rejected = (
        ratio.exp().clamp(1 - clip_range, 1 + clip_range).log() for ratio in (log_ratio_chosen, log_ratio_rejected)
    )
    return -F.logsigmoid(beta * (chosen - rejected))


@dataclass(frozen=True)
class StepPairs:
    """The P preference pairs that a rollout collected from its trajectories, on the CPU.

    Args:
        samples: (P,) int64, index of each pair's trajectory, counted over all ranks.
        indices: (P,) int64, prompt indices.
        steps: (P,) int64, index of each pair's denoising step.
        latents: (P, C, H, W) float32, the states from which the candidates were drawn.
        chosen, rejected: (P, C, H, W) float32, best and worst candidate for the next state.
        statistics: metrics of the rollout over all ranks, in the order of `STATISTICS`.
    """

    number: int
    samples: Tensor
    indices: Tensor
    steps: Tensor
    latents: Tensor
    chosen: Tensor
    rejected: Tensor
    statistics: Tensor


@dataclass(frozen=True)
class LpoBatch:
    """A micro-batch of preference pairs on the device. A batch without pairs has `count` 0 and holds one dummy pair."""

    position: Position
    conditions: Conditions
    steps: Tensor
    latents: Tensor
    chosen: Tensor
    rejected: Tensor
    count: int
    statistics: dict[str, float]


@dataclass
class Lpo:
    """LPO for the training loop `train.loop.fit`: `batch_at` collects pairs in rollouts, `step` returns the loss.

    Args:
        sampler: draws prompts and runs the policy. `sampler.sigmas` must come from `flow.sampling.named_sigmas`.
        reward: scores the candidates; must be frozen, on the policy's device, and have the method `score_noisy`.
    """

    sampler: Sampler
    reward: Reward
    config: LpoConfig
    buffer: RolloutBuffer[StepPairs] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        config, sampler = self.config, self.sampler
        reuse = Reuse(config.epochs, config.minibatches, sampler.accumulate)
        self.buffer = RolloutBuffer(reuse, StepPairs, self.roll_out, self._shapes)
        self.first = sampler.rank * config.batch_size  # global index of this rank's first trajectory
        self.steps = config.trained_steps(sampler.num_steps)
        blank = torch.zeros(1, 1, 1, 1)
        stds = torch.cat([
            transition(config.sampler, blank, blank, sampler.sigmas, index, config.noise_level).std
            for index in self.steps
        ])  # fmt: skip
        self.thresholds = dict(zip(self.steps, dynamic_threshold(stds, *config.threshold).tolist(), strict=True))

    def velocity_for(self, conditions: Conditions) -> Velocity:
        return self.sampler.velocity_for(conditions, negative_gradient=self.config.negative_gradient)

    def roll_out(self, number: int) -> StepPairs:
        """Collect a rollout's pairs without gradient. The pairs depend on `number`, seed, weights and rank."""
        config, sampler = self.config, self.sampler
        indices = torch.tensor(sampler.prompt_indices(config.batch_size, number))
        found: list[tuple[Tensor, ...]] = []
        measured: list[tuple[Tensor, ...]] = []
        for samples in torch.arange(len(indices)).split(config.sample_batch):
            pairs, measures = self.trajectories(number, samples.tolist(), indices[samples])
            found += pairs
            measured += measures
        columns = [torch.cat(column) for column in zip(*found, strict=True)]
        table = torch.stack([torch.cat(column).double() for column in zip(*measured, strict=True)], dim=1)
        kept, scores, margins = sampler.gather(table).unbind(dim=1)
        statistics = [scores.mean(), kept.sum(), kept.mean(), margins.mean()]
        return StepPairs(number, *columns, torch.tensor([float(value) for value in statistics]))

    @torch.no_grad()
    def trajectories(
        self, number: int, samples: Sequence[int], indices: Tensor
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """Sample B trajectories, and collect preference pairs at the denoising steps `self.steps`.

        Returns two lists of tuples of CPU tensors, one tuple per step in `self.steps`. The tuples of the first list
        hold the pairs: the fields of `StepPairs` from `samples` to `rejected`. The tuples of the second list have three
        tensors (B,): whether the margin exceeds the threshold, the mean score of the candidates, and the margin.

        `samples`: B trajectory indices; each rank counts from 0. `indices`: (B,), the prompt index of each trajectory.
        """
        config, sampler, device, count = self.config, self.sampler, self.sampler.device, self.config.candidates
        conditions = sampler.take(indices.tolist())
        repeated = conditions.take([row for row in range(len(samples)) for _ in range(count)])
        velocity = self.velocity_for(conditions)
        numbers = self.first + torch.tensor(samples)
        generators = [seeded_generator(PATHS, sampler.seed, number, trajectory) for trajectory in numbers.tolist()]
        latents = sampler.noise(generators)
        pairs, measures = [], []
        for index, (sigma, sigma_next) in enumerate(zip(sampler.sigmas[:-1], sampler.sigmas[1:], strict=True)):
            with sampler.meter.phase("rollout"):
                v = velocity(latents, sigma)
                if index not in self.steps:
                    latents = ode_step(latents, v, sigma, sigma_next)
                    continue
                step = transition(config.sampler, latents, v, sampler.sigmas, index, config.noise_level)
                drawn = [step.draw(sampler.noise(generators)) for _ in range(count)]
                candidates = torch.stack(drawn, dim=1)  # (B, K, C, H, W)
            with sampler.meter.phase("reward"):
                scores = self.reward.score_noisy(candidates.flatten(0, 1), sigma_next, repeated)
            scores = scores.detach().view(len(samples), count).cpu()
            best, worst, margin = clearest_pair(scores, config.temperature)
            kept = (margin > self.thresholds[index]) & has_spread(scores)
            rows = kept.nonzero().flatten()
            at, high, low = to_device(torch.stack([rows, best[rows], worst[rows]]), device)
            states = torch.stack([latents[at], candidates[at, high], candidates[at, low]]).cpu()
            pairs.append((numbers[rows], indices[rows], torch.full((len(rows),), index), *states))
            measures.append((kept, scores.mean(dim=1), margin))
            onward = [int(torch.randint(count, (), generator=generator)) for generator in generators]
            latents = candidates[torch.arange(len(samples), device=device), to_device(torch.tensor(onward), device)]
        return pairs, measures

    @property
    def no_signal(self) -> str:
        """Why a rollout gives no learning signal, and what to try."""
        return (
            f"no state gave a pair of its {self.config.candidates} candidates. Check the reward on noisy samples of "
            f"these prompts (metric `preference`: the mean margin), or lower lpo.threshold {self.config.threshold}"
        )

    def batch_at(self, micro_step: int) -> LpoBatch:
        """Return the pairs that a micro-step trains on. Runs a new rollout when one is due."""
        position, pairs = self.buffer.at(micro_step)
        every = torch.arange(len(pairs.steps))
        rows, _ = self.buffer.reuse.select(every, pairs.samples, 1, position, self.sampler.seed)
        device, statistics = self.sampler.device, dict(zip(STATISTICS, pairs.statistics.tolist(), strict=True))
        statistics |= {"signal": statistics["pairs_kept"], "rollout": position.rollout}
        if len(rows) == 0:  # no margin exceeded its threshold, or there are fewer pairs than micro-steps
            blank = torch.zeros(1, *self.sampler.latent_shape, device=device)
            steps = torch.tensor([self.steps.start])
            return LpoBatch(position, self.sampler.take([0]), steps, blank, blank, blank, 0, statistics)
        return LpoBatch(
            position=position,
            conditions=self.sampler.take(pairs.indices[rows].tolist()),
            steps=pairs.steps[rows],
            latents=to_device(pairs.latents[rows], device),
            chosen=to_device(pairs.chosen[rows], device),
            rejected=to_device(pairs.rejected[rows], device),
            count=len(rows),
            statistics=statistics,
        )

    def step(self, batch: LpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Return the mean loss of the batch, differentiable in the policy's LoRA, and the metrics.

        Metrics of the batch: `accuracy`, the share of pairs whose chosen candidate has the larger ratio p /
        p_reference; `clipped`, the share of ratios outside the clip range; `kl`, the mean of
        |velocity - reference velocity|^2. Metrics of the rollout: `reward`, the mean score of all candidates; `pairs`,
        the pair count; `pairs_kept`, the share of states that gave a pair; `preference`, the mean margin over states.
        """
        config, sampler = self.config, self.sampler
        with sampler.meter.phase("policy"):
            velocity = self.velocity_for(batch.conditions)
            step, reference, difference = sampler.transitions(
                velocity, batch.latents, batch.steps, config.sampler, config.noise_level
            )
            chosen, rejected = (
                step.log_prob(following) - reference.log_prob(following) for following in (batch.chosen, batch.rejected)
            )
            loss = step_preference_loss(chosen, rejected, config.beta, config.clip_range)
        ratios = torch.stack([chosen, rejected]).detach().exp()
        means = {
            "kl": difference.detach().square().mean(dim=(1, 2, 3)),
            "accuracy": (chosen > rejected).float(),
            "clipped": ((ratios - 1).abs() > config.clip_range).float().mean(dim=0),
        }
        return loss.mean(), {**{name: values.mean() for name, values in means.items()}, **batch.statistics}

    def _shapes(self, tensors: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
        """Return the shapes that the tensors of saved `StepPairs` must have, by name."""
        count = len(tensors["steps"])
        state = (count, *self.sampler.latent_shape)
        return {
            "number": (), "samples": (count,), "indices": (count,), "steps": (count,), "latents": state,
            "chosen": state, "rejected": state, "statistics": (len(STATISTICS),),
        }  # fmt: skip
