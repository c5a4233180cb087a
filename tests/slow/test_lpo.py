"""recipes/lpo_sd35.py on the embedded world, updated as often as its settings for SD3.5-M: its loss moves."""

import subprocess
import sys

from paths import RECIPES

from dinalrm_align.train.metrics import read_metrics


def test_the_loss_moves_within_three_rollouts(tmp_path):
    options = "--lpo.batch_size=4 --lpo.minibatches=6 --loop.steps=18 --loop.checkpoint_every=0 --evaluation.every=0"
    options += " --evaluation.samples=4 --evaluation.shown=4 --profile_every=0 --model=shapes --device=cpu"
    command = [sys.executable, str(RECIPES / "lpo_sd35.py"), f"--output_dir={tmp_path / 'run'}", *options.split()]
    subprocess.run(command, check=True, capture_output=True)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]]
    assert abs(losses[0] - 0.6931) < 1e-3
    assert max(abs(loss - 0.6931) for loss in losses[-6:]) > 0.05  # 0.16 when this was written; 0 if nothing is learned
