"""Run recipes one after the other on ranks started by `torch.distributed.run`, for tests/slow/test_ranks.py.

    python -m torch.distributed.run --standalone --nproc-per-node=2 tests/helpers/ranks_worker.py RUNS.json

RUNS.json: [[recipe, [argument, ...], whether under FSDP], ...]
"""

import json
import os
import runpy
import sys
from pathlib import Path

from accelerate import Accelerator
from matplotlib.figure import Figure
from tiny_recipes import RECIPES, stand_in

from dinalrm_align.align import setup as stage


def patchy(latents, prompts):
    """A reward that is constant on squares, whose groups are therefore dropped."""
    scores = 100 * latents.mean(dim=(1, 2, 3))
    return scores * scores.new_tensor([0.0 if "square" in prompt else 1.0 for prompt in prompts])


def uneven(latents, prompts):
    """A reward whose scale differs from prompt to prompt."""
    return latents.mean(dim=(1, 2, 3)) * latents.new_tensor([float(len(prompt)) for prompt in prompts])


def run(recipe: str, arguments: list[str]) -> None:
    """Run a recipe without drawing figures, which would take most of the time."""
    stage.plot_run = lambda folder: None
    Figure.savefig, Figure.tight_layout = stand_in, lambda figure, **options: None
    runpy.run_path(str(RECIPES / f"{recipe}.py"))["main"](arguments)


def main() -> None:
    Accelerator.end_training = lambda self: None  # keep the process group for the next run
    os.environ["FSDP_VERSION"] = "2"
    for recipe, arguments, sharded in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
        run(recipe, arguments)


if __name__ == "__main__":
    main()
