"""The flow-matching convention: closed forms, agreement with diffusers' scheduler table, densities."""

import math

import pytest
import torch

from dinalrm_align.flow import noise


def test_add_noise_and_denoised_are_inverse_given_the_true_velocity():
    """x0 = 2, noise = -1, sigma = 0.25: x = 0.75*2 - 0.25 = 1.25, velocity = -3, x - sigma v = 1.25 + 0.75 = 2."""
    latents = torch.full((1, 1, 2, 2), 2.0)
    eps = torch.full_like(latents, -1.0)
    x_sigma = noise.add_noise(latents, eps, torch.tensor([0.25]))
    assert torch.equal(x_sigma, torch.full_like(latents, 1.25))
    assert torch.equal(noise.denoised(x_sigma, eps - latents, 0.25), latents)


def test_noising_is_float32_and_per_sample():
    latents = torch.ones(2, 1, 1, 1, dtype=torch.bfloat16)
    x_sigma = noise.add_noise(latents, torch.zeros_like(latents), torch.tensor([0.0, 0.3]))
    assert x_sigma.dtype == torch.float32
    assert x_sigma.flatten().tolist() == pytest.approx([1.0, 0.7])


def test_noising_refuses_other_shapes():
    latents = torch.zeros(3, 1, 2, 2)
    with pytest.raises(ValueError, match="2 values for 3 latents"):
        noise.add_noise(latents, latents, torch.zeros(2))
    with pytest.raises(ValueError, match="shape of the latents"):
        noise.add_noise(latents, latents[:1], 0.1)


def test_sigma_table_is_the_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
        table = noise.scheduler_sigmas(1000, shift)
        assert torch.equal(table, scheduler.sigmas)
        assert torch.equal(noise.timestep_of(table), scheduler.timesteps)


def test_snapping_gives_the_levels_of_the_released_code(golden):
    table = noise.scheduler_sigmas()
    for wanted in (0.1, 0.4, 0.7):
        sigma = noise.snap_sigma(torch.full((3,), wanted), table)
        assert torch.equal(sigma, golden[f"sigma_u{wanted}"])
        assert torch.equal(noise.timestep_of(sigma), golden[f"timestep_u{wanted}"])
    assert noise.snap_sigma(1.0, table).item() == 1.0


@pytest.mark.parametrize(
    ("density", "params", "mean", "std"),
    [
        ("uniform", {}, 0.5, 12**-0.5),
        ("logit_normal", {"mean": 0.0, "std": 1.0}, 0.5, 0.2083),  # numerically, std of sigmoid(N(0, 1))
        ("mode", {"scale": 0.0}, 0.5, 12**-0.5),  # scale 0 is uniform
        ("beta", {"a": 2.0, "b": 6.0}, 0.25, math.sqrt(12 / (64 * 9))),  # ab / ((a + b)^2 (a + b + 1))
        ("constant", {"value": 0.4}, 0.4, 0.0),
    ],
)
def test_density_moments(density, params, mean, std):
    sigma = noise.sample_sigma(density, 20_000, generator=torch.Generator().manual_seed(0), **params)
    assert sigma.dtype == torch.float32
    assert sigma.mean().item() == pytest.approx(mean, abs=0.006)
    assert sigma.std().item() == pytest.approx(std, abs=0.006)


def test_mode_density_favours_the_middle_for_a_positive_scale():
    sigma = noise.sample_sigma("mode", 20_000, generator=torch.Generator().manual_seed(0), scale=1.29)
    assert ((sigma > 0.4) & (sigma < 0.6)).float().mean() > 0.28  # 0.2 for the uniform density


@pytest.mark.parametrize("density", sorted(noise.DENSITIES))
def test_a_density_repeats_with_its_generator(density):
    draws = [noise.sample_sigma(density, 5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


def test_a_callable_is_a_density_and_is_checked():
    generator = torch.Generator().manual_seed(0)
    ramp = noise.sample_sigma(lambda n, *, generator, top: torch.linspace(0, top, n), 3, generator=generator, top=0.5)
    assert ramp.tolist() == [0.0, 0.25, 0.5]
    with pytest.raises(ValueError, match=r"expected \(3,\) in \[0, 1\]"):
        noise.sample_sigma(lambda n, *, generator: torch.full((n,), 2.0), 3, generator=generator)
    with pytest.raises(ValueError, match="unknown sigma density 'gauss'; known: uniform"):
        noise.sample_sigma("gauss", 3, generator=generator)


def test_a_seeded_generator_depends_on_every_key_and_their_order():
    draws = [
        torch.rand(1, generator=noise.seeded_generator(*keys)).item() for keys in ((0, 1), (1, 0), (0, 1, 0), (0, 1))
    ]
    assert draws[0] == draws[3]
    assert len(set(draws)) == 3
