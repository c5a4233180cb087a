"""Settings of the training loop (`loop.fit`) and of its optimiser. Torch-free."""

from dataclasses import dataclass
from typing import Literal

from dinalrm_align.config.check import check_fields


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
    lr: float = 1e-4
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    decay_share: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "optim")
        if self.lr < 0 or self.clip < 0 or self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError(
                f"optim: got lr {self.lr}, clip {self.clip}, warmup_steps {self.warmup_steps}, weight_decay "
                f"{self.weight_decay}; none may be negative"
            )
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1 or self.eps <= 0:
            raise ValueError(
                f"optim: got beta1 {self.beta1}, beta2 {self.beta2}, eps {self.eps}; expected [0, 1), [0, 1) and more "
                "than 0"
            )
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"optim.decay_share is a share of the steps: got {self.decay_share}, expected (0, 1]")


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

    steps: int = 100
    accumulate: int = 1
    ema_decay: float = 0.9
    ema_every: int = 1
    checkpoint_every: int = 50
    keep_last: int = 2
    timeout: float = 30.0

    def __post_init__(self) -> None:
        check_fields(self, "loop")
        if self.steps < 1 or self.accumulate < 1 or self.ema_every < 1 or self.keep_last < 1:
            raise ValueError(
                f"loop: got steps {self.steps}, accumulate {self.accumulate}, ema_every {self.ema_every}, keep_last "
                f"{self.keep_last}; each must be at least 1"
            )
        if self.timeout <= 0:
            raise ValueError(f"loop.timeout: got {self.timeout} minutes; expected more than 0")
        if not 0 <= self.ema_decay < 1 or self.checkpoint_every < 0:
            raise ValueError(
                f"loop: got ema_decay {self.ema_decay}, checkpoint_every {self.checkpoint_every}; expected [0, 1) and "
                "at least 0"
            )
