"""Settings of the training loop (`loop.fit`) and of its optimiser. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from dinalrm_align.train import settings


@dataclass
class OptimConfig:
    """AdamW, its learning-rate schedule and gradient clipping.

    Args:
        name: adamw, or bitsandbytes' adamw8bit (extra `quant`): 2 bytes of moments per trained parameter instead of 8.
        lr: peak learning rate.
        weight_decay: decoupled, as in AdamW.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        clip: maximum norm of the gradient over all parameters; 0 disables clipping.
        schedule: after the warm-up: constant, or cosine decay to 0 at the last step.
        decay_share: share of the steps, at the end of the run, over which cosine decays; before them lr is constant.
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
        ema_decay: decay of the exponential moving average of the trained weights, which is evaluated and exported; 0
            uses the weights themselves. After k updates the decay is at most (1 + k) / (10 + k).
        ema_every: updates between two updates of the average.
        checkpoint_every: updates between two checkpoints; 0: only at the end and on Ctrl-C.
        keep_last: checkpoints to keep; older ones are deleted after a newer one is saved.
        timeout: minutes that a rank waits for the others before the run fails; longer than any rank's work alone.
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
