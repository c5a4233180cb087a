"""DiffusionNFT (arXiv 2509.16117): learn from the contrast of good and bad samples on the forward process.

A rollout takes group_size samples of every prompt, by any sampler: here the flow itself. The advantage of a sample in
its group says how good it is, r = clip(A / (2 c) + 1/2, 0, 1). Then each clean sample x0 is noised. With the policy's
velocity v and the velocity v_old of the one that sampled, a good and a bad policy are made,

    v_good = beta v + (1 - beta) v_old,       v_bad = (1 + beta) v_old - beta v,

which are to denoise what is good and what is bad:

    c / beta [r |x0_good - x0|^2 / w_good + (1 - r) |x0_bad - x0|^2 / w_bad] + kl_beta |v - v_reference|^2,

x0_good = x_sigma - sigma v_good, w_good the mean of |x0_good - x0| without gradient, c the clip of the advantage. No
log-probabilities and no stochastic steps: clean latents and their scores are all it takes, and a latent reward gives
both without a decoder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dinalrm_align.align.groups import STATISTICS, as_parts, group_scores, judge_groups
from dinalrm_align.align.nft_config import NftConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.rollouts import Spending, levels_at
from dinalrm_align.data.prompts import prompt_indices
from dinalrm_align.flow.noise import add_noise, denoised, seeded_generator
from dinalrm_align.flow.sampling import Velocity, rollout, seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.state import Ema

PATHS, NOISES, LEVELS = 30, 31, 32
"""Keys of the generators."""
LEAST_WEIGHT = 1e-5
OLD = "old."
"""What names of the sampling policy's weights begin with in the state."""


def goodness(advantages: Tensor, clip: float) -> Tensor:
    """advantages, any shape -> clip(A / (2 clip) + 1/2, 0, 1): 1/2 at the group's mean."""
    return (advantages / (2 * clip) + 0.5).clamp(0, 1)


def contrast_loss(
    velocity: Tensor, old: Tensor, x_sigma: Tensor, sigma: Tensor, latents: Tensor, good: Tensor, beta: float
) -> Tensor:
    """(n,): [r |x0_good - x0|^2 / w_good + (1 - r) |x0_bad - x0|^2 / w_bad] / beta, means over all but the batch.

    velocity, old (the sampling policy's), x_sigma, latents (x0): (n, C, H, W); sigma, good (r): (n,). Differentiable in
    velocity.
    """
    total = torch.zeros(len(good), device=velocity.device)
    for share, mixed in (
        (good, beta * velocity + (1 - beta) * old),
        (1 - good, (1 + beta) * old - beta * velocity),
    ):
        difference = denoised(x_sigma, mixed, sigma) - latents.float()
        weight = difference.detach().abs().mean(dim=(1, 2, 3)).clamp(min=LEAST_WEIGHT)
        total = total + share * difference.square().mean(dim=(1, 2, 3)) / weight
    return total / beta


@dataclass(frozen=True)
class Samples:
    """A rollout's N samples until they are spent, on the CPU: prompts' indices (N,), clean latents (N, C, H, W),
    goodness (N,), kept (N,) bool: of no dropped group, statistics: of `STATISTICS`.
    """

    number: int
    indices: Tensor
    latents: Tensor
    good: Tensor
    kept: Tensor
    statistics: Tensor


@dataclass(frozen=True)
class NftBatch:
    """n samples at n levels, on the device; count: n, or 0 where one stands in for none."""

    conditions: Conditions
    sigma: Tensor
    latents: Tensor
    noise: Tensor
    good: Tensor
    count: int
    statistics: dict[str, float]


@dataclass
class Nft:
    """`batch_at` and `step` for `loop.fit`, and its `state`: the sampling policy, and the rollout that is being spent.

    policy, reward: on one device, the reward frozen. sigmas: of the rollout. conditions: those of all training prompts,
    on any device. negative: of one empty prompt. latent_shape: (C, H, W). accumulate: micro-steps per update, as the
    loop is told. gather: a tensor (N, ...) of this process -> those of all, one after another.
    """

    policy: Policy
    reward: Callable[..., Tensor]
    sigmas: Sequence[float]
    conditions: Conditions
    negative: Conditions
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    config: NftConfig
    meter: PhaseMeter
    seed: int
    accumulate: int = 1
    rank: int = 0
    num_processes: int = 1
    gather: Callable[[Tensor], Tensor] = lambda scores: scores
    pending: Samples | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        config, steps = self.config, len(self.sigmas) - 1
        self.spending = Spending(config.epochs, config.minibatches, self.accumulate)
        self.first = self.rank * config.groups * config.group_size  # the number of this process's first sample
        self.steps = range(int(config.earliest * steps), round(config.latest * steps))
        if len(self.steps) < config.levels:
            raise ValueError(
                f"nft: {config.levels} levels per sample do not fit steps {self.steps.start} ... {self.steps.stop - 1} "
                f"of {steps}; make levels smaller, or the share between earliest and latest larger"
            )
        self.old = Ema(self.policy.parameters, 0.0)

    def velocity_for(self, conditions: Conditions, guidance_scale: float) -> Velocity:
        """The policy's velocity under these conditions."""
        return self.policy.velocity_for(conditions, guidance_scale, self.negative)

    @torch.no_grad()
    def roll_out(self, number: int) -> Samples:
        """Rollout `number` of the sampling policy: a pure function of it, seed, that policy's weights and this
        process's place. Sample n of all processes is the same however many they are.
        """
        config, device = self.config, self.policy.device
        chosen = prompt_indices(
            len(self.conditions), config.groups, number, seed=self.seed, rank=self.rank,
            num_processes=self.num_processes,
        )  # fmt: skip
        indices = torch.tensor(chosen).repeat_interleave(config.group_size)
        parts = as_parts(self.reward)
        latents, scores = [], []
        for samples in torch.arange(len(indices)).split(config.sample_batch):
            conditions = self.conditions.take(indices[samples].tolist(), device)
            places = (self.first + samples).tolist()
            generators = [seeded_generator(PATHS, self.seed, number, place) for place in places]
            with self.meter.phase("rollout"), self.old.in_place():
                noise = seeded_noise(self.latent_shape, generators).to(device)
                final = rollout(self.velocity_for(conditions, self.guidance_scale), noise, self.sigmas)
            with self.meter.phase("reward"):
                keys = [(self.seed, number, place // config.group_size) for place in places]
                scores.append(group_scores(parts, final, conditions.prompts, keys, config)["reward"])
            latents.append(final.cpu())
        judged = judge_groups({"reward": torch.cat(scores, dim=1)}, {"reward": 1.0}, config, self.gather, self.rank)
        statistics = torch.tensor([judged.statistics[name] for name in STATISTICS])
        good = goodness(judged.advantages, config.advantage_clip)
        return Samples(number, indices, torch.cat(latents), good, judged.kept, statistics)

    @torch.no_grad()
    def follow(self, number: int) -> None:
        """Bring the sampling policy nearer to the trained one, before rollout `number`."""
        kept = min(self.config.old_slope * number, self.config.old_limit)
        for name, p in self.policy.parameters.items():
            self.old.mean[name].lerp_(p.detach(), 1 - kept)

    def batch_at(self, micro_step: int) -> NftBatch:
        """What this micro-step trains on. The first one of a rollout makes it, the others need it pending.

        Raises RuntimeError when it is not: a run that goes on in the middle of a rollout needs its state.
        """
        config, device = self.config, self.policy.device
        place = self.spending.place(micro_step)
        if place.begins:
            self.follow(place.rollout)
            self.pending = self.roll_out(place.rollout)
        pending = self.pending
        if pending is None or pending.number != place.rollout:
            raise RuntimeError(
                f"micro-step {micro_step} spends rollout {place.rollout}, which is not there: begin at its first "
                "micro-step, or put back the state that was saved with the weights (`load_state_tensors`)"
            )
        if self.spending.ends(place):
            self.pending = None
        kept = pending.kept.nonzero().flatten()
        groups = (self.first + kept) // config.group_size
        rows, columns = self.spending.share(kept, groups, config.levels, place, self.seed)
        count = len(rows)
        if count == 0:
            rows, columns = torch.zeros(2, 1, dtype=torch.long)
        keys = [(self.seed, place.rollout, place.epoch, row) for row in (self.first + rows).tolist()]
        steps = [self._steps(key)[column] for key, column in zip(keys, columns.tolist(), strict=True)]
        noises = [seeded_generator(NOISES, *key, column) for key, column in zip(keys, columns.tolist(), strict=True)]
        latents = pending.latents[rows].to(device)
        statistics = dict(zip(STATISTICS, pending.statistics.tolist(), strict=True))
        return NftBatch(
            conditions=self.conditions.take(pending.indices[rows].tolist(), device),
            sigma=levels_at(self.sigmas, torch.tensor(steps, dtype=torch.long), device),
            latents=latents,
            noise=seeded_noise(self.latent_shape, noises).to(device),
            good=pending.good[rows].to(device),
            count=count,
            statistics={name: value for name, value in statistics.items() if value == value},
        )

    def _steps(self, key: tuple[int, ...]) -> list[int]:
        """The steps whose levels a sample is trained at in one epoch, all different."""
        order = torch.randperm(len(self.steps), generator=seeded_generator(LEVELS, *key))
        return (self.steps.start + order[: self.config.levels]).tolist()

    def step(self, batch: NftBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The mean loss of the batch, differentiable in the policy's LoRA, and what to record.

        kl: mean square of velocity less the reference's; moved: less the sampling policy's.
        """
        config = self.config
        with self.meter.phase("policy"):
            velocity = self.velocity_for(batch.conditions, self.guidance_scale)
            x_sigma = add_noise(batch.latents, batch.noise, batch.sigma)
            with self.policy.reference():
                v_reference = velocity(x_sigma, batch.sigma)
            with torch.no_grad(), self.old.in_place():  # before the forward with gradient: it writes into the weights
                v_old = velocity(x_sigma, batch.sigma)
            v = velocity(x_sigma, batch.sigma)
            contrast = contrast_loss(v, v_old, x_sigma, batch.sigma, batch.latents, batch.good, config.beta)
            kl = (v - v_reference).square().mean(dim=(1, 2, 3))
            loss = config.advantage_clip * contrast + config.kl_beta * kl
        moved = (v.detach() - v_old).square().mean(dim=(1, 2, 3))
        return loss.mean(), {"kl": kl.detach().mean(), "moved": moved.mean(), **batch.statistics}

    def state_tensors(self) -> dict[str, Tensor]:
        """The sampling policy's weights, and the samples that are being spent, if any, by name, on the CPU."""
        state = {f"{OLD}{name}": mean.cpu() for name, mean in self.old.mean.items()}
        for name, value in vars(self.pending).items() if self.pending else ():
            state[name] = value if isinstance(value, Tensor) else torch.tensor(value)
        return state

    def is_common(self) -> bool:
        """Whether no rollout is being spent, of which each process has its share."""
        return self.pending is None

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state_tensors` gave. ValueError when it is of other settings."""
        old = {name: tensor for name, tensor in tensors.items() if name.startswith(OLD)}
        rest = {name: tensor for name, tensor in tensors.items() if name not in old}
        count = self.config.groups * self.config.group_size
        expected = {f"{OLD}{name}": tuple(mean.shape) for name, mean in self.old.mean.items()}
        if rest:
            expected |= {
                "number": (), "indices": (count,), "latents": (count, *self.latent_shape), "good": (count,),
                "kept": (count,), "statistics": (len(STATISTICS),),
            }  # fmt: skip
        got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if got != expected:
            differing = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            raise ValueError(
                f"the saved state does not fit: {len(differing)} tensors differ, first {differing[0]!r}: got "
                f"{got.get(differing[0])}, expected {expected.get(differing[0])}; resume with the settings of the run"
            )
        for name, mean in self.old.mean.items():
            mean.copy_(old[f"{OLD}{name}"])
        self.pending = Samples(**(rest | {"number": int(rest["number"])})) if rest else None
