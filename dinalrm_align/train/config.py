"""Settings of the training loop (`loop.fit`) and of its optimiser. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train import settings


@dataclass
class OptimConfig:
    """AdamW, its learning-rate schedule and gradient clipping.

    Args:
        name: adamw; or adamw8bit of bitsandbytes (extra `quant`), with 2 instead of 8 bytes of moments per parameter.
        lr: peak learning rate.
        weight_decay: decoupled weight decay, as in AdamW.
        beta1: decay rate of the first moment.
        beta2: decay rate of the second moment.
        eps: added to the square root of the second moment.
        clip: maximum norm of the gradient over all parameters; 0 disables clipping.
        schedule: learning rate after the warm-up: constant, or cosine decay to 0 at the last step.
        decay_share: fraction of the steps, at the end of the run, over which cosine decays; lr is constant before.
        warmup_steps: steps of linear warm-up from 0.
    """

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
    """Length of training, checkpoints, and the moving average of the weights.

    Args:
        steps: total optimiser updates, including those before a resume.
        accumulate: micro-batches per update.
        ema_decay: decay of the exponential moving average of the trained weights, at most (1 + k) / (10 + k) after k
            updates; 0 disables the average. If there is an average, it is evaluated and exported.
        ema_every: optimiser updates between two updates of the average.
        checkpoint_every: updates between two checkpoints; 0 saves only at the end and on Ctrl-C.
        keep_last: number of newest checkpoints to keep; older ones are deleted after each save.
        timeout: minutes that a rank waits for other ranks before the run fails; must exceed any work of a single rank.
    """

    steps: settings.PositiveInt = 100
    accumulate: settings.PositiveInt = 1
    ema_decay: settings.HalfOpenUnitInterval = 0.9
    ema_every: settings.PositiveInt = 1
    checkpoint_every: settings.NonNegativeInt = 50
    keep_last: settings.PositiveInt = 2
    timeout: settings.PositiveFloat = 30.0

    def __post_init__(self) -> None:
        settings.check_fields(self, "loop")
