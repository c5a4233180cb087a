"""ReFL's arithmetic by hand, and the update on a tiny policy: what carries gradient, what is drawn from where."""

import dataclasses

import pytest
import torch
from tiny_align import changed, gradient_of, move, train, with_reward, with_sampler
from torch import Tensor

from dinalrm_align.align import refl, refl_steps
from dinalrm_align.align.evaluation import paired_gain
from dinalrm_align.align.refl_config import ReflConfig, ReflRun
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import rollout, seeded_noise

SHAPE = (16, 8, 8)


@pytest.fixture
def method(refl_method) -> refl.Refl:
    return refl_method


def test_two_gradient_steps_by_hand():
    """velocity = w x, w = 2. From x = 1 at 0.5 to 0.3: x = 1 - 0.2 * 2 = 0.6; x0_hat = 0.6 - 0.3 * 1.2 = 0.24.

    x0_hat = (1 - 0.2 w)(1 - 0.3 w), so d x0_hat / dw = -0.2 (1 - 0.6) - 0.3 (1 - 0.4) = -0.26.
    The reference has w = 1, so the velocities differ by x: KL = (1 + 0.36) / 2 = 0.68. It sees x detached, so that the
    differences are w x - x with only the first x moving: 2 (1) (1) = 2 for the first step, and for the second
    2 (0.6) (x + w dx/dw) = 1.2 (0.6 - 0.4) = 0.24: d KL / dw = (2 + 0.24) / 2 = 1.12.
    """
    w = torch.tensor(2.0, requires_grad=True)
    x = torch.ones(1, 1, 1, 1)
    x0, kl = refl_steps.gradient_steps(lambda x, s: w * x, lambda x, s: 1.0 * x, x, [0.9, 0.5, 0.3, 0.0], 1, 2)
    assert x0.item() == pytest.approx(0.24)
    assert kl.item() == pytest.approx(0.68)
    assert torch.autograd.grad(x0.sum(), w, retain_graph=True)[0].item() == pytest.approx(-0.26)
    assert torch.autograd.grad(kl.sum(), w)[0].item() == pytest.approx(1.12)


def test_the_last_step_of_one_is_the_one_step_estimate():
    x = torch.full((2, 1, 1, 1), 3.0)
    x0, kl = refl_steps.gradient_steps(
        lambda x, s: torch.full_like(x, 2.0), lambda x, s: torch.full_like(x, 2.0), x, [1.0, 0.25, 0.0], 1, 1
    )
    assert x0.flatten().tolist() == [2.5, 2.5]
    assert kl.tolist() == [0.0, 0.0]


def test_reward_losses_by_hand():
    """target 2, scores 1 and 5: linear (1 - 3) / 2 = -1; relu (1 + 0) / 2 = 0.5."""
    score = torch.tensor([1.0, 5.0])
    assert refl_steps.reward_loss(score, "linear", 2.0).item() == -1.0
    assert refl_steps.reward_loss(score, "relu", 2.0).item() == 0.5
    with pytest.raises(ValueError, match="reward loss: got 'square'"):
        refl_steps.reward_loss(score, "square", 2.0)


def test_the_start_is_drawn_from_the_last_quarter():
    """40 steps, one with gradient, earliest 0.75: 30 ... 39, as in the paper's runs; four with gradient: 30 ... 36."""
    generator = torch.Generator().manual_seed(0)

    def drawn(num_steps: int, grad_steps: int, earliest: float) -> set[int]:
        starts = ReflConfig(grad_steps=grad_steps, earliest=earliest).starts(num_steps)
        return {refl_steps.draw_starts(starts, 1, generator)[0] for _ in range(300)}

    assert drawn(40, 1, 0.75) == set(range(30, 40))
    assert drawn(40, 4, 0.75) == set(range(30, 37))
    assert drawn(40, 2, 1.0) == {38}
    assert drawn(4, 4, 0.75) == {0}


def test_flow_matching_loss_vanishes_for_the_true_velocity():
    latents = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))

    def truth(x: Tensor, sigma: Tensor) -> Tensor:  # noise - x0, from x = (1 - sigma) x0 + sigma noise
        return (x - latents) / sigma.view(-1, 1, 1, 1)

    assert refl_steps.flow_matching_loss(truth, latents, [seeded_generator(1)] * 4).item() == pytest.approx(0, abs=1e-8)
    expected = refl_steps.flow_matching_loss(lambda x, s: torch.zeros_like(x), latents, [seeded_generator(1)] * 4)
    assert expected.item() == pytest.approx(1 + latents.square().mean().item(), rel=0.5)


def test_paired_gain_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1 / sqrt(3)."""
    for prompts in (list("abc"), list("aaa")):  # over prompts, and over the samples of the only prompt
        gain, error = paired_gain([0.0, 5.0, 2.0], [1.0, 7.0, 5.0], prompts)
        assert (gain, error) == (2.0, pytest.approx(3**-0.5))


def test_samples_of_a_prompt_count_once_in_the_standard_error():
    """Means of the two prompts: 1 and 4. Standard deviation 3 / sqrt(2), standard error 1.5, however many samples."""
    for copies in (1, 5):
        gain, error = paired_gain([0.0] * 4 * copies, [0.5, 4.0, 1.5, 4.0] * copies, [*"abab"] * copies)
        assert (gain, error) == (2.5, pytest.approx(1.5))


def test_a_batch_is_a_pure_function_of_seed_and_micro_step(method):
    first, again, other = method.batch_at(7), method.batch_at(7), method.batch_at(8)
    assert torch.equal(first.latents, again.latents) and first.start == again.start
    assert first.conditions.prompts == again.conditions.prompts
    assert not first.latents.requires_grad and first.latents.shape == (2, *SHAPE)
    assert not torch.equal(first.latents, other.latents)
    second_rank = with_sampler(method, rank=1, num_processes=2).batch_at(7)
    assert not torch.equal(first.latents, second_rank.latents)


def test_only_the_lora_gets_a_gradient_and_the_reward_rises(method):
    rewards = [row["reward"] for row in train(method, 30, lr=0.02)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5


def test_more_gradient_steps_give_another_gradient(method):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in method.sampler.policy.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    batch = dataclasses.replace(method.batch_at(0), start=1)
    gradients = []
    for count in (1, 2):
        loss, _ = changed(method, grad_steps=count).step(batch)
        gradients.append(torch.autograd.grad(loss, list(method.sampler.policy.parameters.values()))[0])
    assert (gradients[0] - gradients[1]).norm() > 0.01 * gradients[0].norm() > 0


def test_kl_is_zero_at_the_reference_and_pulls_back_from_elsewhere(method):
    anchored = changed(method, kl_weight=10.0)
    _, metrics = anchored.step(anchored.batch_at(0))
    assert metrics["kl"].item() == 0.0
    with torch.no_grad():
        for p in method.sampler.policy.parameters.values():
            p.add_(0.1)
    loss, metrics = anchored.step(anchored.batch_at(0))
    plain, _ = method.step(method.batch_at(0))
    assert metrics["kl"].item() > 0
    torch.testing.assert_close(loss - plain, 10 * metrics["kl"])


@pytest.mark.parametrize("variant", ["refl", "drtune", "draft_lv", "direct_align"])
def test_a_weight_per_standard_deviation_suits_a_reward_of_any_scale(method, variant):
    """Ten times the score: the policy is trained alike with kl_unit reward_std, and otherwise with raw."""

    def trained(factor: float, unit: str) -> Tensor:
        policy = method.sampler.policy
        start = {name: p.detach().clone() for name, p in policy.parameters.items()}
        scaled = with_reward(method, lambda latents: 100 * factor * latents.square().mean(dim=(1, 2, 3)))
        scaled = changed(scaled, kl_weight=50.0, kl_unit=unit, variant=variant, draft_lv_earliest=0.5)
        scaled.measure()
        train(scaled, 4, lr=0.01)
        moved = torch.cat([(p.detach() - start[name]).flatten() for name, p in policy.parameters.items()])
        with torch.no_grad():
            for name, p in policy.parameters.items():
                p.copy_(start[name])
        return moved

    distances = {}
    for unit in ("reward_std", "raw"):
        once, tenfold = trained(1.0, unit), trained(10.0, unit)
        distances[unit] = (once - tenfold).norm() / once.norm()
    assert distances["reward_std"] < 0.005 and distances["raw"] > 0.02


def test_the_measured_unit_is_state_and_a_weight_without_it_is_refused(method):
    scaled = changed(method, kl_weight=2.0, kl_unit="reward_std")
    with pytest.raises(ValueError, match="call Refl.measure first"):
        _ = scaled.kl_weight
    scaled.measure(resumed=True)
    assert scaled.reward_std is None
    scaled.load_state_tensors({"reward_std": torch.tensor(0.3, dtype=torch.float64)})
    assert scaled.kl_weight == 0.6 and scaled.state_tensors()["reward_std"].item() == 0.3 and scaled.is_common()
    for broken in ({}, {"reward_std": torch.tensor(0.0)}, {"reward_std": torch.tensor(float("nan"))}):
        with pytest.raises(ValueError, match="expected a positive number reward_std"):
            scaled.load_state_tensors(broken)
    assert scaled.reward_std == 0.3
    raw = changed(method, kl_weight=2.0)
    raw.measure()
    assert (raw.kl_weight, raw.reward_std) == (2.0, None)


def test_the_reward_gets_its_level_and_seeded_noise(method):
    seen: list[tuple[object, float]] = []

    def reward(latents: Tensor, prompts, sigma, noise) -> Tensor:
        assert noise.shape == latents.shape and not torch.equal(noise[0], noise[1])
        seen.append((sigma, noise.mean().item()))
        return latents.mean(dim=(1, 2, 3))

    fixed = with_reward(changed(method, reward_sigma=[0.2, 0.5]), reward)
    ranged = with_reward(changed(method, reward_sigma_range=(0.1, 0.6)), reward)
    default = with_reward(method, reward)
    for variant in (fixed, ranged, ranged, default):
        variant.step(variant.batch_at(0))
    ranged.step(ranged.batch_at(1))
    assert seen[0][0] == [0.2, 0.5] and seen[3][0] is None
    level = seen[1][0]
    assert level.shape == (2,) and 0.1 <= level.min() < level.max() <= 0.6
    assert torch.equal(level, seen[2][0]) and seen[1][1] == seen[2][1]
    assert not torch.equal(level, seen[4][0]) and seen[1][1] != seen[4][1]


def test_guidance_in_the_gradient_step_is_a_choice(method):
    batch = method.batch_at(0)
    plain, _ = method.step(batch)
    guided, _ = changed(method, guided_gradient=True).step(batch)
    assert plain.item() != guided.item()


def test_pretraining_loss_on_the_base_models_own_samples(method):
    trained = changed(method, pretrain_weight=0.5)
    with pytest.raises(ValueError, match="refl.pretrain_weight: got 0.5"):
        trained.step(trained.batch_at(0))
    latents, conditions = trained.reference_samples(3)
    assert latents.shape == (3, *SHAPE) and conditions.prompts == method.sampler.conditions.prompts[:3]
    assert torch.equal(latents, trained.reference_samples(3)[0])
    trained = dataclasses.replace(trained, pretrain_data=(latents, conditions))
    loss, metrics = trained.step(trained.batch_at(0))
    plain, _ = method.step(method.batch_at(0))
    torch.testing.assert_close(loss - plain, 0.5 * metrics["pretrain"])


def test_phases_of_an_update_are_measured(method):
    method.sampler.meter.start_step(profile=True)
    method.step(method.batch_at(0))
    kinds, phases = ("memory_mib", "gflops"), ("rollout", "policy", "reward")
    assert set(method.sampler.meter.finish_step()) == {f"{kind}/{phase}" for kind in kinds for phase in phases}


def linear(w: Tensor):
    """A velocity with a known derivative: v = w x."""
    return lambda x, sigma: w * x


def test_drtune_by_hand():
    """v = w x, w = 2, from x = 1 at sigma 1 over 0.6 to 0.2, where x0 is estimated; the first and the last are trained.

    x_1 = 1 - 0.4 (2) = 0.2; x_2 = 0.2 - 0.4 (2) 0.2 = 0.04; x0_hat = 0.04 - 0.2 (2) 0.04 = 0.024. With inputs detached
    d x0_hat / dw = -0.4 x - 0.2 x_2 = -0.4 - 0.008 = -0.408, where the whole chain would give
    d (1 - 0.4 w)^2 (1 - 0.2 w) / dw = -0.8 (0.2) 0.6 - 0.2 (0.04) = -0.104. The reference has w = 1, so that the KL is
    (1 + 0.04^2) / 2.
    """
    w = torch.tensor(2.0, requires_grad=True)
    seen: list[Tensor] = []

    def velocity(x: Tensor, sigma: float) -> Tensor:
        seen.append(x)
        return w * x

    x = torch.ones(1, 1, 1, 1)
    x0, kl = refl_steps.drtune_steps(
        velocity, linear(w), linear(torch.tensor(1.0)), x, [1.0, 0.6, 0.2, 0.0], 0, 2, (0, 2)
    )
    assert x0.item() == pytest.approx(0.024)
    assert kl.item() == pytest.approx((1 + 0.04**2) / 2)
    assert torch.autograd.grad(x0.sum(), w)[0].item() == pytest.approx(-0.408)
    assert [x.item() for x in seen] == pytest.approx([1.0, 0.04]) and not any(x.requires_grad for x in seen)


def test_drtune_trains_evenly_spaced_steps():
    """Three of the steps 0 ... 9: an interval of 3, the first at 0 ... 3."""
    generator = torch.Generator().manual_seed(0)
    drawn = {refl_steps.draw_trained(9, 3, generator) for _ in range(200)}
    assert drawn == {(first, first + 3, first + 6) for first in range(4)}
    assert refl_steps.draw_trained(2, 3, generator) == (0, 1, 2)


def test_renoised_steps_by_hand():
    """x0 = 1, noise = 3 at sigma 0.25: x = 1.5; v = 2 x = 3, x0_hat = 1.5 - 0.25 (3) = 0.75, d / dw = -0.25 (1.5).

    The samples carry no gradient, even where they were made with one. KL against w = 1: 1.5^2.
    """
    w = torch.tensor(2.0, requires_grad=True)
    sample, noise = (w / 2).view(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    x0, kl = refl_steps.renoised_steps(linear(w), linear(torch.tensor(1.0)), sample, noise, 0.25)
    assert (x0.item(), kl.item()) == (0.75, 2.25)
    assert torch.autograd.grad(x0.sum(), w)[0].item() == -0.375


def test_direct_align_by_hand():
    """x0 = 1, noise = 3 at sigma 0.75: x = 2.5; v = 2 x = 5, a step to 0.5: 2.5 - 0.25 (5) = 1.25.

    Less 0.5 (3), over 0.5: x0_hat = -0.5. d / dw = -(0.25 / 0.5) 2.5 = -1.25. With the true velocity, 2, it is 1.
    """
    w = torch.tensor(2.0, requires_grad=True)
    sample, noise = (w / 2).view(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
    x0, kl = refl_steps.direct_align_steps(linear(w), linear(torch.tensor(1.0)), sample, noise, 0.75, 0.5)
    assert (x0.item(), kl.item()) == (-0.5, 6.25)
    assert torch.autograd.grad(x0.sum(), w)[0].item() == -1.25
    truth = refl_steps.direct_align_steps(lambda x, s: noise - 1, linear(w), sample, noise, 1.0, 0.5)[0]
    assert truth.item() == 1.0


RELATIVES = [
    dict(variant="draft_lv", renoisings=3),
    dict(variant="drtune", grad_steps=2),
    dict(variant="direct_align", earliest=0.0, stride=2),
]


@pytest.mark.parametrize("values", RELATIVES, ids=lambda values: values["variant"])
def test_relatives_are_pure_and_raise_the_reward(method, values):
    variant = changed(method, kl_weight=1e-9, **values)
    first, again = variant.step(variant.batch_at(3)), variant.step(variant.batch_at(3))
    assert first[0].item() == again[0].item() and first[1]["kl"].item() == 0.0
    losses = [row["loss"] for row in train(variant, 30, lr=0.02, batches=10)]  # the same ten at the end as at first
    assert sum(losses[-10:]) < sum(losses[:10]) - 0.5


def test_relatives_score_every_noising_with_its_prompt(method):
    seen: list[tuple[int, list[str]]] = []

    def reward(latents: Tensor, *, prompts, sigma=None, noise=None) -> Tensor:
        seen.append((len(latents), list(prompts)))
        return latents.mean(dim=(1, 2, 3))

    for values in RELATIVES:
        variant = with_reward(changed(method, **values), reward)
        batch = variant.batch_at(0)
        variant.step(batch)
        prompts = list(batch.conditions.prompts)
        copies = {"draft_lv": 3, "drtune": 1, "direct_align": 2}[values["variant"]]
        assert seen[-1] == (2 * copies, prompts * copies)


def test_finished_samples_are_noised_anew(method):
    """draft_lv and direct_align begin with the whole rollout, drtune with the first step that it trains."""
    noise = changed(method, variant="draft_lv").batch_at(0)
    whole = method.sampler.velocity_for(noise.conditions)
    generators = [seeded_generator(method.sampler.seed, number, refl.SAMPLES) for number in range(2)]
    with torch.no_grad():
        samples = rollout(whole, seeded_noise(SHAPE, generators), method.sampler.sigmas)
    assert torch.equal(noise.latents, samples)
    assert torch.equal(changed(method, variant="direct_align").batch_at(0).latents, samples)
    tuned = changed(method, variant="drtune", earliest=1.0, grad_steps=2).batch_at(0)
    assert tuned.start == 3 and len(tuned.trained) == 2 and tuned.trained[1] - tuned.trained[0] == 2


def test_nearly_clean_levels_count_less(method):
    """The weight is sigma ** discount: at a level of 0.6 and discount 2 the loss is 0.36 of the undiscounted one."""
    plain = changed(method, variant="direct_align", discount=0.0)
    weighted = changed(method, variant="direct_align", discount=2.0)
    loss, metrics = plain.step(plain.batch_at(0))
    discounted, _ = weighted.step(weighted.batch_at(0))
    assert discounted.item() == pytest.approx(loss.item() * metrics["start_sigma"] ** 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variant": "draft"}, "did you mean 'draft_lv'"),
        ({"renoisings": 0}, "refl.renoisings: got 0"),
        ({"stride": 0}, "refl.stride: got 0"),
        ({"batch_size": 0}, "refl.batch_size: got 0"),
        ({"grad_steps": 5, "num_steps": 4}, "refl.grad_steps: got 5; expected at most num_steps, 4"),
        ({"earliest": 1.5}, "refl.earliest: got 1.5"),
        ({"reward_sigma": [0.4], "reward_sigma_range": (0.1, 0.2)}, "refl.reward_sigma_range: got both"),
        ({"reward_sigma_range": (0.6, 0.1)}, "low <= high"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ReflConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        dict(variant="refl", grad_steps=2),
        dict(variant="draft_lv", renoisings=2),
        dict(variant="drtune", grad_steps=2),
        dict(variant="direct_align", renoisings=2),
    ],
)
def test_without_a_kl_the_base_model_does_not_run(method, values, monkeypatch):
    """Its forward would be a fifth of an update. The loss is that of any kl_weight less the KL's part."""
    move(method.sampler.policy)
    ran = []
    forward = method.sampler.policy.transformer.forward
    monkeypatch.setattr(method.sampler.policy.transformer, "forward", lambda *a, **k: ran.append(1) or forward(*a, **k))
    counts, losses, gradients = [], [], []
    for weight in (0.0, 1e-9):
        variant = changed(method, kl_weight=weight, **values)
        batch = variant.batch_at(0)
        ran.clear()
        loss, metrics = variant.step(batch)
        counts.append(len(ran))
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, list(method.sampler.policy.parameters.values()))[1])
        assert ("kl" in metrics) == (weight > 0)
    trained = values.get("grad_steps", 1)
    assert counts[1] - counts[0] == trained
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_draft_lv_starts_from_the_last_step(method):
    """Whatever `earliest` is for the other variants; an earlier start has to be asked for."""
    last = method.sampler.num_steps - 1
    assert {changed(method, variant="draft_lv", earliest=0.0).batch_at(step).start for step in range(12)} == {last}
    early = changed(method, variant="draft_lv", draft_lv_earliest=0.0)
    assert len({early.batch_at(step).start for step in range(12)}) > 1
    assert len({changed(method, variant="direct_align", earliest=0.0).batch_at(step).start for step in range(12)}) > 1


def forwards_of(method, monkeypatch) -> list[int]:
    """The batch sizes of the transformer's forwards, as they happen."""
    sizes: list[int] = []
    transformer = method.sampler.policy.transformer
    forward = transformer.forward

    def counted(hidden_states: Tensor, **given: object):
        sizes.append(len(hidden_states))
        return forward(hidden_states=hidden_states, **given)

    monkeypatch.setattr(transformer, "forward", counted)
    return sizes


@pytest.mark.parametrize("values", [{}, *RELATIVES], ids=lambda values: values.get("variant", "refl"))
def test_micro_batches_sampled_together_are_those_sampled_alone(method, values, monkeypatch):
    """Four micro-batches of two, sampled three and one at a time: same draws, equal gradients, fewer forwards."""
    move(method.sampler.policy)
    alone = changed(method, accumulate=4, **values)
    together = changed(alone, sample_batch=7)
    sizes = forwards_of(method, monkeypatch)
    apart = [alone.batch_at(step) for step in range(4)]
    count, rows = len(sizes), sum(sizes)
    sizes.clear()
    for one, batch in zip(apart, [together.batch_at(step) for step in range(4)], strict=True):
        assert (one.start, one.trained, one.update) == (batch.start, batch.trained, batch.update)
        assert one.conditions.prompts == batch.conditions.prompts
        torch.testing.assert_close(one.latents, batch.latents, rtol=1e-4, atol=1e-5)
        assert [g.get_state().tolist() for g in one.generators] == [g.get_state().tolist() for g in batch.generators]
    assert sum(sizes) == rows  # no sample takes a step more
    assert len(sizes) < count or values.get("variant") == "drtune"  # whose rollouts are short here
    torch.testing.assert_close(gradient_of(alone, 0, 4), gradient_of(together, 0, 4), rtol=1e-3, atol=1e-6)
    assert torch.equal(dataclasses.replace(together).batch_at(2).latents, together.batch_at(2).latents)  # as resumed


def test_steps_of_a_rollout_share_samples_and_nothing_else(method, monkeypatch):
    """Two late steps of one trajectory: the later state is the earlier one, further; reward noise is drawn anew."""
    shared = changed(method, accumulate=4, earliest=0.0, steps_per_rollout=2)
    sizes = forwards_of(method, monkeypatch)
    batches = [shared.batch_at(step) for step in range(4)]
    longest = [max(batches[first].start, batches[first + 1].start) for first in (0, 2)]
    assert sizes == [2 * 2] * sum(longest)  # guided: two rows per sample
    for first, second in (batches[:2], batches[2:]):
        assert first.conditions.prompts == second.conditions.prompts and first.start != second.start
        low, high = sorted((first, second), key=lambda batch: batch.start)
        with torch.no_grad():
            velocity = method.sampler.velocity_for(low.conditions)
            onward = rollout(velocity, low.latents, method.sampler.sigmas[low.start : high.start + 1])
        torch.testing.assert_close(onward, high.latents)
        assert not torch.equal(seeded_noise(SHAPE, first.generators), seeded_noise(SHAPE, second.generators))
    assert batches[0].conditions.prompts != batches[2].conditions.prompts
    assert torch.equal(shared.batch_at(3).latents, batches[3].latents)  # a function of the micro-step alone


def test_every_step_of_a_rollout_is_drawn_as_often():
    """Three of four starts, none twice, each in three quarters of the draws: the mean gradient is that of one start."""
    generator = torch.Generator().manual_seed(0)
    drawn = [refl_steps.draw_starts(range(5, 9), 3, generator) for _ in range(800)]
    assert all(len(set(starts)) == 3 for starts in drawn)
    for start in range(5, 9):
        assert sum(start in starts for starts in drawn) / 800 == pytest.approx(0.75, abs=0.05)
        assert sum(starts[0] == start for starts in drawn) / 800 == pytest.approx(0.25, abs=0.05)


def test_rollouts_that_cannot_be_shared_are_refused(method):
    with pytest.raises(ValueError, match="refl.steps_per_rollout: got 2; expected a divisor of loop.accumulate, 3"):
        changed(method, accumulate=3, steps_per_rollout=2)
    with pytest.raises(ValueError, match="steps_per_rollout: got 4; expected at most 2, .* steps 2 ... 3"):
        changed(method, accumulate=4, steps_per_rollout=4)
    with pytest.raises(ValueError, match="steps_per_rollout: got 2; expected a divisor of loop.accumulate, 1"):
        ReflRun(refl=ReflConfig(steps_per_rollout=2))
