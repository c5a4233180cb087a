"""Configuration dataclasses of the training loop and of the optimiser. Does not import torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dinalrm_align.train import settings


@dataclass
class OptimConfig:
    """Settings of AdamW, the learning-rate schedule and gradient clipping.

    Args:
        name: adamw or adamw8bit. The latter needs pip extra `quant`; its moments take 2 bytes per parameter, not 8.
        lr: peak learning rate.
        weight_decay: coefficient of decoupled weight decay.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: term added to the square root of the second moment for numerical stability.
        clip: maximum global gradient norm; 0 disables clipping.
        schedule: learning rate after the warm-up: constant, or cosine (decay towards 0 at the last step).
        decay_share: the cosine schedule keeps lr constant until this fraction of the steps is left; then lr decays.
        warmup_steps: number of steps over which the learning rate rises linearly from 0 to lr.
    """

    MAY_CHANGE: ClassVar = (
        "lr", "weight_decay", "beta1", "beta2", "eps", "clip", "schedule", "decay_share", "warmup_steps",
    )  # fmt: skip
    name: Literal["adamw", "adamw8bit"] = "adamw"
    lr: settings.NonNegativeFloat = 1e-4
    weight_decay: settings.NonNegativeFloat = 1e-4
    beta1: settings.HalfOpenUnitInterval = 0.9
    beta2: settings.HalfOpenUnitInterval = 0.999
    eps: settings.PositiveFloat = 1e-8
    clip: settings.NonNegativeFloat = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    decay_share: settings.PositiveUnitInterval = 1.0
    warmup_steps: settings.NonNegativeInt = 0

    def __post_init__(self) -> None:
        settings.check_fields(self, "optim")


@dataclass
class LoopConfig:
    """Settings of the training loop: number of updates, checkpoints and the moving average of the weights.

    Args:
        steps: total number of optimiser updates. The total includes the updates before a resume.
        accumulate: number of micro-batches per optimiser update, on each rank.
        ema_decay: decay of the exponential moving average (EMA) of the trained weights; 0 disables the EMA. After
            optimiser update k the decay is at most (1 + k) / (10 + k). The averaged weights are evaluated and exported,
            from the first update of the EMA on; before it, the last weights.
        ema_every: number of optimiser updates between two updates of the EMA.
        checkpoint_every: number of optimiser updates between two checkpoints; 0 saves only when the run ends or stops.
        keep_last: number of checkpoints to keep; older checkpoints are deleted after each save.
        timeout: minutes that a rank waits for other ranks before the run fails. Must be longer than any work that one
            rank does while the others wait.
    """

    MAY_CHANGE: ClassVar = ("steps", "accumulate", "checkpoint_every", "keep_last", "timeout")
    steps: settings.PositiveInt = 100
    accumulate: settings.PositiveInt = 1
    ema_decay: settings.HalfOpenUnitInterval = 0.9
    ema_every: settings.PositiveInt = 1
    checkpoint_every: settings.NonNegativeInt = 50
    keep_last: settings.PositiveInt = 2
    timeout: settings.PositiveFloat = 30.0

    def __post_init__(self) -> None:
        settings.check_fields(self, "loop")

    def weights_at(self, step: int) -> Literal["average", "last"]:
        """Return which weights are evaluated and exported after update `step`: the average once it has moved."""
        return "average" if self.ema_decay > 0 and step >= self.ema_every else "last"
