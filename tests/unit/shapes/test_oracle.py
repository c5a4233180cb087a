import hashlib

import numpy as np
import pytest
import torch

from dinalrm_align.shapes.config import AESTHETICS, CONCEPTS
from dinalrm_align.shapes.oracle import PARTS, oracle_parts, oracle_score
from dinalrm_align.shapes.render import (
    Drawing,
    Mark,
    Nuisance,
    concepts_of,
    draw_nuisance,
    lay_out,
    lay_out_spoiled,
    render,
)
from dinalrm_align.shapes.scene import draw_scenes, parse_caption


def clean(scenes, seed=0, size=64):
    """Images without flaws."""
    rng = np.random.default_rng(seed)
    return render([lay_out(scene, Nuisance(), rng) for scene in scenes], size)


def test_the_default_world_is_the_one_of_the_shipped_weights():
    """Captions, pixels, and scores of good, spoiled and noisy images."""
    rng = np.random.default_rng(7)
    scenes = draw_scenes(24, rng) + draw_scenes(24, rng, held_out=True)
    captions = [scene.caption for scene in scenes]
    good, bad = [], []
    for scene in scenes:
        nuisance, concept = draw_nuisance(rng), str(rng.choice(concepts_of(scene)))
        good.append(lay_out(scene, nuisance, rng))
        bad.append(lay_out_spoiled(scene, nuisance, [concept], rng))
    images = render(good + bad)
    some = images[::6]
    noisy = (some + torch.from_numpy(0.15 * rng.standard_normal(some.shape)).float()).clamp(0, 1)
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest()[:16] == "a6ecd8d2a856e639"
    assert images.double().mean().item() == pytest.approx(0.482021966, abs=1e-9)
    scores = oracle_score(images, 2 * captions), oracle_score(noisy, 2 * captions[::6])
    assert [score.double().mean().item() for score in scores] == pytest.approx([2.499181816, 1.536269302], abs=1e-7)
    assert oracle_parts(images, 2 * captions)["objects"].double().std().item() == pytest.approx(0.101139040, abs=1e-7)


def test_perfect_images_score_near_three_and_a_wrong_caption_costs_most_of_it():
    scenes = draw_scenes(120, np.random.default_rng(0))
    captions, images = [scene.caption for scene in scenes], clean(scenes)
    parts, scores = oracle_parts(images, captions), oracle_score(images, captions)
    assert set(parts) == set(PARTS) and scores.max() <= 3
    assert (parts["faithfulness"] >= 0.9).float().mean() >= 0.97
    assert parts["sharpness"].mean() > 0.9 and parts["contrast"].mean() > 0.95 and parts["centring"].mean() > 0.9
    assert scores.mean() > 2.9
    wrong = oracle_score(images[:40], captions[1:41])
    assert wrong.mean() < 0.5 and (wrong < scores[:40]).all()


@pytest.mark.parametrize("flawed", [False, True], ids=["clean", "flawed"])
@pytest.mark.parametrize("concept", CONCEPTS)
def test_spoiling_one_concept_lowers_its_part_and_the_score(concept, flawed):
    rng = np.random.default_rng(4)
    scenes = [scene for scene in draw_scenes(80, rng) if concept in concepts_of(scene)][:30]
    good, bad = [], []
    for scene in scenes:
        nuisance = draw_nuisance(rng) if flawed else Nuisance()
        good.append(lay_out(scene, nuisance, rng))
        bad.append(lay_out_spoiled(scene, nuisance, [concept], rng))
    captions, found = [scene.caption for scene in scenes], ({}, {})
    scores = [oracle_score(render(drawings), captions, parts) for drawings, parts in zip((good, bad), found)]
    part = "aesthetics" if concept in AESTHETICS else "faithfulness"
    assert (found[0][part] > found[1][part]).float().mean() >= (0.8 if flawed else 0.95)
    assert (scores[0] > scores[1]).float().mean() >= (0.8 if flawed else 0.9)


@pytest.mark.parametrize(
    ("said", "drawn"),
    [
        ("a small red circle on white", "a small striped red circle on white"),  # no word: solid
        ("a small striped red circle on white", "a small red circle on white"),
        ("a small checked red circle on white", "a small dotted red circle on white"),
        ("a medium outlined red circle on white", "a medium checked red circle on white"),
        ("a medium red circle on white", "a large red circle on white"),
        ("a medium red circle on white", "a small red circle on white"),
        ("a large red circle on white", "a large red cross on white"),
        ("a large red circle on white", "a large purple circle on white"),
        ("a large red circle on white", "a large red circle on gray"),
        ("five small red circles on white", "six small red circles on white"),
        ("six small red circles on white", "five small red circles on white"),
        (
            "a small red circle left of a small blue square on white",
            "a small red circle above a small blue square on white",
        ),
        (
            "a small red circle left of a small blue square on white",
            "a small blue circle left of a small red square on white",
        ),
    ],
)
def test_the_oracle_sees_one_wrong_word(said, drawn):
    images = clean([parse_caption(said), parse_caption(drawn)])
    scores = oracle_parts(images, [said, said])["faithfulness"]
    assert scores[0] > 0.95 and scores[1] < scores[0] - 0.1


def test_an_empty_image_and_noise_score_nothing():
    captions = ["a small red circle on white"] * 2
    images = torch.stack([torch.ones(3, 64, 64), torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])
    assert oracle_score(images, captions).tolist() == [0, 0]


def test_a_larger_image_of_the_same_drawing_has_about_the_same_score():
    scenes = draw_scenes(12, np.random.default_rng(3))
    captions = [scene.caption for scene in scenes]
    small, large = (oracle_score(clean(scenes, size=size), captions) for size in (64, 128))
    torch.testing.assert_close(small, large, rtol=0, atol=0.1)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"got \(1, 3, 32, 32\)"):
        oracle_score(torch.zeros(1, 3, 32, 32), ["a small red circle on white"])
    with pytest.raises(ValueError, match="2 images, 1 captions"):
        oracle_score(torch.zeros(2, 3, 64, 64), ["a small red circle on white"])
    with pytest.raises(ValueError, match="got 'a cat'; expected for instance"):
        oracle_score(torch.zeros(1, 3, 64, 64), ["a cat"])


def test_the_score_tells_its_parts_in_the_same_call():
    scenes = draw_scenes(6, np.random.default_rng(2))
    rng, captions = np.random.default_rng(2), [scene.caption for scene in scenes]
    images, parts = render([lay_out(scene, draw_nuisance(rng), rng) for scene in scenes]), {}
    scores, expected = oracle_score(images, captions, parts), oracle_parts(images, captions)
    assert torch.equal(scores, oracle_score(images, captions))
    assert {name.rpartition("/")[2] for name in parts} == set(PARTS) and "aesthetics/contrast" in parts
    assert all(torch.equal(values, expected[name.rpartition("/")[2]]) for name, values in parts.items())
    faithfulness, aesthetics = parts["faithfulness"], parts["aesthetics"]
    assert torch.equal(scores, faithfulness * (2.5 + 0.5 * aesthetics)) and scores.min() > 0
    three = [parts[f"aesthetics/{name}"] for name in ("sharpness", "contrast", "centring")]
    torch.testing.assert_close(aesthetics, sum(three) / 3)
    factors = [0.5 + 0.5 * parts[f"faithfulness/{name}"] for name in ("relation", "background", "count")]
    torch.testing.assert_close(faithfulness, parts["faithfulness/objects"] * factors[0] * factors[1] * factors[2])


def test_whether_two_objects_touch_is_a_matter_of_degree():
    """The number of objects falls in steps, and not at once, as a soft gap closes."""
    caption = "two medium red circles on black"
    gaps = np.linspace(-3, 5, 33)
    marks = [[Mark("circle", "red", 32 + side * (9 + gap / 2), 32, 9.0) for side in (-1, 1)] for gap in gaps]
    images = render([Drawing(tuple(pair), "black", edge=4.0) for pair in marks])
    count = oracle_parts(images, [caption] * len(gaps))["count"]
    assert count[0] < 0.6 and count[-1] == 1
    assert (count.diff() >= 0).all() and len(count.unique()) > 2


def test_a_fragment_counts_as_less_than_an_object():
    caption, counts = "a large red circle on black", []
    for radius in (2.5, 3.3, 3.6, 4.0, 6.0):
        marks = Mark("circle", "red", 24, 32, 12.0), Mark("circle", "red", 52, 32, radius)
        counts.append(oracle_parts(render([Drawing(marks, "black")]), [caption])["count"].item())
    assert counts[0] == 1 and counts[-1] == 0 and all(0 < count < 1 for count in counts[1:-1])
    assert counts == sorted(counts, reverse=True)
