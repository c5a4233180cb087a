"""recipes/ablate_reward.py on the tiny stack: trains arms, resumes, reports all finished arms."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dinalrm_align.train.digest import digest

RECIPES = Path(__file__).parents[3] / "recipes"


def load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class InProcess:
    """Runs the training in this process instead of a new one; the first test uses the real Popen."""

    started: list[list[str]] = []

    def __init__(self, command):
        assert command[:2] == [sys.executable, str(RECIPES / "train_reward.py")]
        self.started.append(command[2:])
        load("train_reward").main(command[2:])

    def wait(self):
        return 0


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The training settings that arms change: a very small reward."""
    path = tmp_path_factory.mktemp("settings") / "training.yaml"
    path.write_text(
        "batch_size: 4\nloop: {ema_decay: 0.0, checkpoint_every: 2}\noptim: {lr: 1.0e-2}\n"
        "reward: {num_layers: 2, visual_taps: [1, 2], text_taps: [1, 2], text_length: 14, "
        "head: {width: 16, num_attn_heads: 2}, lora: {rank: 2}}\n"
    )
    return path


@pytest.fixture
def arguments(settings, tiny_world, tmp_path):
    return [
        f"--model={tiny_world}", f"--training={settings}", f"--output_dir={tmp_path / 'out'}", "--device=cpu",
        "--seeds=[0]", "--steps=2", "--sigmas=[0.0,0.4,0.8]", "--ensembles=[[0.2,0.4]]", "--draws=4",
        "--shapes_pairs.groups=8", "--shapes_pairs.heldout_groups=6", "--shapes_pairs.per_concept=1",
        "--shapes_pairs.per_shifted=1",
        "--shapes_pairs.sampled_share=0",
    ]  # fmt: skip


def test_an_arm_is_a_run_of_the_training_recipe_in_a_separate_process(arguments, tmp_path, capfd):
    load("ablate_reward").main([*arguments, "--arms=[calibrated]"])
    run = tmp_path / "out" / "arms" / "calibrated" / "seed0"
    assert (run / "reward" / "model.safetensors").exists() and (run / "judged_heldout.safetensors").exists()
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    printed = capfd.readouterr().out
    assert "train_reward.py --config" in printed and "calibrated, seed 0: heldout" in printed
    assert "## Noise levels at inference" in (tmp_path / "out" / "ablation.md").read_text()


def test_finished_arms_are_not_repeated_and_stay_in_the_report(arguments, tmp_path, monkeypatch):
    recipe = load("ablate_reward")
    monkeypatch.setattr(recipe.subprocess, "Popen", InProcess)
    InProcess.started.clear()
    recipe.main([*arguments, "--arms=[calibrated]", "--seeds=[0,1]"])
    recipe.main([*arguments, "--arms=[fixed]", "--seeds=[0,1]"])
    assert len(InProcess.started) == 4
    recipe.main([*arguments, "--arms=[fixed]", "--seeds=[0]"])
    assert len(InProcess.started) == 4

    out = tmp_path / "out"
    numbers = json.loads((out / "ablation.json").read_text())
    assert {arm: sorted(runs) for arm, runs in numbers["arms"].items()} == {
        arm: ["seed 0", "seed 1"] for arm in ("calibrated", "fixed")
    }
    text = (out / "ablation.md").read_text()
    assert "Paper: calibrated above fixed. Here, on heldout" in text and "recipes/ablate_reward.py" in text
    for figure in ("likelihood", "inference", "variance", "reliability"):
        assert (out / f"{figure}.png").stat().st_size > 10_000
    fixed = json.loads((out / "arms" / "fixed" / "seed0" / "settings.json").read_text())
    assert fixed["changes"] == {"loss.likelihood": "thurstone_fixed"}
    assert "thurstone_fixed" in (out / "arms" / "fixed" / "seed0" / "config.yaml").read_text()


def test_a_stopped_training_is_resumed(arguments, tmp_path, monkeypatch):
    recipe = load("ablate_reward")
    monkeypatch.setattr(recipe.subprocess, "Popen", InProcess)
    arguments += ["--arms=[calibrated]", "--steps=4"]
    recipe.main(arguments)
    run = tmp_path / "out" / "arms" / "calibrated" / "seed0"
    whole = digest(load_file(run / "reward" / "model.safetensors"))
    for left in ("reward", "checkpoints/step_000004"):  # as when it is killed after its first checkpoint
        shutil.rmtree(run / left)
    (run / "judged_heldout.safetensors").unlink()
    InProcess.started.clear()
    recipe.main(arguments)
    assert InProcess.started[0][:2] == ["--resume", str(run)]
    assert digest(load_file(run / "reward" / "model.safetensors")) == whole


def test_a_failing_training_exits_with_status_2(arguments, monkeypatch, capsys):
    class Failing:
        def __init__(self, command):
            pass

        def wait(self):
            return 1

    recipe = load("ablate_reward")
    monkeypatch.setattr(recipe.subprocess, "Popen", Failing)
    with pytest.raises(SystemExit) as stop:
        recipe.main([*arguments, "--arms=[calibrated]"])
    assert stop.value.code == 2
    assert "training calibrated, seed 0 exited with status 1; run the same command" in capsys.readouterr().err


def test_an_arm_started_with_other_settings_is_refused(arguments, monkeypatch, capsys):
    recipe = load("ablate_reward")
    monkeypatch.setattr(recipe.subprocess, "Popen", InProcess)
    recipe.main([*arguments, "--arms=[calibrated]"])
    with pytest.raises(SystemExit):
        recipe.main([*arguments, "--arms=[calibrated]", "--steps=3"])
    assert "was started with other settings" in capsys.readouterr().err


def test_pairs_are_required_for_other_models(capsys, tmp_path):
    with pytest.raises(SystemExit):
        load("ablate_reward").main(["--model=sd35", f"--output_dir={tmp_path}"])
    assert "expected --pairs DIR and --judged" in capsys.readouterr().err
