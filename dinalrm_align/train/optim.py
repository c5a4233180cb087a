"""AdamW and its learning-rate schedule."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from dinalrm_align.train.config import OptimConfig


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

    Linear over the warm-up, then constant. `cosine` decays as (1 + cos(pi progress)) / 2 over the last `decay_share` of
    the steps, at most over those after the warm-up.
    """
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    start = max(config.warmup_steps, round((1 - config.decay_share) * steps))
    progress = max(0, step - 1 - start) / max(1, steps - start)
    return (1 + math.cos(math.pi * progress)) / 2
