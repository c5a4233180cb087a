import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.shapes.config import Generator, PairsConfig
from dinalrm_align.shapes.pairs import write_pairs
from dinalrm_align.shapes.raters import compare, rate_lists
from dinalrm_align.shapes.render import Nuisance, lay_out, render
from dinalrm_align.shapes.scene import parse_caption

ONE, THREE = (parse_caption(f"{objects} on white") for objects in ("a small red circle", "three small red circles"))
MANY = 20_000
PLAIN = dict(raters=1, rater_spread=0.0, tie_gap=0.0, noise_per_object=0.0, noise_of_flaws=0.0)


def first_share(pairs):
    """Share of raters who prefer the first of two images."""
    return float(np.mean([label if chosen == 0 else 1 - label for ((chosen, _, label),) in pairs]))


def rated(scene, nuisances, lists=1, **settings):
    """Labels of lists of one scene, one image for each nuisance, by raters who are PLAIN but for `settings`."""
    config = PairsConfig(images=len(nuisances), **(PLAIN | settings))
    rng = np.random.default_rng(3)
    images = render([lay_out(scene, nuisance, rng) for nuisance in nuisances]).repeat(lists, 1, 1, 1)
    return rate_lists(images, [scene] * lists, config, [np.random.default_rng((7, row)) for row in range(lists)])


def test_equal_scores_without_noise_are_a_tie():
    pairs = compare(np.array([[0.0, 0.0, 1.0]]), np.zeros(3), 0.0, np.random.default_rng(0))
    assert [label for *_, label in pairs] == [0.5, 1, 1]


def test_a_rater_without_noise_follows_the_score_and_with_much_noise_does_not():
    scores, rng = np.array([[2.0, 1.0, 0.0]]), np.random.default_rng(0)
    order = [(0, 1), (0, 2), (1, 2)]
    assert [pair[:2] for pair in compare(scores, np.zeros(3), 0.0, rng)] == order
    wrong = sum(pair[:2] not in order for _ in range(200) for pair in compare(scores, np.full(3, 3.0), 0.0, rng))
    assert 120 < wrong < 300  # P(error) = Phi(-gap / (3 sqrt 2)): 0.41, 0.32, 0.41 of 200 each


@pytest.mark.parametrize(("gap", "noise"), [(0.1, (0.1, 0.1)), (0.2, (0.1, 0.3)), (-0.3, (0.4, 0.2))])
def test_the_share_of_raters_is_the_probit_of_the_gap(gap, noise):
    scores = np.tile([gap, 0.0], (MANY, 1))
    share = first_share([compare(scores, np.array(noise), 0.0, np.random.default_rng(1))])
    expected = NormalDist().cdf(gap / math.hypot(*noise))
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / MANY))


def test_a_small_difference_is_a_tie_and_counts_half():
    """P(first) - P(second) is that of two thresholds: Phi((gap - tie) / s) - Phi((-gap - tie) / s)."""
    ((chosen, _, label),) = compare(np.array([[1.0, 0.9]]), np.zeros(2), 0.2, np.random.default_rng(0))
    assert (chosen, label) == (0, 0.5)
    gap, tie, s, normal = 0.1, 0.15, math.hypot(0.1, 0.1), NormalDist()
    share = first_share([compare(np.tile([gap, 0.0], (MANY, 1)), np.full(2, 0.1), tie, np.random.default_rng(1))])
    expected = 0.5 + (normal.cdf((gap - tie) / s) - normal.cdf((-gap - tie) / s)) / 2
    assert share == pytest.approx(expected, abs=0.01)


def test_the_noise_grows_with_the_objects_and_with_the_flaws():
    """The gap of both scenes is one of aesthetics: about the same. More noise: a share nearer one half."""
    good, worse, bad = Nuisance(), Nuisance(edge=2.5), Nuisance(edge=6.0, contrast=0.4, offset=12.0)
    plain = dict(lists=3, raters=3000, rater_noise=0.1)
    crowded = {grows: first_share(rated(THREE, [good, worse], noise_per_object=grows, **plain)) for grows in (0, 2)}
    assert 0.5 < crowded[2] < crowded[0] - 0.05
    single = [first_share(rated(ONE, [good, worse], noise_per_object=grows, **plain)) for grows in (0, 2)]
    assert single[0] == single[1]
    flawed = [
        first_share(rated(ONE, [good, bad], noise_of_flaws=grows, **(plain | dict(rater_noise=0.3))))
        for grows in (0, 5)
    ]
    assert 0.5 < flawed[1] < flawed[0] - 0.05


def test_raters_weigh_the_parts_differently():
    """Without noise, raters agree unless their weights differ; the label is the share of those who agree."""
    images = [Nuisance(edge=4.0), Nuisance(contrast=0.5)]
    agreed = rated(ONE, images, raters=8, rater_noise=0.0)[0]
    differing = [pair for (pair,) in rated(ONE, images, lists=50, raters=8, rater_noise=0.0, rater_spread=0.5)]
    assert agreed[0][2] == 1.0
    assert {8 * label for *_, label in differing} <= set(range(4, 9)) and len({label for *_, label in differing}) > 2


def test_soft_labels_and_ties_are_stored(tiny_pipeline, tmp_path):
    makers = {"few": Generator(num_steps=(1, 2), guidance_scale=(1.0, 1.0)), "spoiled": Generator("spoiled")}
    config = PairsConfig(groups=6, images=3, generators=makers, outside={}, rater_noise=1.0, tie_gap=0.2, raters=3)
    write_pairs("train", tmp_path, tiny_pipeline, config)
    labels = LatentPairs(tmp_path, batch_size=6).in_order()[0].label
    assert ((labels >= 0.5) & (labels <= 1)).all() and len(labels.unique()) > 2
    assert torch.equal(labels, (6 * labels).round() / 6)  # votes and halves of the three raters
