import itertools
from collections import Counter

import numpy as np
import pytest

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.models.specs import MODELS
from dinalrm_align.shapes.config import FILLS, SIZES
from dinalrm_align.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    KIND_SHARES,
    MAX_COUNT,
    MOST,
    RELATIONS,
    SHAPES,
    SOLID_SHARE,
    Item,
    Scene,
    caption_words,
    draw_scenes,
    is_held_out,
    parse_caption,
)

LOOKS = [Item(*look) for look in itertools.product(SHAPES, COLOURS, SIZES, ("solid", *FILLS))]


@pytest.fixture(scope="module")
def drawn():
    """Training scenes and held-out ones."""
    rng = np.random.default_rng(0)
    return draw_scenes(2000, rng), draw_scenes(200, rng, held_out=True)


def kind_of(scene):
    return "pair" if scene.relation else "one" if len(scene.items) == 1 else "count"


@pytest.mark.parametrize(
    ("caption", "scene"),
    [
        ("a small red circle on white", Scene((Item("circle", "red", "small"),), "white")),
        (
            "a large striped red circle left of a medium outlined blue cross on gray",
            Scene(
                (Item("circle", "red", "large", "striped"), Item("cross", "blue", "medium", "outlined")),
                "gray",
                "left of",
            ),
        ),
        (
            "six small dotted green crosses on black",
            Scene((Item("cross", "green", "small", "dotted"),) * 6, "black"),
        ),
    ],
)
def test_a_scene_and_its_caption(caption, scene):
    assert scene.caption == caption and parse_caption(caption) == scene == parse_caption(f" {caption.upper()}\n")


def test_every_caption_parses_back_to_its_scene():
    scenes = [Scene((look,), background) for look in LOOKS for background in BACKGROUNDS]
    scenes += [Scene((look,) * number, "gray") for look in LOOKS for number in COUNTS.values()]
    others = itertools.cycle(LOOKS[7:])
    scenes += [Scene((look, next(others)), "black", relation) for look in LOOKS for relation in RELATIONS]
    for scene in scenes:
        assert parse_caption(scene.caption) == scene
    assert {word for scene in scenes for word in scene.caption.split()} == {*caption_words()}


@pytest.mark.parametrize(
    "text",
    [
        "a photo of a cat",
        "",
        "a red circle on white",
        "a small solid red circle on white",
        "a small red striped circle on white",
        "a small striped dotted red circle on white",
        "a small red circles on white",
        "three small green cross on black",
        "seven small red circles on white",
        "two small red circles left of a large blue square on gray",
        "a small red circle on white and more",
    ],
)
def test_text_outside_the_grammar_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=f"got '{text}'; expected for instance 'a small red circle"):
        parse_caption(text)


def test_drawn_captions_parse_back_and_keep_to_the_split(drawn):
    train, held_out = drawn
    assert all(parse_caption(scene.caption) == scene for scene in train + held_out)
    assert not any(map(is_held_out, train)) and all(map(is_held_out, held_out))
    assert {kind_of(scene) for scene in held_out} == {*KIND_SHARES}


def test_a_tenth_of_all_scenes_is_held_out():
    rng = np.random.default_rng(1)
    rows = rng.integers(len(LOOKS), size=(4000, 2))
    pairs = [Scene((LOOKS[i], LOOKS[j]), "white", "above") for i, j in rows]
    assert 0.08 < np.mean([is_held_out(scene) for scene in pairs]) < 0.12
    singles = [Scene((look,), background) for look in LOOKS for background in BACKGROUNDS]
    assert 0.07 < np.mean([is_held_out(scene) for scene in singles]) < 0.13


def test_objects_fit_the_image_and_those_of_a_relation_differ(drawn):
    for scene in [*drawn[0], *drawn[1]]:
        first, *others = scene.items
        if scene.relation:
            (second,) = others
            assert (first.shape, first.colour) != (second.shape, second.colour)
        else:
            assert {*others} <= {first} and len(scene.items) <= MOST[first.size]


def test_kinds_fills_and_all_attributes_have_their_shares(drawn):
    scenes = drawn[0]
    kinds = Counter(map(kind_of, scenes))
    assert {kind: number / len(scenes) for kind, number in kinds.items()} == pytest.approx(KIND_SHARES, abs=0.04)
    counted = [scene for scene in scenes if kind_of(scene) == "count"]
    others = [item for scene in scenes if kind_of(scene) != "count" for item in scene.items]
    fills = Counter(item.fill for item in others)
    shares = {"solid": SOLID_SHARE, **dict.fromkeys(FILLS, (1 - SOLID_SHARE) / len(FILLS))}
    assert {fill: number / len(others) for fill, number in fills.items()} == pytest.approx(shares, abs=0.04)
    for drawn_values, names in (
        ([item.shape for item in others], SHAPES),
        ([item.colour for item in others], COLOURS),
        ([item.size for item in others], SIZES),
        ([scene.background for scene in scenes], BACKGROUNDS),
        ([scene.relation for scene in scenes if scene.relation], RELATIONS),
        ([len(scene.items) for scene in counted], range(2, MAX_COUNT + 1)),
    ):
        found = {name: number / len(drawn_values) for name, number in Counter(drawn_values).items()}
        assert found == pytest.approx(dict.fromkeys(names, 1 / len(names)), abs=0.05)


def test_the_same_seed_draws_the_same_scenes():
    first, second = (draw_scenes(20, np.random.default_rng(3)) for _ in range(2))
    assert first == second != draw_scenes(20, np.random.default_rng(4))


def test_shipped_captions_are_on_their_side_of_the_split_and_in_one_file_each():
    folder = MODELS["shapes"].train_prompts.parent
    train, heldout, test = (read_prompts(folder / f"{name}.txt") for name in ("train", "heldout", "test"))
    assert len({*train, *heldout, *test}) == len(train) + len(heldout) + len(test) == 512 + 128 + 192
    assert not any(is_held_out(parse_caption(caption)) for caption in train)
    assert all(is_held_out(parse_caption(caption)) for caption in (*heldout, *test))


def test_shipped_captions_have_all_words():
    folder = MODELS["shapes"].train_prompts.parent
    for name in ("train", "test"):
        words = {word for caption in read_prompts(folder / f"{name}.txt") for word in caption.split()}
        assert words == {*caption_words()}
