"""Reward hacking: a run that overoptimises its reward and raises the alarm, and the same run with a KL penalty.

python examples/evidence/hacking.py

Both maximise the embedded world's latent reward at three times the default learning rate, one without and one with a
velocity KL penalty. Finished runs are kept and interrupted ones resume. Further arguments are passed to both runs.
"""

import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from dinalrm_align.eval.report.entries import read_entries
from dinalrm_align.eval.report.figures import draw_gain, save_with_legend
from dinalrm_align.eval.report.page import run_table
from dinalrm_align.train.checkpoints import latest_checkpoint

RECIPE = Path(__file__).parents[2] / "recipes" / "refl_sd35.py"
COMMON = "--model shapes --reward dinalrm --optim.lr 1e-3 --loop.steps 30 --loop.checkpoint_every 6 --profile_every 0"
EVALUATION = "--evaluation.samples 64 --evaluation.every 6"
KL_WEIGHTS = {"free": 0, "held": 4}

folders = []
for name, kl_weight in KL_WEIGHTS.items():
    folder = Path("runs") / "hacking" / name
    folders.append(folder)
    if (folder / "summary.json").exists():
        print(f"{folder} is finished")
        continue
    new = [
        *f"{COMMON} {EVALUATION} --refl.kl_unit raw --refl.kl_weight {kl_weight} --output_dir {folder}".split(),
        *sys.argv[1:],
    ]
    options = new if latest_checkpoint(folder) is None else ["--resume", str(folder)]
    subprocess.run([sys.executable, str(RECIPE), *options], check=True)

entries, _ = read_entries(folders)
figure = Figure(figsize=(11, 4.4), layout="constrained")
for axis, quantity in zip(figure.subplots(1, 2), ("proxy", "gold")):
    draw_gain(axis, entries, quantity, "updates")
print(run_table(entries).markdown())
print(save_with_legend(figure, Path("runs") / "hacking" / "hacking.png"))
