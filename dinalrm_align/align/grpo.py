"""Flow-GRPO (arXiv 2505.05470): policy gradients on the stochastic steps of a flow, compared within groups.

A rollout takes group_size samples of every prompt. Within a window its steps are stochastic (see `sde`) and their
log-probabilities kept; outside, the flow is followed. The reward scores the FINAL latents, with no decoder in between,
and a sample's advantage is how far it stands above its group,

    A = clamp((r - mean of the group) / (std + floor)),

std of the group or of the whole rollout. A group whose scores are all the same says nothing and is left out. An update
descends, over the samples and steps that are left,

    mean max(-A rho, -A clip(rho, 1 - c, 1 + c)) + kl_beta KL,      rho = p(x') / p_rollout(x')

The window gives the variants: Flow-GRPO-Fast (a random one) and MixGRPO (arXiv 2507.21802; one that moves on as
training goes). Unlike public code, steps that are not trained are never stochastic: their noise would only blur.

A group shares the reward's own noise (`groups`), so that what is compared are the samples. With an AnchoredReward every
n-th rollout is judged by two rewards, A = A_reward + weight A_anchor, as DiNa-LRM's authors do at every one.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinalrm_align.align.anchor import terms
from dinalrm_align.align.groups import ANCHOR, STATISTICS, Parts, as_parts, group_scores, judge_groups
from dinalrm_align.align.grpo_config import GrpoConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.rollouts import Place, Spending, levels_at
from dinalrm_align.align.surrogate import clipped_loss, guarded_ratio, step_kl
from dinalrm_align.data.prompts import prompt_indices
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import Velocity, rollout, seeded_noise
from dinalrm_align.flow.sde import transition
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.cost import PhaseMeter

PATHS, STARTS, WINDOWS = 10, 11, 13
"""Keys of the generators of a rollout."""
RECORDED = (*STATISTICS, ANCHOR, "window_start")


def trained_steps(config: GrpoConfig, num_steps: int, number: int, generator: torch.Generator) -> range:
    """The stochastic steps of rollout `number`, of 0 ... num_steps - 2; the last step never is one.

    Raises ValueError when the window does not fit.
    """
    if config.window == "all":
        return range(num_steps - 1)
    low, high = config.window_range or (0, num_steps - 1)
    last = high - config.window_size
    if high > num_steps - 1 or last < low:
        raise ValueError(
            f"a window of {config.window_size} in steps {low} ... {high - 1} does not fit {num_steps} steps, of which "
            "the last is not trained; make window_size or window_range smaller, or num_steps larger"
        )
    if config.window == "random":
        start = int(torch.randint(low, last + 1, (), generator=generator))
    else:
        places = -(-(last - low) // config.window_stride) + 1
        moves = number // config.window_rollouts
        moves = moves % places if config.window_wraps else min(moves, places - 1)
        start = min(low + moves * config.window_stride, last)
    return range(start, start + config.window_size)


# ----------------------------------------------------------------------------- the method


@dataclass(frozen=True)
class Rollout:
    """What is kept of N samples until it is spent; all on the CPU.

    latents (N, W + 1, C, H, W): before each of the W trained steps and after the last. log_probs (N, W). means
    (N, W, C, H, W) if a guard needs them, else (N, 0). advantages (N,), clipped; kept (N,) bool: of no dropped group.
    statistics: of `RECORDED`, NaN where not measured. All float32.
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
    """n samples at n steps: `rows` of the rollout, `columns` of its window; and what is kept of them, on the device.

    count: n; 0 where nothing was left to be trained on and one sample stands in, so that every process computes.
    """

    place: Place
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
    """`batch_at` and `step` for `loop.fit`, and its `state`: the rollout that is being spent.

    policy, reward: on one device, the reward frozen. sigmas: of the rollout (`named_sigmas`). conditions: those of
    all training prompts, on any device. negative: of one empty prompt. latent_shape: (C, H, W). accumulate: micro-steps
    per update, as the loop is told. parts and weights, for advantage_of "parts": the scores a weighted sum is made of.
    gather: a tensor (N, ...) of this process -> those of all, one after another.
    """

    policy: Policy
    reward: Callable[..., Tensor]
    sigmas: Sequence[float]
    conditions: Conditions
    negative: Conditions
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    config: GrpoConfig
    meter: PhaseMeter
    seed: int
    accumulate: int = 1
    rank: int = 0
    num_processes: int = 1
    parts: Parts | None = None
    weights: Mapping[str, float] | None = None
    gather: Callable[[Tensor], Tensor] = lambda scores: scores
    pending: Rollout | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        config = self.config
        self.spending = Spending(config.epochs, config.minibatches, self.accumulate)
        self.first = self.rank * config.groups * config.group_size  # the number of this process's first sample
        trained_steps(config, len(self.sigmas) - 1, 0, seeded_generator(0))
        self._parts, self._weights = as_parts(self.reward), {"reward": 1.0}
        if config.advantage_of == "parts":
            if self.parts is None or not self.weights:
                raise ValueError("advantage_of is 'parts', and the reward has none: take a weighted sum, or 'sum'")
            self._parts, self._weights = self.parts, self.weights

    def velocity_for(self, conditions: Conditions, guidance_scale: float) -> Velocity:
        """The policy's velocity under these conditions."""
        return self.policy.velocity_for(
            conditions, guidance_scale, self.negative, negative_gradient=self.config.negative_gradient
        )

    # ------------------------------------------------------------------------- the rollout

    def roll_out(self, number: int) -> Rollout:
        """Rollout `number`, without gradient: a pure function of it, seed, weights and this process's place.

        Sample n of all processes is the same however many they are.
        """
        config = self.config
        chosen = prompt_indices(
            len(self.conditions), config.groups, number, seed=self.seed, rank=self.rank,
            num_processes=self.num_processes,
        )  # fmt: skip
        indices = torch.tensor(chosen).repeat_interleave(config.group_size)
        window = trained_steps(config, len(self.sigmas) - 1, number, seeded_generator(WINDOWS, self.seed, number))
        parts: list[tuple[Tensor, ...]] = []
        scores: list[dict[str, Tensor]] = []
        for samples in torch.arange(len(indices)).split(config.sample_batch):
            conditions = self.conditions.take(indices[samples].tolist(), self.policy.device)
            with self.meter.phase("rollout"), torch.no_grad():
                final, *kept = self.trajectories(number, samples.tolist(), conditions, window)
            with self.meter.phase("reward"):
                scores.append(self.scores(number, samples.tolist(), final, conditions))
            parts.append(tuple(kept))
        latents, log_probs, means = (torch.cat(column) for column in zip(*parts, strict=True))
        together = {name: torch.cat([part[name] for part in scores], dim=1) for name in scores[0]}
        _, weights = self._climbed(number)
        judged = judge_groups(together, weights, config, self.gather, self.rank)
        told = {**judged.statistics, "window_start": window.start}
        statistics = torch.tensor([told.get(name, float("nan")) for name in RECORDED])
        return Rollout(
            number, window.start, indices, latents, log_probs, means, judged.advantages, judged.kept, statistics
        )

    def trajectories(
        self, number: int, samples: Sequence[int], conditions: Conditions, window: range
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample on the window's stochastic steps and the flow. samples: their places in the rollout.

        Returns the final latents (B, C, H, W), on the device; and on the CPU, as `Rollout` keeps them, the states
        (B, W + 1, C, H, W), their log-probabilities (B, W), and the means.
        """
        config = self.config
        generators = [seeded_generator(PATHS, self.seed, number, self.first + sample) for sample in samples]
        latents = self._before(number, samples, conditions, generators, window.start)
        velocity = self.velocity_for(conditions, self.guidance_scale)
        states, log_probs, means = [latents], [], []
        for index in window:
            v = velocity(latents, self.sigmas[index])
            step = transition(config.sampler, latents, v, self.sigmas, index, config.noise_level)
            latents = step.draw(seeded_noise(self.latent_shape, generators).to(latents.device))
            log_probs.append(step.log_prob(latents))
            means.append(step.mean)
            states.append(latents)
        latents = rollout(velocity, latents, self.sigmas[window.stop :])
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
        """Latents (B, C, H, W) after the first `steps` steps of the flow; of a shared start once for every group."""
        device = self.policy.device
        if not self.config.shared_start:
            noise = seeded_noise(self.latent_shape, generators).to(device)
            return rollout(self.velocity_for(conditions, self.guidance_scale), noise, self.sigmas[: steps + 1])
        groups = [(self.first + sample) // self.config.group_size for sample in samples]
        firsts = {group: place for place, group in reversed(list(enumerate(groups)))}  # where each group begins
        ordered = sorted(firsts)
        starts = [seeded_generator(STARTS, self.seed, number, group) for group in ordered]
        noise = seeded_noise(self.latent_shape, starts).to(device)
        velocity = self.velocity_for(conditions.take([firsts[group] for group in ordered]), self.guidance_scale)
        return rollout(velocity, noise, self.sigmas[: steps + 1])[[ordered.index(group) for group in groups]]

    def scores(self, number: int, samples: Sequence[int], latents: Tensor, conditions: Conditions) -> dict[str, Tensor]:
        """Scores of final latents, by part and draw: (draws, B). samples: their places in the rollout."""
        keys = [(self.seed, number, (self.first + sample) // self.config.group_size) for sample in samples]
        parts, _ = self._climbed(number)
        return group_scores(parts, latents, conditions.prompts, keys, self.config)

    def _climbed(self, number: int) -> tuple[Parts, Mapping[str, float]]:
        """What rollout `number` is judged by, and the weights: an anchor beside the rest when it is its turn."""
        weight, anchor = terms(self.reward, number).get(ANCHOR, (0.0, None))
        if anchor is None:
            return self._parts, self._weights

        def parts(latents: Tensor, **told: object) -> dict[str, Tensor]:
            return {**self._parts(latents, **told), ANCHOR: anchor(latents, **told)}

        return parts, {**self._weights, ANCHOR: weight}

    # ------------------------------------------------------------------------- the update

    def batch_at(self, micro_step: int) -> GrpoBatch:
        """What this micro-step trains on. The first one of a rollout makes it, the others need it pending.

        Raises RuntimeError when it is not: a run that goes on in the middle of a rollout needs its state.
        """
        place = self.spending.place(micro_step)
        if place.begins:
            self.pending = self.roll_out(place.rollout)
        pending = self.pending
        if pending is None or pending.number != place.rollout:
            raise RuntimeError(
                f"micro-step {micro_step} spends rollout {place.rollout}, which is not there: begin at its first "
                "micro-step, or put back the state that was saved with the weights (`load_state_tensors`)"
            )
        if self.spending.ends(place):
            self.pending = None
        width = pending.log_probs.shape[1]
        kept = pending.kept.nonzero().flatten()
        groups = (self.first + kept) // self.config.group_size
        rows, columns = self.spending.share(kept, groups, width, place, self.seed)
        count, device = len(rows), self.policy.device
        if count == 0:
            rows, columns = torch.zeros(2, 1, dtype=torch.long)
        statistics = dict(zip(RECORDED, pending.statistics.tolist(), strict=True))
        return GrpoBatch(
            place=place,
            conditions=self.conditions.take(pending.indices[rows].tolist(), device),
            steps=pending.start + columns,
            latents=pending.latents[rows, columns].to(device),
            following=pending.latents[rows, columns + 1].to(device),
            old_log_prob=pending.log_probs[rows, columns].to(device),
            old_mean=(pending.means[rows, columns] if self.config.guard else pending.means[rows]).to(device),
            advantage=pending.advantages[rows].to(device),
            count=count,
            statistics={name: value for name, value in statistics.items() if value == value},
        )

    def step(self, batch: GrpoBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The mean loss of the batch, differentiable in the policy's LoRA, and what to record.

        kl: mean square of velocity less the reference's, which compares with other methods'; step_kl: the one in the
        loss (`kl_form`). ratio_spread: mean distance of the ratios from 1; clipped: share of them beyond the clip
        range. The rest is of the rollout, see `groups.STATISTICS`. Raises FloatingPointError when the first ratio after
        a rollout is not 1.
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
            log_prob = step.log_prob(batch.following)
            if config.guard:
                ratio = guarded_ratio(step, batch.old_mean, log_prob, batch.old_log_prob)
            else:
                ratio = torch.exp(log_prob - batch.old_log_prob)
            if batch.place.in_first_update:
                self._check_ratio(ratio, batch.place.rollout)
            loss = clipped_loss(ratio, batch.advantage, config.clip_range)
            if config.guard:
                loss = loss / -step.delta.to(loss)
            kl = step_kl(config.kl_form, step, reference, v - v_reference)
            if config.kl_beta > 0:
                loss = loss + config.kl_beta * kl
        moved = (ratio.detach() - 1).abs()
        means = {
            "kl": step_kl("velocity", step, reference, v - v_reference),
            "step_kl": kl,
            "ratio_spread": moved,
            "clipped": (moved > config.clip_range).float(),
        }
        return loss.mean(), {**{name: values.detach().mean() for name, values in means.items()}, **batch.statistics}

    def _check_ratio(self, ratio: Tensor, rollout: int) -> None:
        worst = (ratio.detach() - 1).abs().max().item()
        if not worst <= self.config.ratio_tolerance:
            raise FloatingPointError(
                f"the first ratio after rollout {rollout} differs from 1 by {worst:.2g}; expected at most "
                f"{self.config.ratio_tolerance:g}. Rollout and training compute different probabilities for the same "
                "steps. In half precision they depend on the batch's size: bring sample_batch near the samples of a "
                "micro-batch, or use float32; otherwise look for dropout, or for weights that changed in between"
            )

    # ------------------------------------------------------------------------- what a resumed run needs

    def state_tensors(self) -> dict[str, Tensor]:
        """The rollout that is being spent, by name, on the CPU; nothing between two rollouts. It is this process's."""
        if self.pending is None:
            return {}
        values = {name.name: vars(self.pending)[name.name] for name in dataclasses.fields(Rollout)}
        return {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in values.items()}

    def is_common(self) -> bool:
        """Whether no rollout is being spent, of which each process has its share."""
        return self.pending is None

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state_tensors` gave. ValueError when it is not a rollout of these settings."""
        if not tensors:
            self.pending = None
            return
        names = {name.name for name in dataclasses.fields(Rollout)}
        if tensors.keys() != names:
            raise ValueError(f"a saved rollout: got {sorted(tensors)}; expected {sorted(names)}")
        count, width = self.config.groups * self.config.group_size, tensors["log_probs"].shape[-1]
        expected = {
            "number": (), "start": (), "indices": (count,), "latents": (count, width + 1, *self.latent_shape),
            "log_probs": (count, width), "advantages": (count,), "kept": (count,), "statistics": (len(RECORDED),),
            "means": (count, width, *self.latent_shape) if self.config.guard else (count, 0),
        }  # fmt: skip
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"a saved rollout's {name}: got shape {tuple(tensors[name].shape)}, expected {shape}; resume with "
                    "the settings of the run"
                )
        values = dict(tensors)
        self.pending = Rollout(**(values | {name: int(values[name]) for name in ("number", "start")}))
