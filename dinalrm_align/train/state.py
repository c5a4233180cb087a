"""The optimiser, the learning-rate schedule, weight averaging, and the training state that checkpoints store."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinalrm_align.train.config import LoopConfig, OptimConfig


def bitsandbytes(what: str = "quantization int8 and nf4") -> Any:
    """Import and return bitsandbytes. `what`: setting that needs bitsandbytes, for the message of an ImportError."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f"{what}: needs bitsandbytes: run `pip install 'dinalrm-align[quant]'`, or leave it at its default"
        ) from error
    return bitsandbytes


def adamw(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Create AdamW, or 8-bit AdamW if `config.name` is adamw8bit. A parameter group without "lr" uses `config.lr`."""
    kind = torch.optim.AdamW if config.name == "adamw" else bitsandbytes("optim.name adamw8bit").optim.AdamW8bit
    return kind(
        [{"lr": config.lr, **group, "initial_lr": group.get("lr", config.lr)} for group in groups],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Return the factor in (0, 1] that multiplies the peak learning rates at update `step` = 1, ..., `steps`.

    The factor rises linearly to 1 during the warm-up. With the constant schedule it then stays 1. With the cosine
    schedule it decays as (1 + cos(pi t)) / 2, where t rises from 0 towards 1. This decay begins when only the
    fraction `config.decay_share` of the updates is left, but not before the end of the warm-up.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = max(config.warmup_steps, round((1 - config.decay_share) * steps))
    progress = max(0, step - 1 - start) / max(1, steps - start)
    return (1 + math.cos(math.pi * progress)) / 2


class Stateful(Protocol):
    """Interface of a training method with state to store in checkpoints, such as running statistics or a rollout."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the method's state after the last update as named tensors. The tensors may be on any device.

        The method must replace these tensors and not modify them: `fit` restores them if the next update fails.
        """

    def is_common(self) -> bool:
        """Return whether all ranks have the same state. If not, a run cannot resume with a different world size."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state from `tensors`. Must raise ValueError, before any change, if a tensor does not fit."""


class Ema:
    """Exponential moving average of named parameters, initialised with the parameters.

    After k optimiser updates, `update(k)` computes mean <- d * mean + (1 - d) * parameter, with
    d = min(decay, (1 + k) / (10 + k)). d is small for small k, so that the initial weights lose influence quickly.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.mean = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the present parameters. `step`: number of optimiser updates done, at least 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters.items():
            self.mean[name].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Context manager that sets the parameters to the averaged values and restores the trained values on exit."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.mean)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(values[name])


@dataclass
class RunState:
    """Training state of a run, as stored in checkpoints, and values that identify the run.

    Args:
        parameters: all trained parameters by name. They must be the parameters of `optimizer`.
        optimizer: optimiser of the trained parameters.
        average: moving average of the parameters; None if weights are not averaged.
        method: training method whose state is stored; None if the method has no state.
        identity: seed of the run and digests of frozen weights and data, by name. A run can resume only if all of
            these values match.
        settings: settings of the run by dotted name, as JSON values (`identity.settings_by_name`). They are stored, so
            that a resume can be compared with them.
        samples: number of prompts or pairs per update (on-policy: per rollout), summed over ranks. A run can resume
            with a different world size only if this number stays the same.
        step: number of optimiser updates done.
        elapsed: total seconds of all optimiser updates done.
        whole: False while an optimiser update changes the weights. Such a state must not be saved.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Ema | None = None
    method: Stateful | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    elapsed: float = 0.0
    whole: bool = True

    @classmethod
    def initial(
        cls,
        parameters: dict[str, nn.Parameter],
        config: LoopConfig,
        optim: OptimConfig,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        method: Stateful | None = None,
        identity: Mapping[str, str] | None = None,
        samples: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> "RunState":
        """Return the state before the first update. If `optimizer` is None, creates AdamW over all parameters."""
        optimizer = optimizer or adamw([{"params": list(parameters.values())}], optim)
        average = Ema(parameters, config.ema_decay) if config.ema_decay > 0 else None
        return cls(parameters, optimizer, average, method, identity or {}, samples, settings or {})

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the parameters and any averaged weights, as {file name in a checkpoint: {parameter name: tensor}}."""
        files: dict[str, dict[str, Tensor]] = {"weights.safetensors": dict(self.parameters)}
        return files if self.average is None else {**files, "ema.safetensors": self.average.mean}
