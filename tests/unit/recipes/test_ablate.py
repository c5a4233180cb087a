"""recipes/ablate_reward.py on the tiny stack: trains arms, resumes, reports all finished arms."""

import json
import shutil
import sys

import pytest
from paths import RECIPES, load_recipe
from PIL import Image
from safetensors.torch import load_file
from tiny_recipes import ablation

from dinalrm_align.eval.config import AblateRun
from dinalrm_align.models.specs import MODELS
from dinalrm_align.train.digest import digest


class InProcess:
    """Runs the training in this process instead of a new one; slow/test_ablate.py starts one."""

    started: list[list[str]] = []

    def __init__(self, command):
        assert command[:2] == [sys.executable, str(RECIPES / "train_reward.py")]
        self.started.append(command[2:])
        load_recipe("train_reward").main(command[2:])

    def wait(self):
        return 0


@pytest.fixture
def arguments(tiny_world, tmp_path):
    return ablation(tiny_world, tmp_path)


def test_finished_arms_are_not_repeated_and_stay_in_the_report(arguments, tmp_path, monkeypatch):
    recipe = load_recipe("ablate_reward")
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", InProcess)
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
    assert "| calibrated minus fixed | above | heldout | 2 | " in text and "recipes/ablate_reward.py" in text
    assert "## Accuracy on heldout by noise level" in text and "NLL of the labels in nats" in text
    assert "## Variance over noise draws" in text and "## Accuracy on shifted" not in text
    for figure in ("likelihood", "inference", "reliability_heldout"):
        assert (out / f"{figure}.png").stat().st_size > 10_000
    by_arm = {arm: runs["seed 0"] for arm, runs in numbers["arms"].items()}
    assert (
        by_arm["fixed"]["heldout"].keys() == by_arm["calibrated"]["heldout"].keys() > by_arm["fixed"]["concepts"].keys()
    )
    assert by_arm["fixed"]["concepts"].keys() == {"0.4", "0.2+0.4"}
    fixed = json.loads((out / "arms" / "fixed" / "seed0" / "settings.json").read_text())
    assert fixed["changes"] == {"loss.likelihood": "thurstone_fixed"}
    assert "thurstone_fixed" in (out / "arms" / "fixed" / "seed0" / "config.yaml").read_text()


def test_a_stopped_training_is_resumed(arguments, tmp_path, monkeypatch):
    recipe = load_recipe("ablate_reward")
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", InProcess)
    arguments += ["--arms=[calibrated]", "--steps=4"]
    recipe.main(arguments)
    run = tmp_path / "out" / "arms" / "calibrated" / "seed0"
    whole = digest(load_file(run / "reward" / "model.safetensors"))
    for left in ("reward", "checkpoints/step_000004"):  # as when it is killed after its first checkpoint
        shutil.rmtree(run / left)
    (run / "scores_heldout.safetensors").unlink()
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

    recipe = load_recipe("ablate_reward")
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", Failing)
    with pytest.raises(SystemExit) as stop:
        recipe.main([*arguments, "--arms=[calibrated]"])
    assert stop.value.code == 2
    assert "training calibrated, seed 0 exited with status 1; run the same command" in capsys.readouterr().err


def test_an_arm_started_with_other_settings_is_refused(arguments, monkeypatch, capsys):
    recipe = load_recipe("ablate_reward")
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", InProcess)
    recipe.main([*arguments, "--arms=[calibrated]"])
    with pytest.raises(SystemExit):
        recipe.main([*arguments, "--arms=[calibrated]", "--steps=3"])
    assert "steps: got 3; expected 2, as in" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the generated pairs would be others
        recipe.main([*arguments, "--arms=[calibrated]", "--shapes_pairs.groups=9"])
    assert "groups: got 9; expected 8, as in" in capsys.readouterr().err


def test_a_conflict_with_any_finished_run_is_found_before_a_training(arguments, tmp_path, monkeypatch, capsys):
    recipe = load_recipe("ablate_reward")
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", InProcess)
    recipe.main([*arguments, "--arms=[calibrated]"])
    run = tmp_path / "out" / "arms" / "calibrated" / "seed0"
    for other in ("seed0_old", "seed00", "seeds"):  # no runs of the ablation
        shutil.copytree(run, run.with_name(other))
    InProcess.started.clear()
    for changed, said in (("--steps=3", "steps: got 3; expected 2"), ("--draws=3", "got scores taken with")):
        with pytest.raises(SystemExit) as stop:
            recipe.main([*arguments, "--arms=[calibrated]" if "draws" in changed else "--arms=[fixed]", changed])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert not InProcess.started


def test_a_training_validates_on_the_first_set_that_is_not_public(tmp_path, monkeypatch):
    class Recorded(InProcess):
        def __init__(self, command):
            self.started.append(command)

    recipe, run = load_recipe("ablate_reward"), AblateRun(pairs="p", output_dir=str(tmp_path))
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", Recorded)
    for seed, sets in enumerate(({"hpdv3": "x", "mine": "y"}, {"hpdv3": "x"})):
        InProcess.started.clear()
        run.test_sets = sets
        recipe.train_arm("calibrated", seed, run, MODELS["shapes"], RECIPES / "train_reward_shapes.yaml", {})
        assert [word for word in InProcess.started[0] if "validation" in word] == ["--validation_pairs=y"] * (seed == 0)


def test_a_stop_during_a_training_ends_the_ablation(arguments, monkeypatch, capsys):
    """Also if the training finishes all the same: Ctrl-C can come during its last update."""

    class Stopped:
        def __init__(self, command):
            self.waits = iter([KeyboardInterrupt, 0])

        def wait(self):
            if result := next(self.waits):
                raise result
            return result

    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", Stopped)
    with pytest.raises(SystemExit) as stop:
        load_recipe("ablate_reward").main([*arguments, "--arms=[calibrated]"])
    assert stop.value.code == 130 and "run the same command to continue" in capsys.readouterr().err


def test_the_set_out_of_family_is_reported_if_configured(arguments, tmp_path, monkeypatch):
    recipe = load_recipe("ablate_reward")
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", InProcess)
    recipe.main([*arguments, "--arms=[calibrated]", "--shapes_pairs.outside={other: {num_steps: [2, 3]}}"])
    sets = json.loads((tmp_path / "out" / "ablation.json").read_text())["arms"]["calibrated"]["seed 0"]
    assert {"heldout", "outside", "shifted", "concepts"} <= sets.keys()
    assert (tmp_path / "out" / "arms" / "calibrated" / "seed0" / "scores_outside.safetensors").exists()
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "## Accuracy on outside by noise level" in text and "## Calibration on outside" in text


def test_an_arm_of_one_level_has_a_report_without_calibration(arguments, tmp_path, monkeypatch):
    recipe = load_recipe("ablate_reward")
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", InProcess)
    recipe.main([*arguments, "--arms=[sigma_0]"])
    text = (tmp_path / "out" / "ablation.md").read_text()
    assert "Trained at one level: sigma_0 at 0." in text and "## Calibration" not in text


def test_pairs_are_required_for_other_models(capsys, tmp_path):
    with pytest.raises(SystemExit):
        load_recipe("ablate_reward").main(["--model=sd35", f"--output_dir={tmp_path}"])
    assert "expected --pairs DIR and --test_sets" in capsys.readouterr().err


def test_bad_records_of_the_test_sets_are_refused_or_left_out(arguments, tmp_path, monkeypatch, capsys):
    recipe = load_recipe("ablate_reward")
    monkeypatch.setattr("dinalrm_align.train.command.subprocess.Popen", InProcess)
    for number in range(2):
        Image.effect_noise((64, 64), 50 + number).save(tmp_path / f"{number}.png")
    lines = [{"prompt": f"cat {n}", "chosen": "0.png", "rejected": "1.png", "label": 1 + (n == 1)} for n in range(3)]
    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments += ["--arms=[calibrated]", f"--test_sets={{mine: {tmp_path / 'set.jsonl'}}}"]
    with pytest.raises(SystemExit):
        recipe.main(arguments)
    assert "line 2: label: got 2.0; expected a number in [0, 1]. To leave out such" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="1 parts or rows left out"):  # the validation set of the training
        recipe.main([*arguments, "--on_bad=skip"])
    assert "--on_bad=skip" in InProcess.started[-1]
    assert "mine: 2 pairs of 2 captions" in (tmp_path / "out" / "ablation.md").read_text()
