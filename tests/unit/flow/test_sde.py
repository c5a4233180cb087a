"""The stochastic steps against Flow-GRPO's golden values, by hand, and at the ends of the schedule."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from dinalrm_align.flow.sampling import named_sigmas, ode_step
from dinalrm_align.flow.sde import SAMPLERS, transition


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[2] / "fixtures" / "flow_grpo_step.safetensors")


@pytest.fixture(scope="module")
def scheduler():
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)


def number(value: float) -> torch.Tensor:
    return torch.full((1, 1, 1, 1), float(value))


@pytest.mark.parametrize("index", range(10))
def test_flow_sde_is_flow_grpos_at_every_step(golden, index):
    part = {
        name: golden[f"step{index}_{name}"]
        for name in ("velocity", "sample", "prev_sample", "mean", "std_dev_t", "log_prob")
    }
    level = golden["noise_level"].item()
    step = transition("flow_sde", part["sample"], part["velocity"], golden["sigmas"].tolist(), index, level)
    torch.testing.assert_close(step.mean, part["mean"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.scale.float().expand(3), part["std_dev_t"], rtol=1e-5, atol=0)
    torch.testing.assert_close(step.log_prob(part["prev_sample"]), part["log_prob"], rtol=1e-5, atol=1e-5)


def test_steps_of_a_mixed_batch_are_those_of_each(golden):
    index = torch.tensor([4, 0, 9])
    part = [golden[f"step{i}_sample"][row] for row, i in enumerate(index.tolist())]
    velocity = [golden[f"step{i}_velocity"][row] for row, i in enumerate(index.tolist())]
    following = torch.stack([golden[f"step{i}_prev_sample"][row] for row, i in enumerate(index.tolist())])
    for sampler in SAMPLERS:
        mixed = transition(
            sampler, torch.stack(part), torch.stack(velocity), golden["sigmas"].tolist(), index, noise_level=0.7
        )
        for row, i in enumerate(index.tolist()):
            alone = transition(sampler, part[row][None], velocity[row][None], golden["sigmas"].tolist(), i, 0.7)
            torch.testing.assert_close(mixed.mean[row], alone.mean[0], rtol=1e-6, atol=1e-6)
            assert mixed.std[row] == alone.std[0] and mixed.delta[row] == alone.delta[0]
            torch.testing.assert_close(
                mixed.log_prob(following)[row], alone.log_prob(following[row : row + 1])[0], rtol=1e-5, atol=1e-6
            )


def test_schedules_are_those_of_the_public_code(scheduler):
    """The tables of ten steps at shift 3, and the standard deviations that flow_sde injects at noise level 0.7."""
    diffusers = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    linear = [1, 0.9643, 0.9231, 0.875, 0.8182, 0.75, 0.6667, 0.5625, 0.4286, 0.25, 0]
    assert named_sigmas("diffusers", scheduler, 10) == pytest.approx(diffusers, abs=5e-5)
    assert named_sigmas("linear", scheduler, 10) == pytest.approx(linear, abs=5e-5)
    injected = {"diffusers": [0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063]}
    for name, sigmas in (("diffusers", diffusers), ("linear", linear)):
        sigmas = named_sigmas(name, scheduler, 10)
        stds = [transition("flow_sde", number(0), number(0), sigmas, i, 0.7).std.item() for i in range(10)]
        assert stds[0] == pytest.approx(0.7)
        assert stds == pytest.approx(injected.get(name, stds), rel=5e-3)
    assert stds[-1] == pytest.approx(0.202, abs=5e-4)
    with pytest.raises(ValueError, match="unknown schedule 'lineal'; did you mean 'linear'.* known: diffusers, linear"):
        named_sigmas("lineal", scheduler, 10)
    with pytest.raises(ValueError, match="at least 1"):
        named_sigmas("linear", scheduler, 0)


def test_flow_sde_by_hand():
    """x = 1, v = 2, sigma 0.5 -> 0.25, a = 0.5: s^2 = 0.25 (0.5 / 0.5) = 0.25, Delta = -0.25, x1 = 1 + 0.5 (2) = 2.

    mean = 1 - 0.5 + 0.25 (-0.25) (2) / (2 0.5) = 0.375; std = 0.5 sqrt(0.25) = 0.25.
    x' = 0.625 is one std away: log p = -1/2 - log 0.25 - log(2 pi) / 2 = -0.5 + 1.386294 - 0.918939 = -0.032644.
    """
    step = transition("flow_sde", number(1), number(2), [1, 0.5, 0.25, 0], 1, 0.5)
    assert step.mean.item() == pytest.approx(0.375)
    assert (step.std.item(), step.scale.item(), step.delta.item()) == pytest.approx((0.25, 0.5, -0.25))
    assert step.draw(number(1)).item() == pytest.approx(0.625)
    assert step.log_prob(number(0.625)).item() == pytest.approx(-0.032644, abs=1e-6)


def test_flow_cps_by_hand():
    """x = 1, v = 2, sigma 0.5 -> 0.25: x0 = 0, x1 = 2. a = 1/3: sin 30 deg = 1/2, so std = 0.25 / 2 = 0.125.

    mean = 0.75 (0) + sqrt(0.25^2 - 0.125^2) (2) = 0.216506 (2) = 0.433013. x' = 0.533013: log p = -0.1^2 = -0.01.
    """
    step = transition("flow_cps", number(1), number(2), [1, 0.5, 0.25, 0], 1, 1 / 3)
    assert step.mean.item() == pytest.approx(0.433013, abs=1e-6)
    assert step.std.item() == step.scale.item() == pytest.approx(0.125)
    assert step.log_prob(number(0.533013)).item() == pytest.approx(-0.01, abs=1e-6)


def test_log_probability_is_the_mean_over_all_but_the_batch():
    """Two pixels 0 and 2 stds away: mean of -0 and -2, less log std and log(2 pi) / 2, std = 0.25."""
    step = transition("flow_sde", torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 2.0), [1, 0.5, 0.25, 0], 1, 0.5)
    following = torch.tensor([0.375, 0.875]).view(1, 1, 1, 2)
    assert step.log_prob(following).item() == pytest.approx(-1 - math.log(0.25) - 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_noise_every_sampler_is_the_ode(sampler, scheduler):
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 2, 3, 3, 3, generator=generator)
    sigmas = named_sigmas("diffusers", scheduler, 5)
    for index in range(5):
        step = transition(sampler, x, v, sigmas, index, 0.0)
        torch.testing.assert_close(step.mean, ode_step(x, v, sigmas[index], sigmas[index + 1]), rtol=1e-5, atol=1e-6)
        assert step.std.item() == 0
    if sampler != "flow_cps":
        with pytest.raises(ValueError, match="^std: got 0"):
            step.log_prob(x)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("sigmas", [[1.0, 1 - 1e-6, 1e-6, 0.0], [1.0, 0.0], [1.0, 0.5, 1e-8, 1e-9, 0.0]])
@pytest.mark.parametrize("noise_level", [1e-4, 1.0])
def test_extreme_levels_stay_finite(sampler, sigmas, noise_level):
    generator = torch.Generator().manual_seed(0)
    x, v, noise = torch.randn(3, 2, 3, 4, 4, generator=generator)
    v.requires_grad_()
    for index in range(len(sigmas) - 1):
        step = transition(sampler, x, v, sigmas, index, noise_level)
        following = step.draw(noise)
        log_prob = step.log_prob(following.detach())
        (gradient,) = torch.autograd.grad(log_prob.sum(), v)
        assert step.mean.isfinite().all() and following.isfinite().all()
        assert log_prob.isfinite().all() and gradient.isfinite().all()


def test_half_precision_is_worked_in_float32():
    x, v = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    half = transition("flow_sde", x, v, [1, 0.5, 0], 1, 0.7)
    full = transition("flow_sde", x.float(), v.float(), [1, 0.5, 0], 1, 0.7)
    assert half.mean.dtype == torch.float32 and torch.equal(half.mean, full.mean)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sampler": "flow_sed"}, ValueError, "unknown sampler 'flow_sed'; did you mean 'flow_sde'"),
        ({"noise_level": -0.1}, ValueError, "noise_level: got -0.1; expected at least 0"),
        ({"sampler": "flow_cps", "noise_level": 1.1}, ValueError, "noise_level: got 1.1"),
        ({"noise_level": math.nan}, ValueError, "noise_level"),
        ({"index": 2}, ValueError, "index: got 2; expected at least 0 and at most 1"),
        ({"index": torch.tensor([0, 2])}, ValueError, "got steps 0 ... 2; the schedule has 0 ... 1"),
        ({"index": torch.tensor([0.0, 1.0])}, ValueError, "expected \\(2,\\) integers"),
        ({"index": torch.tensor([0])}, ValueError, "expected \\(2,\\) integers"),
        ({"sigmas": [0.5, 1.0, 0.0]}, ValueError, "expected falling levels"),
        ({"sigmas": [1.0]}, ValueError, "expected falling levels"),
        ({"sigmas": [1.5, 0.5, 0.0]}, ValueError, "got .1.5, 0.5, 0.0.; expected falling levels"),
        ({"sigmas": [1.0, 0.5, -0.5]}, ValueError, "got .1.0, 0.5, -0.5.; expected falling levels"),
        ({"velocity": torch.zeros(2, 1, 2, 3)}, ValueError, "velocity: got shape"),
        ({"latents": [1.0]}, TypeError, "latents: got list"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, error, message):
    given = {
        "sampler": "flow_sde", "latents": torch.zeros(2, 1, 2, 2), "velocity": torch.zeros(2, 1, 2, 2),
        "sigmas": [1.0, 0.5, 0.0], "index": 0, "noise_level": 0.7,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        transition(**(given | change))
