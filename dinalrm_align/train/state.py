"""AdamW and its learning-rate schedule, weight averaging, and `RunState`: what a run holds between updates."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinalrm_align.train.config import LoopConfig, OptimConfig


def bitsandbytes(what: str = "quantization int8 and nf4") -> Any:
    """The package bitsandbytes, which `what` needs; ImportError, naming the extra, if it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f"{what}: needs bitsandbytes: run `pip install 'dinalrm-align[quant]'`, or leave it at its default"
        ) from error
    return bitsandbytes


def adamw(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over groups {"params": [...], "lr": by default config.lr}, with 8-bit moments for the name adamw8bit."""
    kind = torch.optim.AdamW if config.name == "adamw" else bitsandbytes("optim.name adamw8bit").optim.AdamW8bit
    return kind(
        [{"lr": config.lr, **group, "initial_lr": group.get("lr", config.lr)} for group in groups],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Factor in (0, 1] of every group's learning rate at update `step`, 1 ... steps.

    Linear over the warm-up, then constant; `cosine` decays as (1 + cos(pi progress)) / 2 over the last `decay_share` of
    the steps, at most over those after the warm-up.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = max(config.warmup_steps, round((1 - config.decay_share) * steps))
    progress = max(0, step - 1 - start) / max(1, steps - start)
    return (1 + math.cos(math.pi * progress)) / 2


class Stateful(Protocol):
    """A method with state that cannot be recomputed, such as statistics or a rollout that is reused for updates."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state by name, as it is after the last update; on any device."""

    def is_common(self) -> bool:
        """Whether the state is the same on every rank, so that a run can be resumed with another world size."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned; ValueError, before anything is changed, if it does not fit."""


class Ema:
    """Exponential moving average of named parameters: mean <- d mean + (1 - d) p, initialised with p.

    After k updates d = min(decay, (1 + k) / (10 + k)), so that the initial weights soon lose their influence.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.mean = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after update `step` = 1, 2, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters.items():
            self.mean[name].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the parameters hold the average within the block; afterwards restore them bit for bit."""
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
    """Everything that a checkpoint stores of a run, and what identifies the run.

    Args:
        parameters: all trained parameters by name, exactly those of the optimizer.
        identity: seed and digests of frozen weights and data by name. A checkpoint with another identity is refused.
        samples: prompts or pairs per update (on-policy: per rollout), summed over ranks. A run can be resumed with
            another world size if this number stays the same.
        step: updates done, in `elapsed` seconds.
    """

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Ema | None = None
    method: Stateful | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    samples: int = 0
    step: int = 0
    elapsed: float = 0.0

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
    ) -> "RunState":
        """The state before the first update; optimizer: by default AdamW over all parameters."""
        optimizer = optimizer or adamw([{"params": list(parameters.values())}], optim)
        average = Ema(parameters, config.ema_decay) if config.ema_decay > 0 else None
        return cls(parameters, optimizer, average, method, identity or {}, samples)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Parameters and average by the name of their checkpoint file."""
        files: dict[str, dict[str, Tensor]] = {"weights.safetensors": dict(self.parameters)}
        return files if self.average is None else {**files, "ema.safetensors": self.average.mean}
