"""recipes/evaluate_reward.py on the tiny stack."""

import importlib.util
import re
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("evaluate_reward_recipe", RECIPES / "evaluate_reward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tiny_world, tmp_path):
    return [
        f"--model={tiny_world}", f"--output_dir={tmp_path / 'out'}", "--device=cpu", "--sigmas=[0.1,0.4]",
        "--ensembles=[[0.1,0.4]]", "--calibrated_at=[0.4]", "--shapes_pairs.heldout_groups=6",
        "--shapes_pairs.per_concept=1", "--shapes_pairs.per_shifted=1", "--shapes_pairs.sampled_share=0",
    ]  # fmt: skip


def test_it_reports_accuracy_concepts_and_calibration(recipe, arguments, tmp_path, capsys):
    recipe.main(arguments)
    text = (tmp_path / "out" / "evaluation.md").read_text()
    for part in ("36 pairs of 6 captions", "| 0.1+0.4, tokens |", "## By concept, on concepts", "| shape | 1 |",
                 "## Calibration", "| reward | 0.4 | 36 |"):  # fmt: skip
        assert part in text
    assert text in capsys.readouterr().out
    assert re.search(r"The gold score itself, .* on heldout, .* on shifted, .* on concepts\.", text)
    assert (tmp_path / "out" / "reliability.png").stat().st_size > 10_000


def test_scores_are_taken_once_and_are_those_of_one_reward(recipe, arguments, tmp_path, tiny_reward_dir, capsys):
    recipe.main(arguments)
    kept = tmp_path / "out" / "judged_heldout.safetensors"
    before = kept.stat().st_mtime_ns
    recipe.main([*arguments, f"--reward={tiny_reward_dir}"])  # the same reward by another name
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        recipe.main([*arguments, "--noise_seed=5"])
    assert "judged on other terms" in capsys.readouterr().err


def test_calibration_is_looked_at_where_scores_are_taken(recipe, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        recipe.main([*arguments, "--calibrated_at=[0.3]"])
    assert stop.value.code == 2 and "calibrated_at: got [0.3]; each must be one of sigmas" in capsys.readouterr().err
