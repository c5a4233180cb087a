"""Four numbers are trained on data that the ranks share; argument: the folder of the run."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from dinalrm_align.train.config import LoopConfig, OptimConfig
from dinalrm_align.train.loop import Closures, RunFolder, fit
from dinalrm_align.train.state import RunState

accelerator = Accelerator(cpu=True)
rank, size = accelerator.process_index, accelerator.num_processes
data = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
p = {"w": nn.Parameter(torch.ones(4) + rank), "idle": nn.Parameter(torch.ones(1))}  # rank 1 starts from other weights
optim = OptimConfig(lr=0.05, clip=0.5)
config = LoopConfig(steps=3, accumulate=2 // size)
fit(
    config,
    optim,
    RunState.initial(p, config, optim),
    Closures(
        lambda micro_step: data[2 * (micro_step * size + rank) :][:2],
        lambda batch: (((batch @ p["w"] - 1) ** 2).mean(), {"w": p["w"].mean()}),
    ),
    accelerator=accelerator,
    run=RunFolder(Path(sys.argv[1])),
)
accelerator.end_training()
