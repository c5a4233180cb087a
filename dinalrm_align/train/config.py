"""Settings of the training loop (`loop.fit`) and of its optimiser. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train.settings import (
    HalfOpenUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveUnitInterval,
    check_fields,
)


@dataclass
class OptimConfig:
    """AdamW and what is done to its learning rate and gradients.

    Args:
        name: adamw, or adamw8bit, bitsandbytes' with moments of 8 bits (needs the extra `quant`): 2 bytes per trained
            parameter instead of 8.
        lr: learning rate at its peak.
        weight_decay: decoupled, as in AdamW.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        clip: largest norm of the whole gradient; larger ones are scaled down to it. 0 turns clipping off.
        schedule: what lr does after the warm-up: constant, or cosine down to 0 at the last step.
        decay_share: share of the steps over which cosine falls, at the end of the run; before them lr is constant.
        warmup_steps: steps over which lr rises linearly from 0.
    """

    name: Literal["adamw", "adamw8bit"] = "adamw"
    lr: NonNegativeFloat = 1e-4
    weight_decay: NonNegativeFloat = 1e-4
    beta1: HalfOpenUnitInterval = 0.9
    beta2: HalfOpenUnitInterval = 0.999
    eps: PositiveFloat = 1e-8
    clip: NonNegativeFloat = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    decay_share: PositiveUnitInterval = 1.0
    warmup_steps: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields(self, "optim")


@dataclass
class LoopConfig:
    """How long to train, how often to save, and the averaging of weights.

    Args:
        steps: optimiser updates in all, those before a resume included.
        accumulate: micro-batches summed into one update; memory is that of one, the gradient that of all.
        ema_decay: decay of the exponential moving average of the trained weights, which is what is evaluated and
            exported; 0 evaluates and exports the weights themselves. Early on the decay is at most (1 + k) / (10 + k)
            after k updates.
        ema_every: updates between two updates of the average.
        checkpoint_every: updates between two checkpoints; one is always written at the end and on Ctrl-C. 0: only
            those.
        keep_last: checkpoints to keep; older ones are deleted once a newer one is whole.
        timeout: minutes that one of several processes waits for the others before it takes them for lost and ends the
            run; longer than the slowest thing that one of them does alone.
    """

    steps: PositiveInt = 100
    accumulate: PositiveInt = 1
    ema_decay: HalfOpenUnitInterval = 0.9
    ema_every: PositiveInt = 1
    checkpoint_every: NonNegativeInt = 50
    keep_last: PositiveInt = 2
    timeout: PositiveFloat = 30.0

    def __post_init__(self) -> None:
        check_fields(self, "loop")
