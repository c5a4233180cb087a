"""Diffusion-DPO's arithmetic by hand, and the updates on a tiny policy: which pairs, which noise, which reference."""

import dataclasses
import math

import pytest
import torch
from forwards import step_and_count
from tiny_align import (
    SHAPE,
    brightness,
    gradient_of,
    make_conditions,
    make_sampler,
    reward_of,
    train,
    with_reward,
    with_sampler,
)
from torch import Tensor

from dinalrm_align.align import dpo
from dinalrm_align.align.candidates import ranked_pairs
from dinalrm_align.align.dpo_config import DpoConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.data.latent_pairs import LatentPairs, LatentPairsWriter
from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.flow.noise import add_noise, seeded_generator
from dinalrm_align.flow.sampling import rollout, seeded_noise
from dinalrm_align.models.text import Conditions


def online(**values: object) -> dpo.OnlineDpo:
    """A new policy on the tiny stack, and online DPO of it."""
    settings = dict(batch_size=2, group_size=3, beta=50.0, draws=2)
    sampler = make_sampler(num_steps=2, guidance_scale=2.0)
    return dpo.OnlineDpo(sampler, reward_of(brightness), DpoConfig(**(settings | values)))


@pytest.fixture
def method() -> dpo.OnlineDpo:
    return online()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Twelve pairs in which the chosen image is the brighter one."""
    folder = tmp_path_factory.mktemp("dpo") / "pairs"
    conditions = make_conditions(3)
    generator = torch.Generator().manual_seed(0)
    with LatentPairsWriter(folder, PairManifest(1.0, 0.0, 5)) as writer:
        for group in range(12):
            latents = torch.tensor([0.5, -0.5]).view(2, 1, 1, 1) + torch.randn(2, *SHAPE, generator=generator)
            row = conditions.take([group % 3])
            writer.add(
                f"{row.prompts[0]}, {group}", latents, prompt_embeds=row.prompt_embeds[0],
                pooled_prompt_embeds=row.pooled_prompt_embeds[0],
            )  # fmt: skip
    return folder


def offline(folder, **values: object) -> dpo.OfflineDpo:
    like = online(mode="offline", **values)
    return dpo.OfflineDpo(like.sampler, LatentPairs(folder, batch_size=4, seed=0), like.config)


def shake(policy: Policy, seed: int = 5, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


def test_the_loss_by_hand():
    """beta 4. e_w 0.5 against the reference's 0.8: -0.3; e_l 0.9 against 1.0: -0.1; margin -2 (-0.3 + 0.1) = 0.4.

    Loss log(1 + exp(-0.4)) = 0.513015. Its gradient in e_w is (beta / 2) sigmoid(-0.4) = 2 (0.401312) = 0.802625, in
    e_l the negative of that. With the two exchanged the margin is -0.4 and the loss 0.913015.
    """
    w, l = torch.tensor([0.5], requires_grad=True), torch.tensor([0.9], requires_grad=True)  # noqa: E741
    w_reference, l_reference = torch.tensor([0.8]), torch.tensor([1.0])
    loss, margin = dpo.diffusion_dpo_loss(w, l, w_reference, l_reference, beta=4.0)
    assert margin.item() == pytest.approx(0.4)
    assert loss.item() == pytest.approx(0.513015, abs=1e-6)
    gradients = torch.autograd.grad(loss.sum(), [w, l])
    assert [g.item() for g in gradients] == pytest.approx([0.802625, -0.802625], abs=1e-6)
    exchanged, _ = dpo.diffusion_dpo_loss(l, w, l_reference, w_reference, beta=4.0)
    assert exchanged.item() == pytest.approx(0.913015, abs=1e-6)


def test_a_soft_label_by_hand():
    """Margin 0.4, label 0.75: 0.75 (0.513015) + 0.25 (0.913015) = 0.613015."""
    errors = [torch.tensor([value]) for value in (0.5, 0.9, 0.8, 1.0)]
    loss, _ = dpo.diffusion_dpo_loss(*errors, beta=4.0, label=torch.tensor([0.75]))
    assert loss.item() == pytest.approx(0.613015, abs=1e-6)


def test_errors_of_differing_shapes_are_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="expected four of one shape"):
        dpo.diffusion_dpo_loss(one, two, one, one, beta=1.0)


def test_the_velocity_error_by_hand():
    """x0 = 1, noise = 3: the velocity is 2. The prediction is 2.5 and 2 in two places: error 0.25 / 2."""
    latents, noise = torch.ones(1, 1, 1, 2), torch.full((1, 1, 1, 2), 3.0)
    assert dpo.velocity_error(torch.tensor([[[[2.5, 2.0]]]]), latents, noise).item() == 0.125


def test_a_step_by_hand():
    """One draw at sigma 0.5, beta 8. Chosen x0 = 2, rejected x0 = 0, noise 1: inputs 1.5 and 0.5, velocities -1 and 1.

    The policy's velocity is -x / 2, -0.75 and -0.25: errors 0.0625 and 1.5625. The reference's is -x, -1.5 and -0.5:
    errors 0.25 and 2.25. Margin -4 [(0.0625 - 0.25) - (1.5625 - 2.25)] = -4 (-0.1875 + 0.6875) = -2: the rejected one
    is improved more. Gains 0.1875 and 0.6875; loss log(1 + e^2) = 2.126928; KL (0.75^2 + 0.25^2) / 2 = 0.3125.
    """
    batch = one_pair(chosen=2.0, rejected=0.0, noise=1.0, sigma=0.5)
    loss, metrics = dpo.dpo_step(lambda x, s: -x / 2, lambda x, s: -x, batch, beta=8.0)
    assert loss.item() == pytest.approx(2.126928, abs=1e-6)
    got = {name: float(value) for name, value in metrics.items()}
    assert got == pytest.approx(
        {"implicit_accuracy": 0.0, "margin": -2.0, "chosen_gain": 0.1875, "rejected_gain": 0.6875, "kl": 0.3125}
    )


def one_pair(*, chosen: float, rejected: float, noise: float, sigma: float) -> dpo.DpoBatch:
    latents = torch.tensor([chosen, rejected]).view(2, 1, 1, 1)
    pairs = PairBatch(
        latents, Conditions(["", ""], torch.zeros(2, 1, 1), torch.zeros(2, 1)), torch.tensor([0]), torch.tensor([1]),
        torch.ones(1), torch.zeros(2, dtype=torch.long),
    )  # fmt: skip
    return dpo.DpoBatch(pairs, torch.full((1, 2, 1, 1, 1), noise), torch.full((1, 2), sigma))


def test_policy_and_reference_are_one_at_the_start(method, pairs):
    for start in (method, offline(pairs)):
        loss, metrics = start.step(start.batch_at(0))
        assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
        assert metrics["margin"].item() == 0.0 and metrics["kl"].item() == 0.0
        assert metrics["implicit_accuracy"].item() == 0.5


def test_a_group_has_one_noise_and_one_level(method, pairs):
    for start in (method, offline(pairs, draws=3)):
        batch = start.batch_at(1)
        for group in range(batch.pairs.num_groups):
            members = batch.pairs.group == group
            for draws in (batch.noise[:, members], batch.sigma[:, members]):
                assert torch.equal(draws, draws[:, :1].expand_as(draws))
        assert batch.sigma[:, batch.pairs.group.argmin()].unique().numel() == start.config.draws
        assert batch.noise.shape == (start.config.draws, *batch.pairs.latents.shape)
        assert len(batch.sigma.unique()) == start.config.draws * batch.pairs.num_groups


def test_levels_follow_the_density(pairs):
    constant = offline(pairs, sigma=SigmaConfig(density="constant", value=0.25))
    assert torch.equal(constant.batch_at(0).sigma, torch.full((2, 8), 0.25))


def test_online_pairs_are_the_true_best_and_worst(method):
    """Every sample made again by hand, and scored by hand."""
    shake(method.sampler.policy)
    batch = method.batch_at(4)
    for row, prompt in enumerate(batch.pairs.group_prompts):
        index = method.sampler.conditions.prompts.index(prompt)
        generator = seeded_generator(method.sampler.seed, 4 * 2 + row, 3)
        conditions = method.sampler.conditions.take([index] * 3)
        with torch.no_grad():
            samples = rollout(
                method.sampler.velocity_for(conditions),
                seeded_noise(SHAPE, [generator] * 3),
                method.sampler.sigmas,
            )
        order = samples.mean(dim=(1, 2, 3)).argsort()
        chosen, rejected = (batch.pairs.latents[rows[row]] for rows in (batch.pairs.chosen, batch.pairs.rejected))
        torch.testing.assert_close(chosen, samples[order[-1]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rejected, samples[order[0]], atol=1e-5, rtol=1e-5)
        assert chosen.mean() > rejected.mean()
    assert batch.metrics["reward_best"] > batch.metrics["reward"] > batch.metrics["reward_worst"]


def test_a_reward_that_compares_groups_gets_whole_ones(method):
    reward = reward_of(brightness)
    reward.wants_groups = True
    dpo.OnlineDpo(method.sampler, reward, method.config)  # by default a whole micro-batch
    with pytest.raises(ValueError, match="dpo.sample_batch: got 4; expected a multiple of group_size 3"):
        dpo.OnlineDpo(method.sampler, reward, dataclasses.replace(method.config, sample_batch=4))


def test_samples_of_a_prompt_are_scored_with_one_noise(method):
    seen = []

    def reward(latents: Tensor, prompts, sigma, noise) -> Tensor:
        seen.append((list(prompts), sigma, noise))
        return latents.mean(dim=(1, 2, 3))

    parted = dataclasses.replace(
        method, reward=reward_of(reward), config=dataclasses.replace(method.config, reward_sigma=[0.3], sample_batch=4)
    )
    batch = parted.batch_at(0)
    assert [len(prompts) for prompts, _, _ in seen] == [4, 2] and all(sigma == [0.3] for _, sigma, _ in seen)
    prompts, noise = sum((prompts for prompts, _, _ in seen), []), torch.cat([noise for _, _, noise in seen])
    assert prompts == [prompt for prompt in batch.pairs.group_prompts for _ in range(3)]
    noise = noise.unflatten(0, (2, 3))
    assert torch.equal(noise, noise[:, :1].expand_as(noise)) and not torch.equal(noise[0], noise[1])
    whole = with_reward(method, reward).batch_at(0)
    torch.testing.assert_close(batch.pairs.latents, whole.pairs.latents, atol=1e-5, rtol=1e-5)


def test_ranked_pairs_by_hand():
    """Scores 3, 9, 1, 5: order 9, 5, 3, 1: pairs (9, 1) and (5, 3), the second of gap 2."""
    assert ranked_pairs([3.0, 9.0, 1.0, 5.0], 2, 0.0) == [(1, 2), (3, 0)]
    assert ranked_pairs([3.0, 9.0, 1.0, 5.0], 9, 0.0) == [(1, 2), (3, 0)]
    assert ranked_pairs([3.0, 9.0, 1.0, 5.0], 1, 0.0) == [(1, 2)]
    assert ranked_pairs([3.0, 9.0, 1.0, 5.0], 2, 2.5) == [(1, 2)]
    assert ranked_pairs([2.0, 2.0, 2.0], 1, 0.0) == []


def test_an_update_is_the_same_however_it_is_divided(method, pairs):
    """One micro-batch of four prompts against four of one: the same pairs, noise and levels, the same mean gradient."""
    shake(method.sampler.policy)
    for changes in (dict(batch_size=4), dict(batch_size=4, loss_guidance_scale=3.0)):
        whole = dataclasses.replace(method, config=dataclasses.replace(method.config, **changes))
        parts = dataclasses.replace(whole, config=dataclasses.replace(whole.config, batch_size=1))
        tensors = list(method.sampler.policy.parameters.values())
        expected = torch.autograd.grad(whole.step(whole.batch_at(1))[0], tensors)
        losses = [parts.step(parts.batch_at(micro_step))[0] for micro_step in range(4, 8)]
        got = torch.autograd.grad(torch.stack(losses).mean(), tensors)
        scale = max(float(g.abs().max()) for g in expected)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4 * scale, rtol=1e-3)


def test_draws_in_one_forward_pass_give_the_same_update(pairs, monkeypatch):
    """Passes of up to 26 images: of 4 images all 6 draws at once, of 8 images 3 draws, in place of one."""
    config = DpoConfig(draws=6, loss_batch=26)
    assert [config.draws_together(images) for images in (27, 14, 13, 8, 5, 2)] == [1, 1, 2, 3, 3, 6]
    found = []
    for loss_batch in (None, 26):
        for method in (online(draws=6, loss_batch=loss_batch), offline(pairs, draws=6, loss_batch=loss_batch)):
            shake(method.sampler.policy)
            gradient = gradient_of(method, 0, 1)
            passes, metrics = step_and_count(method, method.sampler.policy.transformer, monkeypatch)
            found.append((passes, gradient, {name: float(value) for name, value in metrics.items()}))
    assert [passes for passes, *_ in found] == [12, 12, 2, 4]  # half of them the reference's
    for (_, gradient, metrics), (_, gradient_together, metrics_together) in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(gradient_together, gradient, rtol=1e-3, atol=1e-6)
        assert metrics_together == pytest.approx(metrics, rel=1e-3, abs=1e-6)


def test_processes_share_the_prompts(method, pairs):
    other = online()
    first, second = (with_sampler(other, rank=rank, num_processes=2).batch_at(0) for rank in (0, 1))
    together = dataclasses.replace(other, config=dataclasses.replace(other.config, batch_size=4)).batch_at(0)
    assert (*first.pairs.group_prompts, *second.pairs.group_prompts) == tuple(together.pairs.group_prompts)
    torch.testing.assert_close(first.noise[:, :2], together.noise[:, :2])
    torch.testing.assert_close(second.noise[:, :2], together.noise[:, 2:4])


def test_only_the_lora_gets_a_gradient_and_what_is_chosen_becomes_likelier(pairs):
    method = offline(pairs, beta=20.0)
    last = train(method, 40, lr=0.02)[-5:]
    assert sum(row["loss"] for row in last) / 5 < 0.6
    assert sum(row["implicit_accuracy"] for row in last) / 5 > 0.8


def test_online_training_raises_the_reward():
    method = online(batch_size=4, group_size=4, beta=200.0)
    rewards = [row["reward"] for row in train(method, 25, lr=0.02)]
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.05


def test_the_refreshed_reference_is_the_policy_at_that_moment():
    method = with_sampler(online(refresh_every=2), accumulate=2)
    batch = method.batch_at(0)
    x, sigma = add_noise(batch.pairs.latents, batch.noise[0], batch.sigma[0]), batch.sigma[0]
    conditions = batch.pairs.conditions

    def velocities() -> tuple[Tensor, Tensor, Tensor]:
        velocity = method.sampler.velocity_for(conditions, 1.0)
        with torch.no_grad():
            return velocity(x, sigma), *(dpo.without_gradient(velocity, at)(x, sigma) for at in
                                         (method.reference, method.sampler.policy.reference))  # fmt: skip

    base = velocities()[0]
    shake(method.sampler.policy)
    for micro_step in (1, 2, 3):
        method.batch_at(micro_step)
        policy, reference, frozen = velocities()
        assert torch.equal(reference, base) and torch.equal(frozen, base) and not torch.equal(policy, base)
    method.batch_at(4)  # update 2 begins
    policy, reference, _ = velocities()
    assert torch.equal(reference, policy)
    _, metrics = method.step(method.batch_at(5))
    assert metrics["margin"].item() == 0.0
    moved = policy
    shake(method.sampler.policy, seed=6)
    policy, reference, frozen = velocities()
    assert torch.equal(reference, moved) and not torch.equal(policy, moved) and torch.equal(frozen, base)


def test_samples_can_be_the_references(method):
    shake(method.sampler.policy)
    before = online().batch_at(0).pairs.latents
    by_reference = dataclasses.replace(method, config=dataclasses.replace(method.config, sampler="reference"))
    assert torch.equal(by_reference.batch_at(0).pairs.latents, before)
    assert not torch.equal(method.batch_at(0).pairs.latents, before)


def test_state_holds_the_reference_and_nothing_without_one(method):
    assert method.state_tensors() == {}
    method.load_state_tensors({})
    refreshed = online(refresh_every=1)
    with pytest.raises(ValueError, match="dpo.refresh_every: got 0"):
        method.load_state_tensors(refreshed.state_tensors())
    with pytest.raises(ValueError, match="weights of another LoRA"):
        refreshed.load_state_tensors({"reference.absent": torch.zeros(1)})
    shake(refreshed.sampler.policy)
    refreshed.batch_at(1)
    state = refreshed.state_tensors()
    assert {name.removeprefix("reference.") for name in state} == refreshed.sampler.policy.parameters.keys()
    again = online(refresh_every=1)
    again.load_state_tensors(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_tensors().items())
    assert all(tensor is not state[name] for name, tensor in again.state_tensors().items())


def test_other_weights_are_put_in_place_exactly_and_taken_out_again(method):
    """Also when the block raises, and with a graph that was built before."""
    policy = method.sampler.policy
    batch = method.batch_at(0)
    velocity = method.sampler.velocity_for(batch.pairs.conditions, 1.0)
    x = batch.pairs.latents
    shake(policy)
    first, expected = policy.weights(), velocity(x, 0.4).detach()
    shake(policy, seed=6)
    second = policy.weights()
    tensors = list(policy.parameters.values())
    undisturbed = torch.autograd.grad(velocity(x, 0.4).square().sum(), tensors)
    loss = velocity(x, 0.4).square().sum()
    with pytest.raises(RuntimeError, match="on the way"), policy.with_weights(first):
        assert torch.equal(velocity(x, 0.4), expected) and not velocity(x, 0.4).requires_grad
        raise RuntimeError("on the way")
    assert all(torch.equal(p, second[name]) and p.requires_grad for name, p in policy.parameters.items())
    disturbed = torch.autograd.grad(loss, tensors)
    assert all(torch.equal(one, other) for one, other in zip(disturbed, undisturbed, strict=True))
    first.pop(next(iter(first)))
    with pytest.raises(ValueError, match="weights of another LoRA"), policy.with_weights(first):
        pass


def test_phases_of_an_update_are_measured(method, pairs):
    for start, phases in ((method, {"rollout", "reward", "policy"}), (offline(pairs), {"data", "policy"})):
        start.sampler.meter.start_step()
        start.step(start.batch_at(0))
        assert set(start.sampler.meter.finish_step()) == {f"seconds/{phase}" for phase in phases}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "dpo.batch_size: got 0"),
        ({"group_size": 1}, "dpo.group_size: got 1"),
        ({"draws": 0}, "dpo.draws: got 0"),
        ({"beta": 0.0}, "dpo.beta: got 0.0"),
        ({"guidance_scale": -1.0}, "dpo.guidance_scale: got -1.0"),
        ({"refresh_every": -1}, "refresh_every: got -1"),
        ({"sample_batch": 0}, "sample_batch: got 0"),
        ({"reward_sigma": [1.5]}, r"dpo.reward_sigma\[0\]: got 1.5"),
        ({"mode": "both"}, "known: online, offline"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DpoConfig(**values)
