"""Run a recipe on the GPU that is not there, and print faults and waits by place (`helpers/fake_gpu.py`).

python tests/on_fake_gpu.py recipes/refl_sd35.py --model shapes --device cuda --dtype bfloat16 --loop.steps 1 ...
"""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import torch
from diffusers import StableDiffusion3Pipeline  # noqa: F401  # and with it bitsandbytes and peft, before the fake GPU
from fake_gpu import FakeGpu


def main(recipe: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    sys.argv = [recipe, *arguments]
    gpu = FakeGpu()
    try:
        with gpu:
            runpy.run_path(recipe, run_name="__main__")
    finally:
        print(gpu.report(most=60))


if __name__ == "__main__":
    main(*sys.argv[1:])
