"""LPO: preference optimisation at every step of a trajectory, by a reward that reads noisy latents (arXiv 2502.01051).

From each state x_t of a trajectory K candidates for the next state are drawn by one stochastic step of the flow. The
reward scores them as they are, noisy, at their own level. Best and worst make a pair where the preference is clear: its
probability exceeds the other's by more than a threshold, which is higher where more noise is injected. The trajectory
goes on from a candidate at random. An update descends, over pairs (SPO's step-DPO loss, arXiv 2406.04314),

    -log sigmoid(beta [log clip(r_best) - log clip(r_worst)]),      r = p(x') / p_reference(x'), clipped to 1 +- c

with the reference the policy without its adapter. The original is for DDIM and UNets; here the step is that of a flow
(`sde`), so that it runs on SD3, and DiNa-LRM is the noise-aware reward.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.align.lpo_config import LpoConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.rollouts import Place, Spending, levels_at
from dinalrm_align.data.prompts import prompt_indices
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import Velocity, ode_step, seeded_noise
from dinalrm_align.flow.sde import transition
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.cost import PhaseMeter

PATHS = 20
"""Key of the trajectories' generators."""
STATISTICS = ("reward", "pairs", "pairs_kept", "preference")

ScoreNoisy = Callable[..., Tensor]
"""score_noisy(latents, sigma=..., prompts=...) -> (B,): `LatentReward.score_noisy`"""


# ----------------------------------------------------------------------------- the arithmetic


def best_and_worst(scores: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """scores (B, K) -> which candidate is best, which worst, (B,) int64 each, and how clearly, (B,) in [0, 1).

    How clearly: the difference of the two's probabilities, softmax(score / temperature) over the two of them.
    """
    best, worst = scores.argmax(dim=1), scores.argmin(dim=1)
    ends = scores.gather(1, torch.stack([best, worst], dim=1)) / temperature
    high, low = ends.softmax(dim=1).unbind(dim=1)
    return best, worst, high - low


def dynamic_threshold(stds: Tensor, low: float, high: float) -> Tensor:
    """The threshold at each step (S,), linear in the noise that it injects, stds (S,): low at the least, high at the
    most; low throughout where all inject the same.
    """
    least, most = stds.min(), stds.max()
    if most == least:
        return torch.full_like(stds, low)
    return low + (high - low) * (stds - least) / (most - least)


def step_preference_loss(
    log_ratio_chosen: Tensor, log_ratio_rejected: Tensor, beta: float, clip_range: float
) -> Tensor:
    """-log sigmoid(beta [log clip(r_chosen) - log clip(r_rejected)]), (n,); log_ratio: log p - log p_reference, (n,).

    A ratio outside of 1 +- clip_range passes no gradient.
    """
    chosen, rejected = (
        ratio.exp().clamp(1 - clip_range, 1 + clip_range).log() for ratio in (log_ratio_chosen, log_ratio_rejected)
    )
    return -F.logsigmoid(beta * (chosen - rejected))


# ----------------------------------------------------------------------------- the method


@dataclass(frozen=True)
class Pairs:
    """P pairs from a rollout's trajectories, on the CPU, until they are spent.

    samples (P,): the trajectories, numbered over all processes. indices (P,): of the prompts. steps (P,): of the
    schedule. latents, chosen, rejected (P, C, H, W): the state and two of its candidates, float32. statistics: of
    `STATISTICS`, over all processes.
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
    """n pairs on the device; count: n, or 0 where one stands in for none."""

    place: Place
    conditions: Conditions
    steps: Tensor
    latents: Tensor
    chosen: Tensor
    rejected: Tensor
    count: int
    statistics: dict[str, float]


@dataclass
class Lpo:
    """`batch_at` and `step` for `loop.fit`, and its `state`: the pairs that are being spent.

    policy, and the reward behind score_noisy: on one device, the reward frozen. sigmas: of the rollout
    (`named_sigmas`). conditions: those of all training prompts, on any device. negative: of one empty prompt.
    latent_shape: (C, H, W). accumulate: micro-steps per update, as the loop is told. gather: a tensor (N, ...) of this
    process -> those of all, one after another.
    """

    policy: Policy
    score_noisy: ScoreNoisy
    sigmas: Sequence[float]
    conditions: Conditions
    negative: Conditions
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    config: LpoConfig
    meter: PhaseMeter
    seed: int
    accumulate: int = 1
    rank: int = 0
    num_processes: int = 1
    gather: Callable[[Tensor], Tensor] = lambda values: values
    pending: Pairs | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        config, last = self.config, len(self.sigmas) - 2
        self.spending = Spending(config.epochs, config.minibatches, self.accumulate)
        self.first = self.rank * config.batch_size  # the number of this process's first trajectory
        self.steps = range(*(config.steps or (0, last)))
        if self.steps.stop > last:
            raise ValueError(
                f"lpo.steps {config.steps} does not fit {last + 1} steps, of which the last is not trained; expected "
                f"at most {(0, last)}"
            )
        blank = torch.zeros(1, 1, 1, 1)
        stds = torch.cat([
            transition(config.sampler, blank, blank, self.sigmas, index, config.noise_level).std for index in self.steps
        ])  # fmt: skip
        self.thresholds = dict(zip(self.steps, dynamic_threshold(stds, *config.threshold).tolist(), strict=True))

    def velocity_for(self, conditions: Conditions, guidance_scale: float) -> Velocity:
        """The policy's velocity under these conditions."""
        return self.policy.velocity_for(
            conditions, guidance_scale, self.negative, negative_gradient=self.config.negative_gradient
        )

    # ------------------------------------------------------------------------- the rollout

    def roll_out(self, number: int) -> Pairs:
        """The pairs of rollout `number`, without gradient: a pure function of it, seed, weights and this process's
        place. Trajectory n of all processes is the same however many they are.
        """
        config = self.config
        indices = torch.tensor(prompt_indices(
            len(self.conditions), config.batch_size, number, seed=self.seed, rank=self.rank,
            num_processes=self.num_processes,
        ))  # fmt: skip
        found: list[tuple[Tensor, ...]] = []
        seen: list[Tensor] = []
        for samples in torch.arange(len(indices)).split(config.sample_batch):
            pairs, judged = self.trajectories(number, samples.tolist(), indices[samples])
            found += pairs
            seen += judged
        columns = [torch.cat(column) for column in zip(*found, strict=True)]
        judged = torch.stack([torch.cat(column).double() for column in zip(*seen, strict=True)], dim=1)
        kept, scores, clearness = self.gather(judged).unbind(dim=1)
        statistics = [scores.mean(), kept.sum(), kept.mean(), clearness.mean()]
        return Pairs(number, *columns, torch.tensor([float(value) for value in statistics]))

    @torch.no_grad()
    def trajectories(
        self, number: int, samples: Sequence[int], indices: Tensor
    ) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        """Follow one trajectory per sample; samples: their places in the rollout, indices: of their prompts.

        Returns, for every step of `steps`, the columns of `Pairs` from samples to rejected; and kept (B,) bool,
        the mean score of each state's candidates (B,) and how clear its preference was (B,). All on the CPU.
        """
        config, device, count = self.config, self.policy.device, self.config.candidates
        conditions = self.conditions.take(indices.tolist(), device)
        velocity = self.velocity_for(conditions, self.guidance_scale)
        numbers = self.first + torch.tensor(samples)
        generators = [seeded_generator(PATHS, self.seed, number, trajectory) for trajectory in numbers.tolist()]
        latents = seeded_noise(self.latent_shape, generators).to(device)
        pairs, judged = [], []
        for index, (sigma, sigma_next) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            with self.meter.phase("rollout"):
                v = velocity(latents, sigma)
                if index not in self.steps:
                    latents = ode_step(latents, v, sigma, sigma_next)
                    continue
                step = transition(config.sampler, latents, v, self.sigmas, index, config.noise_level)
                drawn = [step.draw(seeded_noise(self.latent_shape, generators).to(device)) for _ in range(count)]
                candidates = torch.stack(drawn, dim=1)  # (B, K, C, H, W)
            with self.meter.phase("reward"):
                prompts = [prompt for prompt in conditions.prompts for _ in range(count)]
                scores = self.score_noisy(candidates.flatten(0, 1), sigma=sigma_next, prompts=prompts)
            scores = scores.detach().view(len(samples), count).cpu()
            if not bool(scores.isfinite().all()):
                raise ValueError(f"the reward gave {int((~scores.isfinite()).sum())} scores that are not finite")
            best, worst, clearness = best_and_worst(scores, config.temperature)
            kept = clearness > self.thresholds[index]
            rows = kept.nonzero().flatten()
            at = rows.to(device)
            pairs.append((
                numbers[rows],
                indices[rows],
                torch.full((len(rows),), index),
                latents[at].cpu(),
                candidates[at, best[rows].to(device)].cpu(),
                candidates[at, worst[rows].to(device)].cpu(),
            ))  # fmt: skip
            judged.append((kept, scores.mean(dim=1), clearness))
            onward = [int(torch.randint(count, (), generator=generator)) for generator in generators]
            latents = candidates[torch.arange(len(samples), device=device), torch.tensor(onward, device=device)]
        return pairs, judged

    # ------------------------------------------------------------------------- the update

    def batch_at(self, micro_step: int) -> LpoBatch:
        """What this micro-step trains on. The first one of a rollout makes it, the others need it pending.

        Raises RuntimeError when it is not: a run that goes on in the middle of a rollout needs its state.
        """
        place = self.spending.place(micro_step)
        if place.begins:
            self.pending = self.roll_out(place.rollout)
        pairs = self.pending
        if pairs is None or pairs.number != place.rollout:
            raise RuntimeError(
                f"micro-step {micro_step} spends rollout {place.rollout}, which is not there: begin at its first "
                "micro-step, or put back the state that was saved with the weights (`load_state_tensors`)"
            )
        if self.spending.ends(place):
            self.pending = None
        rows, _ = self.spending.share(torch.arange(len(pairs.steps)), pairs.samples, 1, place, self.seed)
        count, device = len(rows), self.policy.device
        if count == 0:  # no preference was clear, or there are fewer pairs than micro-steps
            return self._blank(place, pairs.statistics)
        return LpoBatch(
            place=place,
            conditions=self.conditions.take(pairs.indices[rows].tolist(), device),
            steps=pairs.steps[rows],
            latents=pairs.latents[rows].to(device),
            chosen=pairs.chosen[rows].to(device),
            rejected=pairs.rejected[rows].to(device),
            count=count,
            statistics=dict(zip(STATISTICS, pairs.statistics.tolist(), strict=True)),
        )

    def _blank(self, place: Place, statistics: Tensor) -> LpoBatch:
        """A pair that counts for nothing, for a process that has none: every process computes."""
        latents = torch.zeros(1, *self.latent_shape, device=self.policy.device)
        return LpoBatch(
            place, self.conditions.take([0], self.policy.device), torch.tensor([self.steps.start]), latents, latents,
            latents, 0, dict(zip(STATISTICS, statistics.tolist(), strict=True)),
        )  # fmt: skip

    def step(self, batch: LpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The mean loss of the batch, differentiable in the policy's LoRA, and what to record.

        accuracy: share of pairs whose better one the policy favours more than the reference does. clipped: share of
        candidates that no longer count. kl: mean square of the velocities' difference. reward: mean score of all
        candidates, at their levels. preference: how clear the pairs were before any was left out.
        """
        config = self.config
        with self.meter.phase("policy"):
            velocity = self.velocity_for(batch.conditions, self.guidance_scale)
            levels = levels_at(self.sigmas, batch.steps, batch.latents.device)
            v = velocity(batch.latents, levels)
            with self.policy.reference():
                v_reference = velocity(batch.latents, levels)
            step, reference = (
                transition(config.sampler, batch.latents, each, self.sigmas, batch.steps, config.noise_level)
                for each in (v, v_reference)
            )
            chosen, rejected = (
                step.log_prob(following) - reference.log_prob(following) for following in (batch.chosen, batch.rejected)
            )
            loss = step_preference_loss(chosen, rejected, config.beta, config.clip_range)
        ratios = torch.stack([chosen, rejected]).detach().exp()
        means = {
            "kl": (v - v_reference).detach().square().mean(dim=(1, 2, 3)),
            "accuracy": (chosen > rejected).float(),
            "clipped": ((ratios - 1).abs() > config.clip_range).float().mean(dim=0),
        }
        return loss.mean(), {**{name: values.mean() for name, values in means.items()}, **batch.statistics}

    # ------------------------------------------------------------------------- what a resumed run needs

    def state_tensors(self) -> dict[str, Tensor]:
        """The pairs that are being spent, by name, on the CPU; nothing between two rollouts. It is this process's."""
        if self.pending is None:
            return {}
        values = {name.name: vars(self.pending)[name.name] for name in dataclasses.fields(Pairs)}
        return {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in values.items()}

    def is_common(self) -> bool:
        """Whether no rollout is being spent, of which each process has its share."""
        return self.pending is None

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state_tensors` gave. ValueError when they are not pairs of these settings."""
        if not tensors:
            self.pending = None
            return
        names = {name.name for name in dataclasses.fields(Pairs)}
        if tensors.keys() != names:
            raise ValueError(f"saved pairs: got {sorted(tensors)}; expected {sorted(names)}")
        count = len(tensors["steps"])
        state = (count, *self.latent_shape)
        expected = {
            "number": (), "samples": (count,), "indices": (count,), "steps": (count,), "latents": state,
            "chosen": state, "rejected": state, "statistics": (len(STATISTICS),),
        }  # fmt: skip
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"saved pairs' {name}: got shape {tuple(tensors[name].shape)}, expected {shape}; resume with the "
                    "settings of the run"
                )
        self.pending = Pairs(**(dict(tensors) | {"number": int(tensors["number"])}))
