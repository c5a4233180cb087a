"""The command `dinalrm-align`: every recipe by a short name, without a clone of the repository. Imports no torch.

`dinalrm-align refl ...` and `python -m dinalrm_align refl ...` run the script recipes/refl_sd35.py. A clone has the
scripts in recipes/, an installed package beside this file.
"""

import contextlib
import importlib.metadata
import io
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).parent
COMMANDS = {
    "refl": ("refl_sd35", "align a model by the gradient of a reward (ReFL, DRaFT, DRTune, Direct-Align)"),
    "dpo": ("dpo_sd35", "align a model on preference pairs, given or sampled (Diffusion-DPO)"),
    "grpo": ("grpo_sd35", "align a model by policy gradients on groups of samples (Flow-GRPO)"),
    "lpo": ("lpo_sd35", "align a model on preferences of noisy steps (LPO)"),
    "nft": ("nft_sd35", "align a model on positive and negative samples (DiffusionNFT)"),
    "score": ("score_images", 'print the scores of image files: score "a red circle" a.png b.png'),
    "evaluate": ("evaluate_reward", "measure the accuracy and calibration of a reward on test sets"),
    "train-reward": ("train_reward", "train a latent reward on preference pairs (DiNa-LRM)"),
    "ablate": ("ablate_reward", "train variants of a latent reward and compare them"),
    "prepare": ("prepare_pairs", "encode published preference pairs for training"),
    "mine": ("mine_pairs", "sample preference pairs from a model and a reward"),
    "compare": ("compare_runs", "compare alignment runs on one page"),
    "savings": ("savings", "count memory and FLOPs of latent and image rewards"),
    "push": ("push_to_hub", "upload the LoRA or the reward of a run to the Hugging Face hub, with a model card"),
    "build-shapes": ("build_shapes", "build an embedded world, the small test model, of another size"),
    "serve": ("", "serve rewards over HTTP"),
}
"""Name of a command -> (name of the script in recipes/, what it does). `serve` is `python -m dinalrm_align.serve`."""
HELP = """usage: dinalrm-align COMMAND [--NAME VALUE ...]

Align text-to-image diffusion models with rewards that read their latents.

{commands}

  dinalrm-align refl --model shapes --loop.steps 20     a first run, of the embedded world: no download, no GPU
  dinalrm-align refl --model sd35 --reward dinalrm      Stable Diffusion 3.5 Medium
  dinalrm-align COMMAND --help                          what a command does, and its options

Scripts and settings: {recipes}
Several GPUs: accelerate launch --num_processes 8 -m dinalrm_align COMMAND ...
"""


def recipes() -> Path:
    """Return the folder of the scripts: dinalrm_align/recipes of a wheel, or recipes/ of a clone."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command with its arguments, by default sys.argv[1:], as its script would run. Prints help without one."""
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h"):
        commands = "\n".join(f"  {command:14}{what}" for command, (_, what) in COMMANDS.items())
        print(HELP.format(commands=commands, recipes=recipes()), end="")
    elif name == "--version":
        print(importlib.metadata.version("dinalrm-align"))
    elif name not in COMMANDS:
        from dinalrm_align.train.command import refuse
        from dinalrm_align.train.settings import did_you_mean

        near = did_you_mean(name, COMMANDS) or f"; expected one of {', '.join(COMMANDS)};"
        refuse(f"command: got {name!r}{near} dinalrm-align --help tells what each does")
    elif {"--help", "-h"} & set(words):
        print(_help(name, words), end="")
    else:
        _run(name, words)


def _run(name: str, words: Sequence[str]) -> None:
    script, before = COMMANDS[name][0], sys.argv
    sys.argv = [f"dinalrm-align {name}", *words]
    try:
        if script:
            runpy.run_path(str(recipes() / f"{script}.py"), run_name="__main__")
        else:
            runpy.run_module("dinalrm_align.serve.__main__", run_name="__main__")
    finally:
        sys.argv = before


def _help(name: str, words: Sequence[str]) -> str:
    """Return the help of a command, with commands in place of scripts."""
    text, names = io.StringIO(), {script or "serve": command for command, (script, _) in COMMANDS.items()}
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        _run(name, words)
    script = re.compile(r"python recipes/(\w+)\.py|python -m dinalrm_align\.(\w+)|(?<=usage: )(\w+)\.py")
    return script.sub(lambda match: f"dinalrm-align {names.get(match[match.lastindex], '...')}", text.getvalue())


if __name__ == "__main__":
    main()
