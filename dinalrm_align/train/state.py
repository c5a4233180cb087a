"""AdamW and its learning-rate schedule, weight averaging, and `RunState`, the state that checkpoints store."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dinalrm_align.train.config import LoopConfig, OptimConfig


def bitsandbytes(what: str = "quantization int8 and nf4") -> Any:
    """Return the module bitsandbytes, needed by the setting `what`; ImportError, naming the extra, if not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f"{what}: needs bitsandbytes: run `pip install 'dinalrm-align[quant]'`, or leave it at its default"
        ) from error
    return bitsandbytes


def adamw(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW (8-bit if config.name is adamw8bit) over groups {"params": [...], "lr": default config.lr}."""
    kind = torch.optim.AdamW if config.name == "adamw" else bitsandbytes("optim.name adamw8bit").optim.AdamW8bit
    return kind(
        [{"lr": config.lr, **group, "initial_lr": group.get("lr", config.lr)} for group in groups],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def lr_factor(step: int, steps: int, config: OptimConfig) -> float:
    """Return the factor in (0, 1] that multiplies all learning rates at update `step` = 1 ... steps.

    It rises linearly to 1 over the warm-up and then stays 1. With schedule cosine it falls as (1 + cos(pi t)) / 2,
    where t goes from 0 to 1 over the last `decay_share` of the steps, but not before the warm-up ends.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = max(config.warmup_steps, round((1 - config.decay_share) * steps))
    progress = max(0, step - 1 - start) / max(1, steps - start)
    return (1 + math.cos(math.pi * progress)) / 2


class Stateful(Protocol):
    """State of a training method that cannot be recomputed, such as statistics or a rollout in use."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the whole state after the last update, keyed by name; tensors may be on any device."""

    def is_common(self) -> bool:
        """Return whether the state is the same on every rank; only then can the world size change on resume."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned; raise ValueError, before anything is changed, if it does not fit."""


class Ema:
    """Exponential moving average of named parameters p: mean <- d mean + (1 - d) p, initialised with p.

    At update k, d = min(decay, (1 + k) / (10 + k)): d is small at first, so that the initial weights fade fast.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.mean = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the parameters after optimiser update `step` = 1, 2, ..."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, p in self.parameters.items():
            self.mean[name].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Write the average into the parameters for the block; restore them bit for bit afterwards."""
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
    """State of a run that checkpoints store, and what identifies the run.

    Args:
        parameters: all trained parameters by name, the same ones as in `optimizer`.
        average: moving average of the parameters, if any.
        method: the training method, if it has state to store.
        identity: seed, and digests of frozen weights and data, by name. A checkpoint with another identity is refused.
        samples: prompts or pairs per update (on-policy: per rollout), summed over ranks. A run can be resumed with
            another world size if this number stays the same.
        step: updates done.
        elapsed: seconds that these updates took.
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
        """Return the state before the first update. optimizer: by default AdamW over all parameters."""
        optimizer = optimizer or adamw([{"params": list(parameters.values())}], optim)
        average = Ema(parameters, config.ema_decay) if config.ema_decay > 0 else None
        return cls(parameters, optimizer, average, method, identity or {}, samples)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the parameters and their average by name, keyed by the name of their file in a checkpoint."""
        files: dict[str, dict[str, Tensor]] = {"weights.safetensors": dict(self.parameters)}
        return files if self.average is None else {**files, "ema.safetensors": self.average.mean}
