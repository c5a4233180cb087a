"""Shared by the stages: random training images, and one run of `loop.fit` in the stage's own folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from dinalrm_align.shapes.config import BuildConfig, StageConfig
from dinalrm_align.shapes.render import Drawing, draw_nuisance, lay_out, render
from dinalrm_align.shapes.scene import Scene, draw_scenes
from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.loop import Closures, Hook, RunFolder, fit
from dinalrm_align.train.state import RunState


def random_images(number: int, rng: np.random.Generator, size: int) -> tuple[Tensor, list[Scene], list[Drawing]]:
    """Images (number, 3, size, size) of random training captions with ordinary nuisances, their scenes and drawings."""
    scenes = draw_scenes(number, rng)
    drawings = [lay_out(scene, draw_nuisance(rng), rng) for scene in scenes]
    return render(drawings, size), scenes, drawings


def run_stage(
    name: str,
    stage: StageConfig,
    config: BuildConfig,
    accelerator: Accelerator,
    parameters: dict[str, nn.Parameter],
    batch_at: Callable[[int], Any],
    step: Callable[[Any], tuple[Tensor, Mapping[str, float]]],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    hooks: tuple[Hook, ...] = (),
    shown: tuple[str, ...] = ("loss",),
) -> None:
    """Run `fit` in output_dir/name, from its last checkpoint if any; the parameters end at their moving average."""
    output_dir = Path(config.output_dir) / name
    fit(
        stage.loop, stage.optim, RunState.initial(parameters, stage.loop, stage.optim, optimizer=optimizer),
        Closures(batch_at, step), accelerator=accelerator, hooks=hooks, shown=shown,
        run=RunFolder(
            output_dir, checkpoint=latest_checkpoint(output_dir), resume_command="the same command again"
        ),
    )  # fmt: skip
    kind = "ema" if stage.loop.ema_decay > 0 else "weights"
    average = load_file(latest_checkpoint(output_dir) / f"{kind}.safetensors")
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(average[key])
