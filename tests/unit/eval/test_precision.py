"""Half precision: what must stay float32, extreme inputs, and the shipped table of errors against its tolerances."""

import dataclasses
import functools
import json
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_reward import raw_scores

from dinalrm_align import LatentReward
from dinalrm_align.data.latent_pairs import LatentPairsWriter
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.flow.noise import add_noise
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.losses import preference_loss

SCRIPT = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[3] / "examples" / "evidence" / "measure_precision.py"))
)
TOLERANCES, ScoresAndGradients = SCRIPT.TOLERANCES, SCRIPT.ScoresAndGradients
beyond_tolerance, compare, score = SCRIPT.beyond_tolerance, SCRIPT.compare, SCRIPT.score
SPEC = MODELS["shapes"]
SHIPPED = Path(__file__).parents[3] / "examples" / "results" / "precision.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMAGES = 8


@functools.cache
def shipped_reward(dtype):
    return LatentReward.from_pretrained(SPEC.reward, dtype=dtype)


@functools.cache
def sample():
    return SCRIPT.heldout_images(SPEC, IMAGES, seed=1)


@functools.cache
def exact(level):
    return score(shipped_reward("float32"), sample(), level)


# -------------------------------------------------------------------------------------------------- the table of errors


@pytest.mark.parametrize(("dtype", "way", "level"), [
    ("bfloat16", "cast", (0.0,)), ("bfloat16", "cast", (1e-6,)), ("bfloat16", "cast", (0.7,)),
    ("bfloat16", "cast", (1.0,)), ("bfloat16", "cast", (0.2, 0.5, 0.7)), ("bfloat16", "autocast", (0.4,)),
    ("float16", "cast", (0.0,)), ("float16", "autocast", (0.4,)),
], ids=str)  # fmt: skip
def test_half_precision_has_not_drifted(dtype, way, level):
    if way == "cast":
        found = score(shipped_reward(dtype), sample(), level)
    else:
        found = score(shipped_reward("float32"), sample(), level, autocast=DTYPES[dtype])
    agreement = compare(found, exact(level))
    one_pair = 2 / (IMAGES * (IMAGES - 1))  # may be a near tie
    assert agreement.rank_agreement >= 1 - one_pair - 1e-6
    assert beyond_tolerance(dataclasses.replace(agreement, rank_agreement=1.0), dtype) == []
    assert agreement.score_max > 1e-4, "this was float32"
    assert math.isnan(agreement.gradient_cosine) == (level == (1.0,))


def test_the_shipped_table_is_within_its_tolerances_and_complete():
    numbers = json.loads(SHIPPED.read_text())
    assert numbers["tolerances"] == {dtype: vars(allowed) for dtype, allowed in TOLERANCES.items()}
    assert numbers["latents"] == 128
    for row in numbers["rows"]:
        assert beyond_tolerance(SCRIPT.agreement_of(row), row["dtype"]) == [], row
        assert (row["gradient_error"] is None) == (row["sigma"] == [1.0])
    rows = {(row["dtype"], row["way"], tuple(row["sigma"])) for row in numbers["rows"]}
    assert rows == {(d, w, s) for d in SCRIPT.DTYPES for w in ("autocast", "cast") for s in SCRIPT.LEVELS}


def test_the_shipped_markdown_says_what_the_numbers_say():
    numbers = json.loads(SHIPPED.read_text())
    assert SHIPPED.with_suffix(".md").read_text() == SCRIPT.markdown(numbers, numbers["rows"])


def test_agreement_by_hand():
    """Scores 0, 1, 2 have deviation 1. Errors 0, 0.5, 0.6. Of three pairs the last is turned round.

    Gradients (1, 0), (0, 2), (1, 0) become (1, 0), (0, 1), (0, 1): cosines 1, 1, 0; errors 0, 1 / 2, sqrt 2.
    """
    reference = ScoresAndGradients(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]))
    found = ScoresAndGradients(torch.tensor([0.0, 1.5, 1.4]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]))
    agreement = compare(found, reference)
    assert agreement.score_mean == pytest.approx(1.1 / 3)
    assert agreement.score_max == pytest.approx(0.6)
    assert agreement.rank_agreement == pytest.approx(2 / 3)
    assert agreement.gradient_cosine == pytest.approx(0)
    assert agreement.gradient_error == pytest.approx(math.sqrt(2))
    assert len(beyond_tolerance(agreement, "bfloat16")) == 5
    assert "score_max 0.6, at most" in beyond_tolerance(agreement, "bfloat16")[1]


def test_a_gradient_out_of_nothing_is_beyond_tolerance_and_none_at_all_is_not():
    scores, none = torch.tensor([0.0, 1.0]), torch.zeros(2, 2)
    absent = compare(ScoresAndGradients(scores, none), ScoresAndGradients(scores, none))
    assert math.isnan(absent.gradient_error) and beyond_tolerance(absent, "float16") == []
    invented = compare(
        ScoresAndGradients(scores, torch.tensor([[0.0, 0.0], [1.0, 0.0]])), ScoresAndGradients(scores, none)
    )
    assert invented.gradient_error == math.inf and len(beyond_tolerance(invented, "float16")) == 2


def test_what_cannot_be_compared_is_refused():
    good = ScoresAndGradients(torch.tensor([0.0, 1.0]), torch.ones(2, 2))
    with pytest.raises(ValueError, match="gradients: 1 of 4 values are not finite"):
        compare(ScoresAndGradients(good.scores, torch.tensor([[1.0, math.nan], [1.0, 1.0]])), good)
    with pytest.raises(ValueError, match="all reference scores are equal"):
        compare(good, ScoresAndGradients(torch.ones(2), good.gradients))


# --------------------------------------------------------------------------------------------------- the script


def test_the_script_writes_table_and_numbers(tiny_world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SCRIPT.measure.__globals__, "LEVELS", [(0.4,)])
    monkeypatch.setitem(SCRIPT.measure.__globals__, "DTYPES", ("bfloat16",))
    SCRIPT.main(str(tmp_path / "out"), 3, str(tiny_world), None)
    numbers = json.loads((tmp_path / "out" / "precision.json").read_text())
    assert [(row["way"], row["sigma"]) for row in numbers["rows"]] == [("autocast", [0.4]), ("cast", [0.4])]
    assert (tmp_path / "out" / "precision.md").read_text() == SCRIPT.markdown(numbers, numbers["rows"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["precision.json", "precision.md"]
    assert "| bfloat16 | cast | 0.4 |" in capsys.readouterr().out


def test_images_of_latent_pairs(tmp_path):
    inputs = {"prompt_embeds": torch.ones(5, 8), "pooled_prompt_embeds": torch.ones(4)}
    with LatentPairsWriter(tmp_path / "pairs", PairManifest(1.0, 0.0, 16)) as writer:
        for number in range(3):
            writer.add(f"prompt {number}", torch.full((2, 4, 8, 8), float(number)).half(), **inputs)
    found = SCRIPT.images_of_pairs(str(tmp_path / "pairs"), 5, seed=0)
    assert found.latents[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2] and found.latents.dtype == torch.float32
    assert found.noise.shape == (5, 4, 8, 8) and found.prompt_embeds.shape == (5, 5, 8)
    with pytest.raises(ValueError, match=r"got 6 images of sizes \[\(4, 8, 8\)\]; expected 7 of one size"):
        SCRIPT.images_of_pairs(str(tmp_path / "pairs"), 7, seed=0)


# ------------------------------------------------------------------------------------------------ what stays float32


@pytest.fixture(scope="module")
def tiny_rewards(tiny_reward_dir):
    return {name: LatentReward.from_pretrained(tiny_reward_dir, dtype=name) for name in DTYPES}


def half_precision(test):
    """Every way to run in half precision: the backbone's dtype, and the autocast around it (None: no autocast)."""
    ways = [("bfloat16", None), ("float16", None), ("float32", torch.bfloat16), ("float32", torch.float16)]
    return pytest.mark.parametrize(("dtype", "autocast"), ways, ids=str)(test)


def raw_under(reward, inputs, autocast, **options):
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        return raw_scores(reward, **inputs, **options)


@half_precision
def test_the_transformer_gets_the_exact_timestep(tiny_rewards, tiny_inputs, dtype, autocast):
    """sigma 0.85714 is timestep 857.14, which bfloat16 would round to 856 and float16 to 857."""
    reward, seen = tiny_rewards[dtype], []
    hook = reward.model.trunk.time_text_embed.time_proj.register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    raw_under(reward, tiny_inputs, autocast, sigma=0.85714)
    hook.remove()
    assert seen[0].dtype == torch.float32
    assert seen[0].tolist() == pytest.approx([857.14, 857.14], abs=1e-4)


@half_precision
@pytest.mark.parametrize("given", DTYPES)
def test_noise_is_mixed_in_float32_whatever_the_latents_are(tiny_rewards, tiny_inputs, dtype, autocast, given):
    reward, seen = tiny_rewards[dtype], []
    latents, noise = (tiny_inputs[name].to(DTYPES[given]) for name in ("latents", "noise"))
    hook = reward.model.trunk.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    raw_under(reward, {**tiny_inputs, "latents": latents, "noise": noise}, autocast, sigma=0.01)
    hook.remove()
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], 0.99 * latents.float() + 0.01 * noise.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = add_noise(latents, noise, 0.01)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, seen[0])


@half_precision
def test_the_last_layer_keeps_float32s_steps(tiny_rewards, tiny_inputs, dtype, autocast):
    """A score around 1000 moves by less than 4, bfloat16's step there, and by less than 0.5, float16's."""
    reward = tiny_rewards[dtype]
    plain = raw_under(reward, tiny_inputs, autocast).detach()
    bias = reward.model.head.head.bias
    bias.data += 1000
    try:
        moved = raw_under(reward, tiny_inputs, autocast).detach()
    finally:
        bias.data -= 1000
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, plain + 1000, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("likelihood", ["thurstone", "thurstone_fixed", "bradley_terry", "bradley_terry_margin"])
@pytest.mark.parametrize("objective", ["fidelity", "nll"])
def test_the_likelihood_of_half_precision_scores_is_that_of_the_same_scores_in_float32(dtype, likelihood, objective):
    config = LossConfig(likelihood=likelihood, objective=objective)
    chosen, rejected = (
        torch.tensor([8.5, 0.3, -1.0]).to(DTYPES[dtype]),
        torch.tensor([8.25, 0.1, 0.7]).to(DTYPES[dtype]),
    )
    sigma = torch.tensor([0.05, 0.4, 0.9])
    expected = preference_loss(chosen.float(), rejected.float(), sigma, 0.8, config=config)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=DTYPES[dtype], enabled=enabled):
            found = preference_loss(chosen, rejected, sigma, 0.8, config=config)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


# ---------------------------------------------------------------------------------------------------- extreme inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("snap", [False, True], ids=["exact", "snapped"])
@pytest.mark.parametrize("sigma", [0.0, 1e-6, 1 - 1e-6, 1.0, (0.0, 1e-6, 1.0)], ids=str)
def test_scores_and_gradients_are_finite_at_extreme_levels(tiny_rewards, tiny_inputs, dtype, snap, sigma, monkeypatch):
    reward = tiny_rewards[dtype]
    monkeypatch.setattr(reward.config, "snap_sigma", snap)
    latents = tiny_inputs["latents"].requires_grad_()
    scores = reward(**tiny_inputs, sigma=sigma)
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    assert torch.isfinite(scores).all() and torch.isfinite(gradient).all()
    assert bool(gradient.any()) == (sigma != 1.0 and not (snap and sigma == 1 - 1e-6))  # which snaps to 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("objective", ["fidelity", "nll"])
@pytest.mark.parametrize("gap", [50.0, -50.0])
def test_the_likelihood_is_finite_at_sigma_0_and_wide_gaps(dtype, objective, gap):
    chosen = torch.tensor([gap], dtype=DTYPES[dtype], requires_grad=True)
    loss = preference_loss(chosen, torch.zeros_like(chosen), torch.zeros(1), config=LossConfig(objective=objective))
    loss.backward()
    assert torch.isfinite(loss).all() and torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore:latents look unscaled")
def test_huge_latents_have_finite_scores_where_the_dtype_reaches_that_far(dtype):
    assert torch.isfinite(shipped_reward(dtype)(1e4 * sample().latents[:2], ["a red circle"] * 2)).all()


@pytest.mark.filterwarnings("ignore:latents look unscaled")
@pytest.mark.parametrize(("dtype", "size"), [("float16", 1.8e4), ("float32", 1e30)])
def test_latents_that_overflow_the_backbone_are_refused_and_not_scored(dtype, size):
    with pytest.raises(ValueError, match=rf"scores: 2 of 2 are NaN or infinite.*backbone in torch.{dtype}"):
        shipped_reward(dtype)(size * sample().latents[:2], ["a red circle"] * 2)


def test_tolerances_are_of_every_dtype_that_is_measured():
    assert set(TOLERANCES) == set(SCRIPT.DTYPES)
    assert all(math.isfinite(value) for allowed in TOLERANCES.values() for value in dataclasses.astuple(allowed))
