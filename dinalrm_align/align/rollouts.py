"""What the on-policy methods share: how a rollout is spent on updates.

A rollout is made at the first micro-step that needs it and then spent: `epochs` times through its rows, divided each
time at random into `minibatches` updates, each of them cut into `accumulate` micro-steps as `loop.fit` counts them. How
an update is cut changes its memory, not its gradient.

Each process keeps the samples that it took, and every group of samples is divided by itself: an update holds a share of
every group. So all processes have as much to do, and an update is the same however many of them there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinalrm_align.flow.noise import seeded_generator

ORDER = 1
"""Key of the random order's generator, apart from those of the rollout itself."""


@dataclass(frozen=True)
class Place:
    """Where a micro-step stands: its rollout, the time through it, the update within that, the part of that."""

    rollout: int
    epoch: int
    minibatch: int
    part: int

    @property
    def begins(self) -> bool:
        """Is this a rollout's first micro-step?"""
        return self.epoch == self.minibatch == self.part == 0

    @property
    def in_first_update(self) -> bool:
        """Are the weights still those that the rollout was made with?"""
        return self.epoch == self.minibatch == 0


@dataclass(frozen=True)
class Spending:
    """epochs x minibatches updates of `accumulate` micro-steps per rollout; each at least 1."""

    epochs: int
    minibatches: int
    accumulate: int

    def __post_init__(self) -> None:
        if min(self.epochs, self.minibatches, self.accumulate) < 1:
            raise ValueError(f"got {self}; expected at least 1 of each")

    def place(self, micro_step: int) -> Place:
        update, part = divmod(micro_step, self.accumulate)
        time, minibatch = divmod(update, self.minibatches)
        rollout, epoch = divmod(time, self.epochs)
        return Place(rollout, epoch, minibatch, part)

    def ends(self, place: Place) -> bool:
        """Is this the last micro-step that the rollout is spent on?"""
        return (place.epoch, place.minibatch, place.part) == (
            self.epochs - 1,
            self.minibatches - 1,
            self.accumulate - 1,
        )

    def share(self, rows: Tensor, groups: Tensor, columns: int, place: Place, seed: int) -> tuple[Tensor, Tensor]:
        """What a micro-step trains on: (n,) of `rows` and (n,) of 0 ... columns - 1.

        rows (N,) int64: what this process has left to be trained on, each with all of its columns. groups (N,) int64:
        the group of each, numbered over all processes. An update takes as equal a share of every group as may be,
        chosen by (seed, rollout, epoch, group). n differs by one at most between the parts of an update, and may be 0.
        """
        chosen = [rows[:0]]
        for group in groups.unique().tolist():
            mine = rows[groups == group]
            generator = seeded_generator(ORDER, seed, place.rollout, place.epoch, group)
            order = torch.randperm(len(mine), generator=generator)
            turn = (place.minibatch + group) % self.minibatches  # who gets the odd one changes from group to group
            chosen.append(mine[order[_piece(len(mine), self.minibatches, turn)]])
        pairs = torch.cartesian_prod(torch.cat(chosen), torch.arange(columns)).view(-1, 2)
        return pairs[_piece(len(pairs), self.accumulate, place.part)].unbind(dim=1)


def _piece(count: int, pieces: int, number: int) -> slice:
    """Piece `number` of `count` things in a row, the pieces as equal as may be."""
    return slice(count * number // pieces, count * (number + 1) // pieces)


def levels_at(sigmas: Sequence[float], steps: Tensor, device: torch.device) -> Tensor:
    """sigmas of the steps (n,), float32 on the device: what the velocity of a mixed batch is told."""
    return torch.tensor(sigmas, dtype=torch.float32)[steps].to(device)
