"""Scores of a fixed set of pairs: what is stored, what is worked out of it, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from tiny_reward import encoded, make_inputs, shake, tiny_reward_config

from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.eval.scores import (
    NoiseLevels,
    PairScores,
    level_by_level,
    load_scores,
    save_scores,
    score_pairs,
    shared_features,
)
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.reward.training import score_batch

TERMS = {"noise_seed": 0}


def batch(groups=2, *, shift=0.0, concept=None, prompts=None):
    """Lists of three images, two pairs each: (0, 1) and (2, 1)."""
    images = 3 * groups
    start = 3 * torch.arange(groups)
    return PairBatch(
        latents=shift + torch.arange(images * 4, dtype=torch.float32).view(images, 1, 2, 2),
        conditions=Conditions(
            [prompts[number // 3] if prompts else "" for number in range(images)],
            torch.zeros(images, 1, 1),
            torch.zeros(images, 1),
        ),
        chosen=torch.stack([start, start + 2], dim=1).flatten(),
        rejected=torch.stack([start + 1, start + 1], dim=1).flatten(),
        label=torch.ones(2 * groups),
        group=torch.arange(images) // 3,
        concepts=None if concept is None else (concept,) * (2 * groups),
    )


def mean_of_noise(batch, sigmas, noise):
    """A score that shows what it was given: sum over levels of sigma times the mean of that level's noise."""
    assert noise.shape == (len(sigmas), *batch.latents.shape)
    return sum(sigma * drawn.mean(dim=(1, 2, 3)) for sigma, drawn in zip(sigmas, noise, strict=True))


def test_noise_level_names():
    assert NoiseLevels.at(0.4).name == "0.4"
    assert NoiseLevels.at(0.2, 0.5).name == "0.2+0.5"
    assert NoiseLevels.at(0.4, draw=3).name == "0.4@3"
    assert NoiseLevels((0.4, 0.4), (0, 1)).name == "0.4+0.4@0,1"


def test_pairs_of_several_batches_are_numbered_on():
    score = level_by_level(lambda b, s, n: b.latents.mean(dim=(1, 2, 3)))
    scores = score_pairs(score, [batch(2), batch(1)], [NoiseLevels.at(0.4)], seed=0, title="")
    assert scores.chosen.tolist() == [0, 2, 3, 5, 6, 8]
    assert scores.rejected.tolist() == [1, 1, 4, 4, 7, 7]
    assert scores.caption.tolist() == [0, 0, 1, 1, 2, 2]
    assert scores.correct("0.4").tolist() == [0, 1, 0, 1, 0, 1]  # scores rise with the image's number


def test_groups_of_one_caption_are_one_caption():
    batches = [batch(2, prompts=("a", "b")), batch(1, prompts=("a",))]
    scores = score_pairs(level_by_level(mean_of_noise), batches, [NoiseLevels.at(0.4)], seed=0, title="")
    assert scores.caption.tolist() == [0, 0, 1, 1, 0, 0] and scores.size == "6 pairs of 2 captions"


def test_noise_is_shared_by_a_group_and_by_levels_and_draws_differ():
    levels = [NoiseLevels.at(1.0), NoiseLevels.at(0.5), NoiseLevels.at(1.0, draw=1), NoiseLevels((1.0, 1.0), (0, 1))]
    scores = score_pairs(level_by_level(mean_of_noise), [batch(2), batch(2)], levels, seed=3, title="")
    first, half, second, both = (scores.score(level.name) for level in levels)
    assert np.array_equal(first[:3], np.repeat(first[0], 3)) and first[0] != first[3]
    assert not np.allclose(first[:6], first[6:])  # another batch, another draw
    np.testing.assert_allclose(half, first / 2)
    assert not np.allclose(first, second)
    np.testing.assert_allclose(both, first + second, rtol=1e-6)
    again = score_pairs(level_by_level(mean_of_noise), [batch(2), batch(2)], levels[2:3], seed=3, title="")
    assert np.array_equal(again.score("1@1"), second)  # whatever else is asked for


@pytest.mark.parametrize("ensemble", ["tokens", "average"])
def test_levels_that_share_a_sigma_and_a_draw_share_a_pass_through_the_backbone(tiny_pipeline, ensemble):
    """0.2 and 0.7 are in the ensemble too; sigma 0.2 with a second draw and the joint draws need one more pass."""
    model = build_reward_model(tiny_reward_config(ensemble=ensemble), tiny_pipeline.transformer, seed=1)
    shake(model, seed=2)
    inputs = make_inputs(tiny_pipeline.transformer, batch=4)
    text = encoded(inputs["prompt_embeds"], inputs["pooled_prompt_embeds"])
    chosen, rejected = torch.tensor([0, 3]), torch.tensor([1, 2])
    pairs = PairBatch(inputs["latents"], text, chosen, rejected, torch.ones(2), torch.tensor([0, 0, 1, 1]))
    joint = NoiseLevels((0.2, 0.2), (0, 1))
    levels = [
        NoiseLevels.at(0.2),
        NoiseLevels.at(0.2, 0.5, 0.7),
        NoiseLevels.at(0.7),
        NoiseLevels.at(0.2, draw=1),
        joint,
    ]
    options, passes = dict(seed=0, title=""), []
    model.trunk.register_forward_pre_hook(lambda _, arguments: passes.append(len(arguments[0])))
    shared = score_pairs(shared_features(model), [pairs], levels, **options)
    assert passes == [4] * 4  # sigma 0.2, 0.5 and 0.7 with the first draw, and 0.2 with the second
    alone = score_pairs(level_by_level(lambda *given: score_batch(model, *given)), [pairs], levels, **options)
    for level in levels:
        np.testing.assert_allclose(shared.score(level.name), alone.score(level.name), rtol=1e-4, atol=1e-5)
    assert len({float(shared.score(level.name)[0]) for level in levels}) == 5


def test_correct_counts_ties_of_scores_as_errors_and_leaves_out_ties_of_raters():
    scores = PairScores(
        {"a": np.array([1.0, 1.0, 2.0], np.float32), "b": np.array([3.0, 0.0, 0.0], np.float32)},
        chosen=np.array([0, 2, 0, 2]),
        rejected=np.array([1, 1, 2, 1]),
        label=np.array([1.0, 1.0, 0.0, 0.5], np.float32),
        caption=np.zeros(4, int),
    )
    np.testing.assert_array_equal(scores.correct("a"), [0, 1, 1, np.nan])
    np.testing.assert_allclose(scores.gap("a", "b"), [1.5, 0.5, 1.0, 0.5])  # means: 2, 0.5, 1
    with pytest.raises(ValueError, match="^noise level: got 'c'; expected one of a, b"):
        scores.correct("c")


def test_scores_come_back_from_the_file(tmp_path):
    scores = score_pairs(
        level_by_level(mean_of_noise),
        [batch(2, concept="size")],
        [NoiseLevels.at(0.4), NoiseLevels.at(0.2, 0.5)],
        seed=0,
        title="",
    )
    save_scores(scores, tmp_path / "a.safetensors", TERMS)
    back = load_scores(tmp_path / "a.safetensors", TERMS)
    assert back.concept == scores.concept == ("size",) * 4
    assert not back.same_pairs(dataclasses.replace(scores, prompts=("other",)))  # the indices alone do not tell
    assert back.same_pairs(scores) and [*back.scores] == ["0.4", "0.2+0.5"]
    assert all(np.array_equal(back.scores[name], scores.scores[name]) for name in scores.scores)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_file_on_other_terms_or_damaged_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_scores(
        score_pairs(level_by_level(mean_of_noise), [batch()], [NoiseLevels.at(0.4)], seed=0, title=""), path, TERMS
    )
    with pytest.raises(ValueError, match="a.safetensors: got scores taken with .*: 0.*; expected .*: 1"):
        load_scores(path, {"noise_seed": 1})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is damaged"):
        load_scores(path, TERMS)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="scores at 0.4 are NaN or infinite"):
        score_pairs(
            level_by_level(lambda b, s, n: torch.full((len(b.latents),), torch.nan)),
            [batch()],
            [NoiseLevels.at(0.4)],
            seed=0,
            title="x",
        )
