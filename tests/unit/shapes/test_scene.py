import numpy as np
import pytest

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.models.specs import MODELS
from dinalrm_align.shapes.scene import all_scenes, draw_scenes, is_held_out, parse_caption


@pytest.mark.parametrize("kind", ["one", "pair", "count"])
def test_every_caption_parses_back_to_its_scene(kind):
    for scene in all_scenes()[kind][::23]:
        assert parse_caption(scene.caption) == scene


def test_text_outside_the_grammar_is_refused_with_an_example():
    with pytest.raises(ValueError, match="got 'a photo of a cat'; expected for instance 'a small red circle"):
        parse_caption("a photo of a cat")


def test_a_tenth_of_the_pairs_is_held_out_and_never_drawn_for_training():
    share = np.mean([is_held_out(scene) for scene in all_scenes()["pair"]])
    assert 0.08 < share < 0.12
    rng = np.random.default_rng(0)
    assert not any(map(is_held_out, draw_scenes(500, rng)))
    assert all(map(is_held_out, draw_scenes(500, rng, held_out=True)))


def test_the_same_seed_draws_the_same_scenes():
    first, second = (draw_scenes(20, np.random.default_rng(3)) for _ in range(2))
    assert first == second


def test_shipped_captions_are_on_their_side_of_the_split_and_in_one_file_each():
    folder = MODELS["shapes"].train_prompts.parent
    train, heldout, test = (read_prompts(folder / f"{name}.txt") for name in ("train", "heldout", "test"))
    assert len({*train, *heldout, *test}) == len(train) + len(heldout) + len(test) == 512 + 64 + 192
    assert not any(is_held_out(parse_caption(caption)) for caption in train)
    assert all(is_held_out(parse_caption(caption)) for caption in (*heldout, *test))
