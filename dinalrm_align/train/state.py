"""What a run holds between updates: `RunState`, and the average of its weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.optim import adamw


class Stateful(Protocol):
    """A method with state that cannot be recomputed, such as statistics or a rollout that is reused for updates."""

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state by name, as it is after the last update; on any device."""

    def is_common(self) -> bool:
        """Whether the state is the same on every rank, so that a run can be resumed with another world size."""

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. Raises ValueError, before it changes anything, if it does not fit."""


class Ema:
    """Exponential moving average of named parameters: mean <- d mean + (1 - d) p, initialised with p.

    After k updates d = min(decay, (1 + k) / (10 + k)), so that the initial weights soon lose their influence.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.mean = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after update number `step`, counted from 1."""
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
        parameters: all trained parameters by name.
        optimizer: over exactly those parameters.
        average: moving average of the parameters, or None.
        method: state of the training method, one per rank, or None.
        identity: seed and digests of frozen weights and data by name. A checkpoint with another identity is refused.
        samples: prompts or pairs per update (on-policy: per rollout), summed over ranks. A run can be resumed with
            another world size if this number stays the same.
        step: updates done.
        elapsed: seconds they took.
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
