"""Options of the embedded world, `SceneConfig`: counts to six, a medium size and fills; and its default, unchanged."""

import hashlib

import numpy as np
import pytest
import torch

from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.shapes.build import _slot_classes, _slots, random_images
from dinalrm_align.shapes.config import (
    AESTHETICS,
    CONCEPTS,
    FILLS,
    SCENES,
    BuildConfig,
    PairsConfig,
    SceneConfig,
    StackConfig,
)
from dinalrm_align.shapes.oracle import find_objects, oracle_parts, oracle_score
from dinalrm_align.shapes.pairs import ensure_pairs, write_pairs
from dinalrm_align.shapes.render import (
    HALF_EXTENT,
    SIZE,
    Mark,
    Nuisance,
    concepts_of,
    coverage,
    draw_nuisance,
    lay_out,
    lay_out_spoiled,
    render,
    spoil_scene,
    strength,
)
from dinalrm_align.shapes.scene import MOST, SHAPES, Scene, draw_scenes, is_held_out, parse_caption
from dinalrm_align.shapes.stack import build_pipeline

DETAIL = SceneConfig(max_count=6, medium=True, fills=FILLS)
LONGEST = "a large striped red circle left of a small outlined blue square on gray"


def clean(scenes: list[Scene], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return render([lay_out(scene, Nuisance(), rng, DETAIL) for scene in scenes])


def test_the_default_world_is_the_one_of_the_shipped_weights():
    """Numbers of the version before there were options: captions, pixels, scores of good, spoiled and noisy images."""
    rng = np.random.default_rng(7)
    scenes = draw_scenes(24, rng) + draw_scenes(24, rng, held_out=True)
    captions = [scene.caption for scene in scenes]
    good, bad = [], []
    for scene in scenes:
        nuisance, concept = draw_nuisance(rng), str(rng.choice(concepts_of(scene)))
        good.append(lay_out(scene, nuisance, rng))
        bad.append(lay_out_spoiled(scene, nuisance, concept, rng))
    images = render(good + bad)
    noisy = (images + torch.from_numpy(0.15 * rng.standard_normal(images.shape)).float()).clamp(0, 1)
    assert SCENES.plain and SCENES.concepts == CONCEPTS
    assert hashlib.sha256("\n".join(captions).encode()).hexdigest()[:16] == "58ee5599d76520b9"
    assert images.double().mean().item() == pytest.approx(0.482805196, abs=1e-9)
    scores = oracle_score(images, 2 * captions), oracle_score(noisy, 2 * captions)
    assert [score.double().mean().item() for score in scores] == pytest.approx([2.362424674, 1.899047510], abs=1e-7)
    assert oracle_parts(images, 2 * captions)["objects"].double().std().item() == pytest.approx(0.127671000, abs=1e-7)


def test_detailed_captions_parse_back_and_keep_to_the_split():
    rng = np.random.default_rng(0)
    train, held_out = draw_scenes(400, rng, scenes=DETAIL), draw_scenes(100, rng, held_out=True, scenes=DETAIL)
    for scene in train + held_out:
        assert parse_caption(scene.caption) == scene == parse_caption(scene.caption, DETAIL)
        assert scene.relation or len(scene.items) <= MOST[scene.items[0].size]
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))
    items = [item for scene in train for item in scene.items]
    assert {item.fill for item in items} == {"solid", *FILLS} and {item.size for item in items} == {*DETAIL.sizes}
    assert {len(scene.items) for scene in train} == {1, 2, 3, 4, 5, 6}
    without = draw_scenes(200, rng, scenes=SceneConfig(max_count=5, medium=True))
    assert {len(scene.items) for scene in without} == {1, 2, 3, 4, 5}
    assert {item.size for scene in without for item in scene.items} == {"small", "medium", "large"}


@pytest.mark.parametrize("caption", ["a medium red circle on white", "a small dotted red circle on white"])
def test_words_that_the_scenes_lack_are_refused(caption):
    with pytest.raises(ValueError, match=f"got {caption.split()[1 + ('dotted' in caption)]}; expected only words of"):
        oracle_score(torch.zeros(1, 3, 64, 64), [caption])
    assert len(oracle_score(torch.zeros(1, 3, 64, 64), [caption], scenes=DETAIL)) == 1


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
    (seen,) = find_objects(pixels, pixels[0, 0], "black", DETAIL)
    assert max(seen.overlap, key=seen.overlap.get) == shape and max(seen.fills, key=seen.fills.get) == fill


def test_objects_of_all_counts_fit_and_stay_apart():
    scenes = [scene for scene in draw_scenes(500, np.random.default_rng(1), scenes=DETAIL) if len(scene.items) > 1]
    rng = np.random.default_rng(2)
    for scene in scenes:
        for mark in lay_out(scene, draw_nuisance(rng), rng, DETAIL).marks:
            extent = mark.radius * HALF_EXTENT[mark.shape]
            assert min(mark.x, mark.y) - extent > 0 and max(mark.x, mark.y) + extent < SIZE
    seen = oracle_parts(clean(scenes[:120]), [scene.caption for scene in scenes[:120]], scenes=DETAIL)
    assert (seen["count"] == 1).float().mean() > 0.99


def test_faithful_images_of_detailed_captions_score_high():
    scenes = draw_scenes(120, np.random.default_rng(3), scenes=DETAIL)
    parts = oracle_parts(clean(scenes), [scene.caption for scene in scenes], scenes=DETAIL)
    assert (parts["faithfulness"] >= 0.9).float().mean() >= 0.97
    assert parts["sharpness"].mean() > 0.9 and parts["contrast"].mean() > 0.95


@pytest.mark.parametrize("concept", DETAIL.concepts)
def test_spoiling_a_concept_of_a_detailed_caption_lowers_its_part(concept):
    rng = np.random.default_rng(4)
    scenes = [scene for scene in draw_scenes(80, rng, scenes=DETAIL) if concept in concepts_of(scene, DETAIL)][:30]
    bad = render([lay_out_spoiled(scene, Nuisance(), concept, rng, DETAIL) for scene in scenes])
    captions, part = [scene.caption for scene in scenes], "aesthetics" if concept in AESTHETICS else "faithfulness"
    good, bad = (oracle_parts(images, captions, scenes=DETAIL)[part] for images in (clean(scenes), bad))
    assert (good > bad).float().mean() >= 0.95


@pytest.mark.parametrize(
    ("said", "drawn"),
    [
        ("a small red circle on white", "a small striped red circle on white"),  # no word: solid
        ("a small striped red circle on white", "a small red circle on white"),
        ("a small checked red circle on white", "a small dotted red circle on white"),
        ("a medium red circle on white", "a large red circle on white"),
        ("a medium red circle on white", "a small red circle on white"),
        ("five small red circles on white", "six small red circles on white"),
        ("six small red circles on white", "five small red circles on white"),
    ],
)
def test_the_oracle_sees_fills_medium_sizes_and_counts_to_six(said, drawn):
    images = clean([parse_caption(said), parse_caption(drawn)])
    scores = oracle_parts(images, [said, said], scenes=DETAIL)["faithfulness"]
    assert scores[0] > 0.95 and scores[1] < scores[0] - 0.1


def test_spoiling_reaches_every_fill_and_count():
    rng, scene = np.random.default_rng(5), parse_caption("five small checked red circles on white")
    fills = {spoil_scene(scene, "fill", rng, DETAIL).items[k].fill for _ in range(60) for k in range(5)}
    assert fills == {"solid", *FILLS}
    assert {len(spoil_scene(scene, "count", rng, DETAIL).items) for _ in range(20)} == {4, 6}
    with pytest.raises(ValueError, match="concept: got 'fill'"):
        spoil_scene(scene, "fill", rng)


def test_a_new_pipeline_has_one_token_for_each_word_and_the_default_one_none_more():
    new, old = (build_pipeline(StackConfig.tiny(text_length=16), scenes=scenes) for scenes in (DETAIL, SCENES))
    for tokenizer in (new.tokenizer, new.tokenizer_3):
        assert len(tokenizer.tokenize(LONGEST)) == 14 and len(tokenizer(LONGEST).input_ids) <= 16
        assert len(tokenizer.tokenize("six small checked green crosses on black")) == 7
    assert len(old.tokenizer.tokenize(LONGEST)) > 14
    assert len(new.tokenizer_3) - len(old.tokenizer_3) == len(FILLS) + len(("medium", "four", "five", "six"))


def test_slots_of_a_detailed_caption_name_fills_and_counts():
    assert _slot_classes(SCENES) == [4, *[5, 7, 3] * 3, 5, 4]
    classes = _slot_classes(DETAIL)
    assert classes == [7, *[5, 7, 4, 6] * 3, 5, 4]
    assert _slots(parse_caption(LONGEST), DETAIL) == [2, 1, 1, 3, 2, 2, 3, 1, 5, 0, 0, 0, 0, 1, 2]
    assert _slots(parse_caption("six small red circles on white"), DETAIL)[:5] == [6, 1, 1, 1, 1]
    assert _slots(None, DETAIL) == [0] * len(classes)
    for scene in random_images(100, np.random.default_rng(0), 64, DETAIL)[1]:
        assert all(slot < number for slot, number in zip(_slots(scene, DETAIL), classes, strict=True))


def test_pairs_of_detailed_scenes_have_pairs_of_the_concept_fill(tiny_pipeline, tmp_path):
    config = PairsConfig(
        groups=6, images=2, sampled_share=0, per_concept=1, scenes=DETAIL, emphasis={"fill": 2.0}, heldout_groups=2
    )
    write_pairs("concepts", tmp_path / "concepts", tiny_pipeline, config)
    names = [name for batch in LatentPairs(tmp_path / "concepts", batch_size=4).in_order() for name in batch.concepts]
    assert sorted(names) == sorted(DETAIL.concepts)
    folder = ensure_pairs("heldout", tmp_path / "heldout", tiny_pipeline, config)
    with pytest.raises(ValueError, match="scenes.max_count: got 5; expected 6"):
        five = SceneConfig(5, True, FILLS)
        ensure_pairs("heldout", folder, tiny_pipeline, PairsConfig(**{**vars(config), "scenes": five}))


def test_settings_of_scenes_are_checked():
    with pytest.raises(ValueError, match="scenes.max_count: got 7; expected at least 3 and at most 6"):
        SceneConfig(max_count=7)
    with pytest.raises(ValueError, match="did you mean 'dotted'"):
        SceneConfig(fills=("doted",))
    with pytest.raises(ValueError, match="scenes.fills: got dotted, dotted; expected each fill once"):
        SceneConfig(fills=("dotted", "dotted"))
    with pytest.raises(ValueError, match="pairs.emphasis: unknown concept 'fill'"):
        PairsConfig(emphasis={"fill": 1.0})
    with pytest.raises(ValueError, match="stack.text_length: got 14; expected at least 16"):
        BuildConfig(pairs=PairsConfig(scenes=DETAIL))
