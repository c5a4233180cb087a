"""Sampling of training prompts with the policy, and reuse of a rollout for several updates.

RNG streams are keyed by (seed, global sample index), so results do not depend on the world size. A rollout is drawn at
its first micro-step, and reused for epochs x minibatches updates. Each update has `accumulate` micro-steps.
The number of micro-steps affects memory, not the gradient.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from dinalrm_align.align.policy import Policy
from dinalrm_align.data.prompts import prompt_indices
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import Velocity, rollout, seeded_noise
from dinalrm_align.flow.sde import Transition, transition
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.device import to_device

ORDER = 1
"""RNG stream of the random order of samples within a group."""


@dataclass
class Sampler:
    """Samples images for prompts with the policy, and computes the policy's velocities for training.

    Args:
        conditions: text conditions of all prompts, on any device.
        negative: text conditions of one empty prompt, for classifier-free guidance.
        sigmas: noise levels of the ODE steps, decreasing from 1 to 0.
        latent_shape: shape (C, H, W) of a sample's latents.
        guidance_scale: scale of classifier-free guidance; a scale of at most 1 turns guidance off.
        accumulate: micro-steps per update.
        gather: a function from a tensor (N, ...) of this rank to the concatenation of all ranks' tensors.
    """

    policy: Policy
    conditions: Conditions
    negative: Conditions
    sigmas: Sequence[float]
    latent_shape: tuple[int, int, int]
    guidance_scale: float
    seed: int
    meter: PhaseMeter
    rank: int = 0
    num_processes: int = 1
    accumulate: int = 1
    gather: Callable[[Tensor], Tensor] = lambda values: values

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def prompt_indices(self, batch_size: int, step: int) -> list[int]:
        """Return the indices of this rank's `batch_size` prompts. `step`: number of the micro-step or rollout."""
        return prompt_indices(
            len(self.conditions), batch_size, step, seed=self.seed, rank=self.rank, num_processes=self.num_processes
        )

    def first_sample(self, batch_size: int, step: int) -> int:
        """Return the global index of this rank's first sample in micro-step `step`. `batch_size`: samples per rank."""
        return (step * self.num_processes + self.rank) * batch_size

    def take(self, indices: Sequence[int]) -> Conditions:
        """Return the conditions of the training prompts `indices`, on the policy's device."""
        return self.conditions.take(indices, self.device)

    def noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw one standard normal sample per generator. Return (B, C, H, W) on the policy's device."""
        return to_device(seeded_noise(self.latent_shape, generators), self.device)

    def levels(self, steps: Tensor) -> Tensor:
        """Return the noise levels of step indices (n,) int64, as (n,) float32 on the policy's device."""
        return to_device(torch.tensor(self.sigmas, dtype=torch.float32)[steps], self.device)

    def velocity_for(
        self, conditions: Conditions, guidance_scale: float | None = None, *, negative_gradient: bool = True
    ) -> Velocity:
        """Return the policy's velocity as a function of latents and sigma. guidance_scale=None: the sampler's own."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return self.policy.velocity_for(conditions, scale, self.negative, negative_gradient=negative_gradient)

    def transitions(
        self, velocity: Velocity, latents: Tensor, steps: Tensor, kind: str, noise_level: float, *, alone: bool = False
    ) -> tuple[Transition, Transition, Tensor]:
        """Return the policy's stochastic step, the reference's stochastic step, and the difference of the velocities.

        The difference is policy velocity - reference velocity, (n, C, H, W). Both steps start from `latents`.
        `steps`: (n,) int64, step indices of the noise schedule. `kind`: "flow_sde" or "flow_cps". `alone`: the
        reference does not run, and the policy itself stands for it.
        """
        levels = self.levels(steps)
        v = v_reference = velocity(latents, levels)
        if not alone:
            with self.policy.reference():
                v_reference = velocity(latents, levels)
        step, reference = (
            transition(kind, latents, each, self.sigmas, steps, noise_level) for each in (v, v_reference)
        )
        return step, reference, v - v_reference

    @torch.no_grad()
    def sample(self, conditions: Conditions, noise: Tensor, steps: int | None = None) -> Tensor:
        """Return latents (B, C, H, W) after the first `steps` ODE steps from noise (B, C, H, W). steps=None: all."""
        sigmas = self.sigmas if steps is None else self.sigmas[: steps + 1]
        return rollout(self.velocity_for(conditions), noise, sigmas)


@dataclass(frozen=True)
class Position:
    """Position of a micro-step in training, as four numbers counted from 0.

    The fields count rollouts, epochs (passes over a rollout), updates in the epoch, and micro-steps in the update.
    """

    rollout: int
    epoch: int
    minibatch: int
    part: int

    @property
    def starts_rollout(self) -> bool:
        return self.epoch == self.minibatch == self.part == 0

    @property
    def in_first_update(self) -> bool:
        """Whether this is the rollout's first update, in which the weights are still those that drew the rollout."""
        return self.epoch == self.minibatch == 0


@dataclass(frozen=True)
class Reuse:
    """Schedule by which a rollout is reused: epochs x minibatches updates, each of `accumulate` micro-steps."""

    epochs: int
    minibatches: int
    accumulate: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name}: got {value}; expected at least 1")

    def position(self, micro_step: int) -> Position:
        update, part = divmod(micro_step, self.accumulate)
        epochs, minibatch = divmod(update, self.minibatches)
        rollout_number, epoch = divmod(epochs, self.epochs)
        return Position(rollout_number, epoch, minibatch, part)

    def after_first_update(self, rollout: int) -> list[Position]:
        """Return the positions of the micro-steps of a rollout that follow its first update, in order."""
        count = self.epochs * self.minibatches * self.accumulate
        return [self.position(rollout * count + number) for number in range(self.accumulate, count)]

    def ends(self, position: Position) -> bool:
        """Return whether `position` is the last micro-step of its rollout."""
        last = self.epochs - 1, self.minibatches - 1, self.accumulate - 1
        return (position.epoch, position.minibatch, position.part) == last

    def select(
        self, rows: Tensor, groups: Tensor, columns: int, position: Position, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the (row, column) pairs that a micro-step trains on, as two int64 tensors (n,).

        A row is a sample; a column is a denoising step or a noise level. Each group of samples is shuffled and divided
        among the updates of an epoch, so that every update has samples of every group. The shuffle is keyed by (seed,
        rollout, epoch, group), so that updates do not depend on the world size. The number n of
        pairs differs by at most one between the micro-steps of an update, and may be 0.

        Args:
            rows: (N,) int64, indices of the samples of this rank that can be trained on.
            groups: (N,) int64, group number of each sample in `rows`. Group numbers are unique over all ranks.
            columns: number of denoising steps or noise levels per sample.
        """
        chosen = [rows[:0]]
        for group in groups.unique().tolist():
            mine = rows[groups == group]
            generator = seeded_generator(ORDER, seed, position.rollout, position.epoch, group)
            order = torch.randperm(len(mine), generator=generator)
            turn = (position.minibatch + group) % self.minibatches  # remainders rotate among the updates
            chosen.append(mine[order[_piece(len(mine), self.minibatches, turn)]])
        pairs = torch.cartesian_prod(torch.cat(chosen), torch.arange(columns)).view(-1, 2)
        return pairs[_piece(len(pairs), self.accumulate, position.part)].unbind(dim=1)


def _piece(count: int, pieces: int, number: int) -> slice:
    """Cut range(count) into `pieces` slices of nearly equal size, and return the slice with index `number`."""
    return slice(count * number // pieces, count * (number + 1) // pieces)


R = TypeVar("R")


class RolloutBuffer(Generic[R]):
    """Holds a method's current rollout for training and checkpoints, and draws each rollout at its first micro-step.

    Args:
        kind: dataclass of a rollout. It must have the field `number: int`; each field must be an int or a CPU tensor.
        draw: a function from the number of a rollout to the rollout. It must be deterministic, given seed and weights.
        shapes: a function from {field name: tensor} of a saved rollout to {field name: required shape}. An int
            field has the shape ().
    """

    def __init__(
        self,
        reuse: Reuse,
        kind: type[R],
        draw: Callable[[int], R],
        shapes: Callable[[Mapping[str, Tensor]], Mapping[str, tuple[int, ...]]],
    ) -> None:
        self.reuse, self.kind, self.draw, self.shapes = reuse, kind, draw, shapes
        self.current: R | None = None

    def at(self, micro_step: int) -> tuple[Position, R]:
        """Return the position of a micro-step and the rollout that it trains on.

        At the first micro-step of a rollout, the rollout is drawn. Raises RuntimeError if the micro-step is in the
        middle of a rollout that is not in the buffer. A resumed run must load the checkpoint's state first.
        """
        position = self.reuse.position(micro_step)
        if position.starts_rollout:
            self.current = self.draw(position.rollout)
        rollout_now = self.current
        if rollout_now is None or rollout_now.number != position.rollout:
            raise RuntimeError(
                f"micro-step {micro_step} is in the middle of rollout {position.rollout}, which is not in the buffer: "
                "start at its first micro-step, or load the state that was saved with the weights (load_state_tensors)"
            )
        if self.reuse.ends(position):
            self.current = None
        return position, rollout_now

    def state_tensors(self) -> dict[str, Tensor]:
        """Return {field name: CPU tensor} of this rank's unfinished rollout, or {} if no rollout is unfinished."""
        values: dict[str, Any] = {} if self.current is None else vars(self.current)
        return {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in values.items()}

    def is_common(self) -> bool:
        """Return whether all ranks have equal `state_tensors`. They have if every rollout is finished."""
        return self.current is None

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the rollout from the result of `state_tensors`. Raises ValueError if fields or shapes do not fit."""
        if not tensors:
            self.current = None
            return
        names = {entry.name for entry in dataclasses.fields(self.kind)}
        if tensors.keys() != names:
            raise ValueError(f"saved rollout: got the fields {sorted(tensors)}; expected {sorted(names)}")
        expected = self.shapes(tensors)
        for name, shape in expected.items():
            if tuple(tensors[name].shape) != shape:
                raise ValueError(
                    f"saved rollout: {name}: got shape {tuple(tensors[name].shape)}; expected {shape}: resume with the "
                    "settings of the run"
                )
        self.current = self.kind(
            **{name: int(tensor) if expected[name] == () else tensor for name, tensor in tensors.items()}
        )
