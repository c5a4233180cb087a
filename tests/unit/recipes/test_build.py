"""recipes/build_shapes.py: its settings, and its evaluation of a reward by another recipe."""

import dataclasses
import json
from pathlib import Path

import pytest
from paths import load_recipe

from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.shapes.config import BuildConfig, Generator, PairsConfig
from dinalrm_align.shapes.pairs import write_pairs


@pytest.fixture(scope="module")
def recipe():
    return load_recipe("build_shapes")


def test_a_reward_is_evaluated_by_the_recipe_for_it(recipe, tiny_world, tmp_path, monkeypatch):
    config = BuildConfig(output_dir=str(tmp_path), device="cpu")
    (tmp_path / "weights").symlink_to(tiny_world)
    lists = PairsConfig(
        heldout_groups=4, per_concept=1, generators={"spoiled": Generator(render="spoiled")}, outside={}
    )
    folders = {kind: tmp_path / "pairs" / kind for kind in ("heldout", "concepts")}
    for kind, folder in folders.items():
        write_pairs(kind, folder, load_pipeline(str(tiny_world / "pipeline"), dtype=None), lists)
    monkeypatch.setattr(recipe, "run_process", lambda words: load_recipe(Path(words[1]).stem).main(words[2:]))
    found = recipe.evaluate_reward(config, "dinalrm", {"train": tmp_path / "absent", **folders})
    numbers = json.loads((tmp_path / "evaluate_dinalrm" / "evaluation.json").read_text())["accuracy"]
    assert found == {kind: pytest.approx(numbers[kind]["0.2+0.5+0.7"], abs=1e-5) for kind in folders}


def test_other_settings_of_a_network_are_refused(recipe, tmp_path):
    config = BuildConfig(output_dir=str(tmp_path))
    recipe.begin(config, "device: cpu\n")
    recipe.begin(dataclasses.replace(config, device="cuda"), "device: cuda\n")
    config.base.loop.steps += 1
    with pytest.raises(ValueError, match="base.loop.steps"):
        recipe.begin(config, "")
    assert (tmp_path / "config.yaml").read_text() == "device: cuda\n"
