"""recipes/ablate_reward.py trains each arm in a separate process."""

import signal

from paths import load_recipe
from tiny_recipes import ablation


def test_an_arm_is_a_run_of_the_training_recipe_in_a_separate_process(tiny_world, tmp_path, capfd):
    handler = signal.getsignal(signal.SIGTERM)
    load_recipe("ablate_reward").main([*ablation(tiny_world, tmp_path), "--arms=[calibrated]"])
    assert signal.getsignal(signal.SIGTERM) is handler  # SIGTERM ends an evaluation as well as a training
    run = tmp_path / "out" / "arms" / "calibrated" / "seed0"
    assert (run / "reward" / "model.safetensors").exists() and (run / "scores_heldout.safetensors").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    printed = capfd.readouterr().out
    assert "train_reward.py --config" in printed and "calibrated, seed 0: heldout" in printed
    assert "## Noise levels at inference" in (tmp_path / "out" / "ablation.md").read_text()
