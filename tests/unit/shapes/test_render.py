import dataclasses

import numpy as np
import pytest

from dinalrm_align.shapes.config import AESTHETICS, CONCEPTS, FAITHFULNESS, FILLS, SIZES
from dinalrm_align.shapes.oracle import THRESHOLDS, find_objects, oracle_parts
from dinalrm_align.shapes.render import (
    AREA_PER_RADIUS2,
    HALF_EXTENT,
    RADII,
    SIZE,
    Mark,
    Nuisance,
    concepts_of,
    coverage,
    draw_nuisance,
    lay_out,
    lay_out_spoiled,
    render,
    spoil_nuisance,
    spoil_scene,
    strength,
)
from dinalrm_align.shapes.scene import BACKGROUNDS, SHAPES, draw_scenes, parse_caption

PAIR = "a small red circle left of a large striped blue square on gray"


def clean(scenes, seed=0):
    """Images without flaws."""
    rng = np.random.default_rng(seed)
    return render([lay_out(scene, Nuisance(), rng) for scene in scenes])


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_and_extent_the_oracle_counts_on(shape):
    cover = coverage(Mark(shape, "red", 32, 32, 12))
    assert cover.sum() == pytest.approx(AREA_PER_RADIUS2[shape] * 144, rel=0.02)
    rows, columns = np.nonzero(cover > 0.5)
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    assert side == pytest.approx(2 * 12 * HALF_EXTENT[shape], abs=1.5)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fill_changes_the_inside_and_leaves_the_object_whole(shape, fill):
    solid, filled = (Mark(shape, "red", 32.3, 31.8, 9.0, name) for name in ("solid", fill))
    cover, tone = coverage(solid), strength(filled)
    assert np.array_equal(strength(solid), cover) and np.all(tone <= cover)
    inside = cover > 0.99
    assert tone[inside].min() < 0.5 and tone[inside].max() > 0.95
    assert strength(filled, edge=6.0)[cover > 0.99].std() > 0.1, "soft outlines do not erase the fill"
    pixels = clean([parse_caption(f"a medium {fill} red {shape} on black")])[0].permute(1, 2, 0).numpy()
    for threshold in THRESHOLDS:
        (seen,) = find_objects(pixels, pixels[0, 0], "black", threshold)
        assert max(seen.overlap, key=seen.overlap.get) == shape and max(seen.fills, key=seen.fills.get) == fill


def test_images_are_in_range_and_their_corner_is_the_background():
    (image,) = clean([parse_caption("a large green cross on gray")])
    assert image.shape == (3, SIZE, SIZE) and image.min() >= 0 and image.max() <= 1
    assert np.allclose(image[:, 0, 0], BACKGROUNDS["gray"])


@pytest.mark.parametrize("size", SIZES)
def test_an_object_has_a_radius_of_its_size(size):
    scene, rng = parse_caption(f"a {size} red circle on white"), np.random.default_rng(0)
    radii = [lay_out(scene, Nuisance(), rng).marks[0].radius for _ in range(100)]
    low, high = RADII[size]
    assert low <= min(radii) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(radii) <= high


def test_objects_of_all_counts_fit_and_stay_apart():
    rng = np.random.default_rng(1)
    scenes = draw_scenes(500, rng)
    for scene in scenes:
        for mark in lay_out(scene, draw_nuisance(rng), rng).marks:
            extent = mark.radius * HALF_EXTENT[mark.shape]
            assert min(mark.x, mark.y) - extent > 0 and max(mark.x, mark.y) + extent < SIZE
    many = [scene for scene in scenes if len(scene.items) > 1][:120]
    seen = oracle_parts(clean(many), [scene.caption for scene in many])
    assert (seen["count"] == 1).float().mean() > 0.99


@pytest.mark.parametrize("relation", ["left of", "right of", "above", "below"])
def test_the_asked_relation_is_drawn(relation):
    scene = parse_caption(f"a small red circle {relation} a large blue square on white")
    first, second = lay_out(scene, Nuisance(), np.random.default_rng(0)).marks
    axis, sign = {"left of": ("x", 1), "right of": ("x", -1), "above": ("y", 1), "below": ("y", -1)}[relation]
    assert sign * (getattr(second, axis) - getattr(first, axis)) > first.radius + second.radius


def test_a_nuisance_is_drawn_as_asked():
    scene, nuisance = parse_caption("a small red circle on white"), Nuisance(edge=3.0, contrast=0.6, offset=9.0)
    drawing = lay_out(scene, nuisance, np.random.default_rng(0))
    assert (drawing.edge, drawing.contrast) == (3.0, 0.6)
    assert np.hypot(drawing.marks[0].x - SIZE / 2, drawing.marks[0].y - SIZE / 2) == pytest.approx(9.0)


def test_only_a_scene_with_a_relation_can_get_it_wrong():
    assert concepts_of(parse_caption(PAIR)) == CONCEPTS
    single = concepts_of(parse_caption("two small red circles on white"))
    assert single == tuple(concept for concept in CONCEPTS if concept != "relation")


@pytest.mark.parametrize("concept", FAITHFULNESS)
def test_spoiling_a_scene_changes_the_named_concept_and_nothing_else(concept):
    rng, scene = np.random.default_rng(2), parse_caption(PAIR)
    for _ in range(20):
        spoiled = spoil_scene(scene, concept, rng)
        assert (spoiled.background != scene.background) == (concept == "background")
        assert (spoiled.relation != scene.relation) == (concept in ("relation", "count"))
        if concept == "count":
            assert spoiled.relation is None and len(spoiled.items) in (1, 3) and {*spoiled.items} & {*scene.items}
            continue
        changed = [
            name
            for before, after in zip(scene.items, spoiled.items, strict=True)
            for name in vars(before)
            if vars(before)[name] != vars(after)[name]
        ]
        assert changed == ([concept] if hasattr(scene.items[0], concept) else [])


@pytest.mark.parametrize(("concept", "field"), zip(AESTHETICS, ("edge", "contrast", "offset")))
def test_spoiling_a_nuisance_makes_one_value_worse(concept, field):
    rng = np.random.default_rng(2)
    for _ in range(50):
        nuisance = draw_nuisance(rng)
        spoiled = spoil_nuisance(nuisance, concept, rng)
        worse = vars(spoiled)[field] - vars(nuisance)[field]
        assert (worse < 0) if field == "contrast" else (worse > 0)
        assert dataclasses.replace(spoiled, **{field: vars(nuisance)[field]}) == nuisance
        assert 1 <= spoiled.edge <= 7 and 0.3 <= spoiled.contrast <= 1 and 0 <= spoiled.offset <= 14


def test_spoiling_reaches_every_value():
    rng, scene = np.random.default_rng(5), parse_caption("five small checked red circles on white")
    fills = {spoil_scene(scene, "fill", rng).items[k].fill for _ in range(60) for k in range(5)}
    sizes = {spoil_scene(scene, "size", rng).items[k].size for _ in range(60) for k in range(5)}
    assert fills == {"solid", *FILLS} and sizes == {*SIZES}
    assert {len(spoil_scene(scene, "count", rng).items) for _ in range(20)} == {4, 6}
    six, one = (parse_caption(f"{words} on white") for words in ("six small red circles", "a large red circle"))
    assert {len(spoil_scene(six, "count", rng).items) for _ in range(20)} == {5}
    assert {len(spoil_scene(one, "count", rng).items) for _ in range(20)} == {2}


def test_a_spoiled_drawing_shows_the_spoiled_scene():
    scene = parse_caption("a large striped red circle on white")
    drawings = [lay_out_spoiled(scene, Nuisance(), [concept], np.random.default_rng(0)) for concept in ("fill", "blur")]
    assert drawings[0].marks[0].fill != "striped" and drawings[0].edge == 1
    assert drawings[1].marks[0].fill == "striped" and drawings[1].edge > 1


def test_concepts_of_the_other_kind_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="concept: got 'colour'; expected one of .'blur'"):
        spoil_nuisance(Nuisance(), "colour", rng)
    with pytest.raises(ValueError, match="concept: got 'blur'; expected one of .'shape'"):
        spoil_scene(parse_caption(PAIR), "blur", rng)
