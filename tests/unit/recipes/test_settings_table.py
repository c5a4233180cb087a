"""Settings files of the two worlds: SD3.5 inherits no value of the embedded world, and every value has a source."""

import json

import pytest
from paths import FIXTURES, RECIPES, load_recipe
from settings_table import METHODS, TABLE, aligned, everything, sources, text, without_source

from dinalrm_align.align.resolve import settings_files
from dinalrm_align.train.identity import settings_by_name

RUN = ("model", "output_dir")
"""What every run of its own names."""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_every_setting_for_sd35_has_a_source():
    found = {title: without_source(settings, files) for title, settings, files in everything()}
    assert found == {title: [] for title in found}, "write each into recipes/*_sd35.yaml, with its source as a comment"
    assert len(found) == 12


def test_the_table_is_up_to_date():
    assert TABLE.read_text(encoding="utf-8") == text(), "run: python tests/sd35_settings.py"


def test_a_value_without_a_comment_is_found(tmp_path):
    """Also one whose section has a comment, and one that a later file sets without a comment."""
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("seed: 0  # any\nlpo:  # a section\n  steps: null\n  beta: 1.0  # [a]:3\n  # and on\n")
    second.write_text("lpo:\n  beta: 2.0\n")
    assert sources(first) == {"seed": "any", "lpo.steps": "", "lpo.beta": "[a]:3 and on"}
    run = aligned("lpo")
    assert {"lpo.steps", "loop.steps"} <= set(without_source(run, [first]))
    assert "lpo.beta" not in without_source(run, [first]) and "lpo.beta" in without_source(run, [first, second])


@pytest.mark.parametrize("method", METHODS)
def test_where_the_worlds_differ_both_have_the_value_in_a_file(method):
    """A default of a dataclass may only be a value on which they agree."""
    shapes, sd35 = (settings_by_name(aligned(method, model=model)) for model in ("shapes", "sd35"))
    files = settings_files(RECIPES / f"{method}_sd35.py", "shapes", "dinalrm")
    set_there = {name for file in files for name in sources(file)}
    assert [name for name in shapes if shapes[name] != sd35[name] and name not in {*RUN, *set_there}] == []


def test_pairs_can_be_mined_with_the_loras_of_all_recipes():
    """The rank that mining had was the embedded world's, 16: the LoRAs of SD3.5 were refused."""
    mine = load_recipe("mine_pairs").settings_and_model(["--model=sd35"])[0]
    assert mine.policy.rank == max(aligned(method).policy.rank for method in METHODS)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lpo", ["--lpo.num_steps=10", "--lpo.steps=[0,10]"], "lpo.steps: got (0, 10); expected at most (0, 9) of 10"),
        (
            "lpo",
            ["--lpo.num_steps=null", "--lpo.steps=[0,40]"],
            "lpo.steps: got (0, 40); expected at most (0, 39) of 40",
        ),
        (
            "grpo",
            ["--grpo.num_steps=5"],
            "grpo.window_range: got steps 0 ... 4 for a window of 3; expected room for it",
        ),
        ("nft", ["--nft.num_steps=6"], "nft.levels: got 9; expected at most the 6 steps 0 ... 5 of 6"),
        ("refl", ["--refl.grad_steps=41"], "refl.grad_steps: got 41; expected at most num_steps, 40"),
        (
            "refl",
            ["--refl.steps_per_rollout=11", "--loop.accumulate=11"],
            "expected at most 10, the number of steps 30 ... 39 of 40",
        ),
    ],
)
def test_settings_that_need_more_denoising_steps_are_refused_before_anything_is_loaded(method, options, message):
    with pytest.raises(ValueError) as refused:
        aligned(method, *options)
    assert message in str(refused.value)
    if method == "lpo":  # all steps but the last follow the number of steps
        assert aligned("lpo", "--lpo.num_steps=10").lpo.trained_steps(10) == range(9)


def test_the_embedded_world_keeps_its_settings():
    """Those of the runs in examples/results. A new setting need not be in the fixture."""
    before = json.loads((FIXTURES / "shapes_settings.json").read_text())
    now = {method: aligned(method, model="shapes") for method in METHODS}
    now["mine"] = load_recipe("mine_pairs").settings_and_model(["--model=shapes"])[0]
    for name, values in before.items():
        after = settings_by_name(now[name])
        assert {key: after.get(key, "gone") for key in values} == values


def test_images_whose_activations_a_backward_pass_needs():
    """GRPO: 8 x 18 x 3 / (2 x 24). NFT: 48 x 24 x 9 / 864. LPO: 4 x 19 / 19 pairs, guided. DPO: 39 draws x 2."""
    images = {method: aligned(method).graph_images(40) for method in METHODS}
    assert images == {"refl": (4, 4), "dpo": (78, 0), "grpo": (9, 0), "lpo": (16, 0), "nft": (12, 0)}
    assert aligned("refl", "--refl.grad_steps=3", "--refl.pretrain_weight=1").graph_images(40) == (4 * 3 + 4, 4)
    assert aligned("refl", "--refl.grad_steps=3", "--refl.variant=draft_lv").graph_images(40) == (4 * 2, 8)
