"""What the on-policy methods share: how a rollout is spent on updates.

A rollout is made at the first micro-step that needs it and then spent: `epochs` times through its rows, in a new random
order each time, divided into `minibatches` updates, each of them cut into `accumulate` micro-steps as `loop.fit` counts
them. How an update is cut changes its memory, not its gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinalrm_align.noise import seeded_generator

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

    def share(self, rows: Tensor, columns: int, place: Place, *keys: int) -> tuple[Tensor, Tensor, int]:
        """What a micro-step trains on: (n,) of `rows`, (n,) of 0 ... columns - 1, and the n of its whole update.

        rows (N,) int64: what the rollout has left to be trained on, each with all of its columns. The order depends on
        rollout, epoch and keys. n differs by one at most between the parts of an update, and may be 0.
        """
        generator = seeded_generator(ORDER, *keys, place.rollout, place.epoch)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = rows[_piece(len(rows), self.minibatches, place.minibatch)]
        pairs = torch.cartesian_prod(rows, torch.arange(columns)).view(-1, 2)
        mine = pairs[_piece(len(pairs), self.accumulate, place.part)]
        return mine[:, 0], mine[:, 1], len(pairs)


def _piece(count: int, pieces: int, number: int) -> slice:
    """Piece `number` of `count` things in a row, the pieces as equal as may be."""
    return slice(count * number // pieces, count * (number + 1) // pieces)


def levels_at(sigmas: Sequence[float], steps: Tensor, device: torch.device) -> Tensor:
    """sigmas of the steps (n,), float32 on the device: what the velocity of a mixed batch is told."""
    return torch.tensor(sigmas, dtype=torch.float32)[steps].to(device)
