"""The loop on a model of nine numbers."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.loop import Closures, Hook, RunFolder, fit
from dinalrm_align.train.state import RunState


class Memory:
    """State of a method: a running mean of a weight."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())

    def state_tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def is_common(self) -> bool:
        return True

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.mean = tensors["mean"]


def toy() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(size, generator=generator)) for name, size in (("a", (2, 4)), ("b", (1,)))}


def run(
    folder: Path,
    *,
    steps: int = 6,
    batch_size: int = 4,
    stochastic: bool = True,
    resume: Path | None = None,
    hooks: tuple[Hook, ...] = (),
    poison_at: int = -1,
    fail: Callable[[int], None] = lambda number: None,
    optim: OptimConfig | None = None,
    identity: dict[str, str] | None = None,
    stop_when: Callable[[Mapping[str, float]], str | None] | None = None,
    state: "Memory | None" = None,
    **loop: float,
) -> dict[str, nn.Parameter]:
    """Regression of 16 fixed rows, `batch_size` a micro-step; stochastic adds noise from global RNGs.

    fail: called with the number of the step, from 1, after the step has drawn noise and changed the method's state.
    """
    parameters = toy()
    optim = optim or OptimConfig(lr=0.05)
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))

    def batch_at(micro_step: int) -> Tensor:
        return data[(micro_step * batch_size + torch.arange(batch_size)) % len(data)]

    def step(batch: Tensor) -> tuple[Tensor, dict[str, float | Tensor]]:
        noise = (torch.randn(2) + np.random.randn()) * stochastic
        if state is not None:
            state.mean = 0.9 * state.mean + 0.1 * parameters["a"].detach().mean()
            noise = noise + state.mean  # so that training depends on it
        loss = ((batch @ parameters["a"].T + parameters["b"] - 1 + noise) ** 2).mean()
        steps_made.append(1)
        fail(len(steps_made))
        return (loss * math.nan if len(steps_made) == poison_at else loss), {"norm": parameters["a"].norm()}

    steps_made: list[int] = []
    config = LoopConfig(**{"steps": steps, "ema_decay": 0.5, "checkpoint_every": 2, **loop})
    fit(
        config,
        optim,
        RunState.initial(parameters, config, optim, method=state, identity=identity),
        Closures(batch_at, step),
        accelerator=Accelerator(cpu=True),
        run=RunFolder(folder, checkpoint=resume, resume_command="python train.py --resume here"),
        hooks=hooks,
        stop_when=stop_when,
    )
    return parameters


def without_times(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "elapsed"))} for row in rows]
