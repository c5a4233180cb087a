"""Likelihoods and objectives: by hand, against the released code's numbers, and at the edges of float32."""

import math

import pytest
import torch

from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.losses import (
    preference_log_probability,
    preference_loss,
    preference_probability,
    thurstone_variance,
)

RELEASED = {
    "loss_thurstone": LossConfig(preset="released"),
    "loss_thurstone-constant": LossConfig(likelihood="thurstone_fixed", preset="released"),
    "loss_bt": LossConfig(likelihood="bradley_terry", objective="nll"),
    "loss_bt-margin": LossConfig(likelihood="bradley_terry_margin", objective="nll"),
}
EVERY = [
    LossConfig(likelihood=likelihood, objective=objective, preset=preset)
    for likelihood in ("thurstone", "thurstone_fixed", "bradley_terry", "bradley_terry_margin")
    for objective in ("fidelity", "nll")
    for preset in ("paper", "released")
]


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, requires_grad=True)


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_loss_is_the_released_codes(golden, name):
    losses = preference_loss(
        golden["train_score_chosen"].squeeze(1),
        golden["train_score_rejected"].squeeze(1),
        golden["train_sigma"],
        config=RELEASED[name],
    )
    torch.testing.assert_close(losses.mean(), golden[name].squeeze(), atol=1e-6, rtol=0)


def test_calibrated_variance_by_hand():
    """k = 2, sigma_u = 0.1: at sigma 0.5, 2 * 0.25 + 0.01 = 0.51; released, 2 * 0.25 + 0.05 = 0.55."""
    sigma = torch.tensor([0.0, 0.5])
    torch.testing.assert_close(thurstone_variance(sigma, LossConfig()), torch.tensor([0.01, 0.51]))
    torch.testing.assert_close(thurstone_variance(sigma, LossConfig(preset="released")), torch.tensor([0.05, 0.55]))
    fixed = LossConfig(likelihood="thurstone_fixed")
    torch.testing.assert_close(thurstone_variance(sigma, fixed), torch.tensor([0.5, 0.5]))


def test_fidelity_by_hand():
    """sigma 0, delta = sqrt(2) * 0.1 so that z = 1: p = Phi(1) = 0.841345.

    Hard label: 1 - sqrt(0.841345) = 0.082750. Label 0: 1 - sqrt(0.158655) = 0.601685.
    Label 0.7: 0.7 * 0.841345 + 0.3 * 0.158655 = 0.636538, 1 - sqrt(0.636538) = 0.202167.
    """
    chosen = torch.full((3,), math.sqrt(2) * 0.1)
    sigma = torch.zeros(3)
    losses = preference_loss(chosen, torch.zeros(3), sigma, torch.tensor([1.0, 0.0, 0.7]), config=LossConfig())
    torch.testing.assert_close(losses, torch.tensor([0.082750, 0.601685, 0.202167]), atol=2e-6, rtol=0)


def test_nll_by_hand():
    """Bradley-Terry at delta = 2: log(1 + e^-2) = 0.126928; with margin 1, log(1 + e^-1) = 0.313262.

    Label 0.25 without margin: 0.25 * 0.126928 + 0.75 * (0.126928 + 2) = 1.626928.
    """
    chosen, rejected, sigma = torch.tensor([2.0]), torch.zeros(1), torch.zeros(1)
    plain = LossConfig(likelihood="bradley_terry", objective="nll")
    margin = LossConfig(likelihood="bradley_terry_margin", objective="nll")
    assert preference_loss(chosen, rejected, sigma, config=plain).item() == pytest.approx(0.126928, abs=1e-6)
    assert preference_loss(chosen, rejected, sigma, 0.25, config=plain).item() == pytest.approx(1.626928, abs=1e-6)
    assert preference_loss(chosen, rejected, sigma, config=margin).item() == pytest.approx(0.313262, abs=1e-6)


@pytest.mark.parametrize("likelihood", ["thurstone", "thurstone_fixed", "bradley_terry", "bradley_terry_margin"])
def test_the_objective_by_default_is_the_likelihoods_own(likelihood):
    """-log sigmoid with Bradley-Terry, fidelity with Thurstone."""
    objective = "nll" if likelihood.startswith("bradley_terry") else "fidelity"
    chosen, rejected, sigma = torch.tensor([2.0]), torch.zeros(1), torch.zeros(1)
    by_default, named = (
        preference_loss(chosen, rejected, sigma, config=LossConfig(likelihood=likelihood, **given))
        for given in ({}, {"objective": objective})
    )
    assert torch.equal(by_default, named)


def test_a_noisier_level_is_a_less_sure_rater():
    p = preference_probability(torch.full((3,), 0.5), torch.tensor([0.0, 0.4, 0.9]), LossConfig())
    assert p[0] > p[1] > p[2] > 0.5


@pytest.mark.parametrize("config", EVERY, ids=lambda c: f"{c.likelihood}-{c.objective}-{c.preset}")
@pytest.mark.parametrize("delta", [50.0, -50.0, 3e5, -3e5, 0.0])
@pytest.mark.parametrize("label", [1.0, 0.0, 0.3])
def test_value_and_gradient_stay_finite_at_large_gaps(config, delta, label):
    chosen, rejected = scores(delta), scores(0.0)
    loss = preference_loss(chosen, rejected, torch.zeros(1), label, config=config)
    loss.backward()
    assert math.isfinite(loss.item())
    assert math.isfinite(chosen.grad.item()) and math.isfinite(rejected.grad.item())
    assert loss.item() >= -1e-6


def test_nll_still_pulls_where_the_cdf_underflows():
    """Phi(-50 / 0.1414) = 0 in float32, but -log Phi has the gradient z / scale there: 353.6 / 0.1414 = 2500."""
    chosen = scores(-50.0)
    preference_loss(chosen, torch.zeros(1), torch.zeros(1), config=LossConfig(objective="nll")).backward()
    assert chosen.grad.item() == pytest.approx(-2500, rel=1e-5)


@pytest.mark.parametrize("config", EVERY, ids=lambda c: f"{c.likelihood}-{c.objective}-{c.preset}")
def test_gradient_is_the_finite_difference_of_the_value(config):
    sigma, step = torch.tensor([0.3]), 1e-2
    chosen = scores(0.4)
    preference_loss(chosen, torch.zeros(1), sigma, 0.8, config=config).backward()
    ends = [preference_loss(torch.tensor([0.4 + s]), torch.zeros(1), sigma, 0.8, config=config) for s in (step, -step)]
    assert chosen.grad.item() == pytest.approx((ends[0] - ends[1]).item() / (2 * step), abs=2e-3)


def test_swapping_the_pair_is_swapping_the_label():
    chosen, rejected, sigma = torch.tensor([0.7]), torch.tensor([0.1]), torch.tensor([0.2])
    for config in EVERY:
        forward = preference_loss(chosen, rejected, sigma, 0.8, config=config)
        backward = preference_loss(rejected, chosen, sigma, 0.2, config=config)
        torch.testing.assert_close(forward, backward)


def test_probabilities_of_both_orders_add_up_to_one():
    delta, sigma = torch.linspace(-3, 3, 7), torch.full((7,), 0.3)
    for likelihood in ("thurstone", "thurstone_fixed", "bradley_terry"):
        config = LossConfig(likelihood=likelihood)
        both = preference_probability(delta, sigma, config) + preference_probability(-delta, sigma, config)
        torch.testing.assert_close(both, torch.ones(7))
        assert (preference_log_probability(delta, sigma, config) <= 0).all()


def test_bad_input_is_refused_with_a_reason():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"chosen \(1, 1\)"):
        preference_loss(one[None], one, one, config=LossConfig())
    with pytest.raises(ValueError, match=r"^label: got \[1.5"):
        preference_loss(one, one, one, 1.5, config=LossConfig())
    with pytest.raises(ValueError, match="loss.likelihood: got 'probit'; known: thurstone, "):
        preference_loss(one, one, one, config=LossConfig(likelihood="probit"))
    with pytest.raises(ValueError, match="loss.objective: got 'hinge'; known: fidelity, nll"):
        preference_loss(one, one, one, config=LossConfig(objective="hinge"))
    with pytest.raises(ValueError, match="^loss.sigma_u: got 0.0"):
        LossConfig(sigma_u=0.0)
    with pytest.raises(ValueError, match="loss.preset: got 'mine'; known: paper, released"):
        LossConfig(preset="mine")
