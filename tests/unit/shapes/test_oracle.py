import numpy as np
import pytest
import torch

from dinalrm_align.shapes.config import CONCEPTS
from dinalrm_align.shapes.oracle import PARTS, oracle_parts, oracle_score
from dinalrm_align.shapes.render import Nuisance, concepts_of, draw_nuisance, lay_out, lay_out_spoiled, render
from dinalrm_align.shapes.scene import draw_scenes


def test_perfect_images_score_near_three_and_a_wrong_caption_costs_most_of_it():
    rng = np.random.default_rng(0)
    scenes = draw_scenes(48, rng)
    captions = [scene.caption for scene in scenes]
    images = render([lay_out(scene, Nuisance(), rng) for scene in scenes])
    parts = oracle_parts(images, captions)
    assert set(parts) == set(PARTS)
    assert parts["faithfulness"].mean() > 0.97 and parts["aesthetics"].mean() > 0.95
    assert oracle_score(images, captions).mean() > 2.85
    assert oracle_score(images, captions[1:] + captions[:1]).mean() < 1.6


@pytest.mark.parametrize("concept", CONCEPTS)
def test_spoiling_one_concept_lowers_the_score(concept):
    rng = np.random.default_rng(1)
    scenes = [scene for scene in draw_scenes(80, rng) if concept in concepts_of(scene)][:30]
    good, bad = [], []
    for scene in scenes:
        nuisance = draw_nuisance(rng)
        good.append(lay_out(scene, nuisance, rng))
        bad.append(lay_out_spoiled(scene, nuisance, concept, rng))
    captions = [scene.caption for scene in scenes]
    better = oracle_score(render(good), captions) > oracle_score(render(bad), captions)
    assert better.float().mean() >= 0.8


def test_an_empty_image_and_noise_score_near_nothing():
    captions = ["a small red circle on white"] * 2
    images = torch.stack([torch.ones(3, 64, 64), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])
    assert oracle_score(images, captions).max() < 0.6


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"got \(1, 3, 32, 32\)"):
        oracle_score(torch.zeros(1, 3, 32, 32), ["a small red circle on white"])
    with pytest.raises(ValueError, match="2 images, 1 captions"):
        oracle_score(torch.zeros(2, 3, 64, 64), ["a small red circle on white"])


def test_the_score_tells_its_parts_in_the_same_call():
    scenes = draw_scenes(6, np.random.default_rng(2))
    captions = [scene.caption for scene in scenes]
    images, parts = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0)), {}
    scores, expected = oracle_score(images, captions, parts), oracle_parts(images, captions)
    assert torch.equal(scores, oracle_score(images, captions))
    assert {name.rpartition("/")[2] for name in parts} == set(PARTS) and "aesthetics/contrast" in parts
    assert all(torch.equal(values, expected[name.rpartition("/")[2]]) for name, values in parts.items())
    faithfulness, aesthetics = parts["faithfulness"], parts["aesthetics"]
    assert torch.equal(scores, 2 * faithfulness + aesthetics * (0.25 + 0.75 * faithfulness))
