"""Print how often the host waits for the GPU in one update of each recipe, by place.

    python tests/host_waits.py               # all recipes
    python tests/host_waits.py grpo lpo
    python tests/host_waits.py --write       # into fixtures/host_waits.json, which slow/test_gpu_recipes.py reads

Counted on the fake GPU, on a tiny model in bfloat16, with two micro-steps an update (`helpers/gpu_runs.py`).
"""

import json
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import torch
from diffusers import StableDiffusion3Pipeline  # noqa: F401  # and with it bitsandbytes and peft, before the fake GPU
from gpu_runs import WAITS, World, no_figures, waits_of_an_update

TABLE = Path(__file__).parent / "fixtures" / "host_waits.json"


def main(*words: str) -> None:
    torch.set_num_threads(1)
    names, table = [word for word in words if word != "--write"] or list(WAITS), {}
    with tempfile.TemporaryDirectory() as folder, no_figures():
        world = World.make(Path(folder))
        for name in names:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                gpu, waits, uploads = waits_of_an_update(world, name)
            table[name] = {"waits": waits.total(), "uploads": uploads.total()}
            print(f"\n{name}: {waits.total()} waits, {uploads.total()} uploads, {gpu.faults.total()} faults")
            for kind, counter in (("wait", waits), ("upload", uploads), ("FAULT", gpu.faults)):
                for what, count in counter.most_common():
                    print(f"{count:5d}  {kind}: {what}")
    if "--write" in words:
        TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
