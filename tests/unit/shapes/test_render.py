import numpy as np
import pytest

from dinalrm_align.shapes.config import AESTHETICS, CONCEPTS, FAITHFULNESS
from dinalrm_align.shapes.render import (
    AREA_PER_RADIUS2,
    HALF_EXTENT,
    SIZE,
    Mark,
    Nuisance,
    concepts_of,
    coverage,
    draw_nuisance,
    lay_out,
    render,
    spoil_nuisance,
    spoil_scene,
)
from dinalrm_align.shapes.scene import BACKGROUNDS, SHAPES, draw_scenes, parse_caption


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_and_extent_the_oracle_counts_on(shape):
    cover = coverage(Mark(shape, "red", 32, 32, 12))
    assert cover.sum() == pytest.approx(AREA_PER_RADIUS2[shape] * 144, rel=0.02)
    rows, columns = np.nonzero(cover > 0.5)
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    assert side == pytest.approx(2 * 12 * HALF_EXTENT[shape], abs=1.5)


def test_images_are_in_range_and_their_corner_is_the_background():
    scene = parse_caption("a large green cross on gray")
    (image,) = render([lay_out(scene, Nuisance(), np.random.default_rng(0))])
    assert image.shape == (3, SIZE, SIZE) and image.min() >= 0 and image.max() <= 1
    assert np.allclose(image[:, 0, 0], BACKGROUNDS["gray"])


def test_objects_stay_inside_the_image():
    rng = np.random.default_rng(1)
    for scene in draw_scenes(200, rng):
        for mark in lay_out(scene, draw_nuisance(rng), rng).marks:
            extent = mark.radius * HALF_EXTENT[mark.shape]
            assert min(mark.x, mark.y) - extent > 0 and max(mark.x, mark.y) + extent < SIZE


def test_the_asked_relation_is_drawn():
    scene = parse_caption("a small red circle above a large blue square on white")
    first, second = lay_out(scene, Nuisance(), np.random.default_rng(0)).marks
    assert first.y < second.y


def test_spoiling_changes_the_named_concept_and_nothing_else():
    rng = np.random.default_rng(2)
    scene = parse_caption("a small red circle left of a large blue square on gray")
    assert concepts_of(scene) == CONCEPTS
    for concept in FAITHFULNESS:
        spoiled = spoil_scene(scene, concept, rng)
        assert spoiled != scene
        assert (spoiled.background != scene.background) == (concept == "background")
        assert (len(spoiled.items) != 2) == (concept == "count")
    for concept in AESTHETICS:
        assert spoil_nuisance(Nuisance(), concept, rng) != Nuisance()
    with pytest.raises(ValueError, match="concept: got 'colour'"):
        spoil_nuisance(Nuisance(), "colour", rng)
