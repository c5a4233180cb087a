"""Flow-GRPO's arithmetic by hand and against public values, and its invariants on a tiny policy."""

import dataclasses
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forwards import step_and_count
from safetensors.torch import load_file
from tiny_align import (
    SHAPE,
    brightness,
    changed,
    gradient_of,
    half_sampler,
    make_sampler,
    move,
    reward_of,
    train,
    with_reward,
    with_sampler,
)

from dinalrm_align import LatentReward
from dinalrm_align.align import groups, grpo, surrogate
from dinalrm_align.align.anchor import Anchor
from dinalrm_align.align.groups import REWARDS
from dinalrm_align.align.grpo_config import GrpoConfig
from dinalrm_align.align.rollouts import Position, Reuse
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.flow.sde import transition
from dinalrm_align.models.text import Conditions


@pytest.fixture
def method() -> grpo.Grpo:
    config = GrpoConfig(
        groups=2, group_size=3, window_size=2, window_range=None, shared_start=False, reward_draws=1,
        advantage_std="global", kl_beta=0.1, noise_level=0.7,
    )  # fmt: skip
    return grpo.Grpo(make_sampler(), reward_of(brightness), config)


# ----------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("std", "name"), [("group", "advantage_globalstd0"), ("global", "advantage_globalstd1")])
def test_advantages_are_flow_grpos(std, name):
    golden = load_file(Path(__file__).parents[2] / "fixtures" / "flow_grpo_step.safetensors")
    order = golden["advantage_prompt_ids"].argsort(stable=True)
    scores = golden["advantage_rewards"][order].view(3, 3)
    advantages = surrogate.group_advantages(scores, std, 1e-4)
    torch.testing.assert_close(advantages.flatten(), golden[name][order], rtol=1e-5, atol=1e-9)


def test_advantages_by_hand():
    """Groups 0, 2 and 10, 14: means 1 and 12, deviations -1, 1, -2, 2; standard deviations 1 and 2; of all four
    (0, 2, 10, 14: mean 6.5, squares 42.25 + 20.25 + 12.25 + 56.25 = 131) sqrt(131 / 4) = 5.7228.
    """
    scores = torch.tensor([[0.0, 2.0], [10.0, 14.0]])
    assert surrogate.group_advantages(scores, "group", 1.0).tolist() == [[-0.5, 0.5], [-2 / 3, 2 / 3]]
    assert surrogate.group_advantages(scores, "global", 0.0).flatten().tolist() == pytest.approx(
        [-1 / 5.7228, 1 / 5.7228, -2 / 5.7228, 2 / 5.7228], rel=1e-4
    )
    with pytest.raises(ValueError, match="unknown advantage_std 'batch'; known: group, global"):
        surrogate.group_advantages(scores, "batch", 0.0)


def test_several_rewards_by_hand():
    """Two groups of two. Reward a: 1, 3 and 0, 0, z-scores -1, 1 and 0, 0. Reward b, weight 1/2, on a scale of
    hundreds: 0, 100 and 500, -500, z-scores -1, 1 and 1, -1. Sum: -3/2, 3/2, 1/2, -1/2. The mean square of the sum is
    (9 + 9 + 1 + 1) / 16 = 5/4, so that GDPO's advantages are the sum times sqrt(4/5) = 0.894427.
    """
    scores = {"a": torch.tensor([[1.0, 3.0, 0.0, 0.0]]), "b": torch.tensor([[0.0, 100.0, 500.0, -500.0]])}
    config = GrpoConfig(group_size=2, advantage_floor=1e-9, advantage_clip=1.2)
    for normalise, expected in ((False, [-1.2, 1.2, 0.5, -0.5]), (True, [-1.2, 1.2, 0.4472136, -0.4472136])):
        found = groups.rollout_advantages(scores, {"a": 1.0, "b": 0.5}, config, lambda own: own, 0, normalise)
        assert found.advantages.tolist() == pytest.approx(expected)
        assert found.kept.all() and found.statistics["reward"] == pytest.approx(1 + 0.5 * 25)
    wide = dataclasses.replace(config, advantage_clip=5.0)
    found = groups.rollout_advantages(scores, {"a": 10.0, "b": 5.0}, wide, lambda own: own, 0, True)
    assert found.advantages[:2].tolist() == pytest.approx([-1.5 * 0.8**0.5, 1.5 * 0.8**0.5])  # any scale of the weights


def test_decoupled_advantages_are_the_same_on_every_rank():
    """Each of two ranks holds a group, and the standard deviation is that of both."""
    scores = {"a": torch.tensor([[1.0, 3.0, 0.0, 0.0]]), "b": torch.tensor([[0.0, 100.0, 500.0, -500.0]])}
    config, weights = GrpoConfig(group_size=2), {"a": 1.0, "b": 0.5}
    whole = groups.rollout_advantages(scores, weights, config, lambda own: own, 0, True).advantages
    everyone = iter([scores["a"].T, scores["b"].T] * 2)
    for rank in (0, 1):
        own = {name: values[:, 2 * rank : 2 * rank + 2] for name, values in scores.items()}
        found = groups.rollout_advantages(own, weights, config, lambda own: next(everyone), rank, True)
        assert torch.equal(found.advantages, whole[2 * rank : 2 * rank + 2])


def test_clipped_loss_by_hand():
    """c = 0.1. A = 1: rho 1.2 counts as 1.1, 0.8 as it is: -1.1, -0.8. A = -1: 1.2 as it is, 0.8 as 0.9: 1.2, 0.9."""
    ratio, advantage = torch.tensor([1.2, 0.8, 1.2, 0.8]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert surrogate.clipped_loss(ratio, advantage, 0.1).tolist() == pytest.approx([-1.1, -0.8, 1.2, 0.9])


def test_guarded_ratio_by_hand():
    """One pixel, std 0.25, mu_old = 0.375, mu = 0.425, x' = 0.625, which is noise 1 away from mu_old.

    lp - lp_old = (0.25^2 - 0.2^2) / (2 0.0625) = 0.18; bias = 0.05^2 / 0.125 = 0.02; rho = exp(0.2 0.25) = exp(0.05),
    and that is exp(noise (mu - mu_old)) = exp(1 0.05). The loss of A = -2 is 2 exp(0.05) / -delta, delta = -0.25.
    """
    following = torch.full((1, 1, 1, 1), 0.625)
    old = transition("flow_sde", torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), [1, 0.5, 0.25, 0], 1, 0.5)
    new = dataclasses.replace(old, mean=old.mean + 0.05)
    ratio = surrogate.guarded_ratio(new, old.mean, new.log_prob(following), old.log_prob(following))
    assert ratio.item() == pytest.approx(math.exp(0.05), rel=1e-5)
    assert (surrogate.clipped_loss(ratio, torch.tensor([-2.0]), 0.1) / -new.delta).item() == pytest.approx(
        8.410169, rel=1e-5
    )


def test_kl_by_hand():
    """Means 0.1 apart; s = 0.5, std = 0.25: 0.01 / (2 0.25) = 0.02, 0.01 / (2 0.0625) = 0.08; velocities 3 apart: 9."""
    step = transition("flow_sde", torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0), [1, 0.5, 0.25, 0], 1, 0.5)
    reference = dataclasses.replace(step, mean=step.mean - 0.1)
    difference = torch.full((1, 1, 1, 1), 3.0)
    for form, expected in (("scale", 0.02), ("std", 0.08), ("velocity", 9.0)):
        assert surrogate.step_kl(form, step, reference, difference).item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="unknown kl_form 'none'"):
        surrogate.step_kl("none", step, reference, difference)


def test_windows():
    """10 steps: all but the last; a window of 3 anywhere in 0 ... 8; MixGRPO's moves by 1 every 25 rollouts."""
    generator = torch.Generator().manual_seed(0)
    assert grpo.trained_steps(GrpoConfig(window="all"), 10, 0, generator) == range(9)
    fast = GrpoConfig(window="random", window_size=3, window_range=None)
    starts = {grpo.trained_steps(fast, 10, 0, generator).start for _ in range(300)}
    assert starts == set(range(7))
    first_half = GrpoConfig(window="random", window_size=3, window_range=(0, 5))
    assert {grpo.trained_steps(first_half, 10, 0, generator).start for _ in range(100)} == {0, 1, 2}
    sliding = GrpoConfig(window="progressive", window_size=4, window_range=None)
    assert [grpo.trained_steps(sliding, 10, r, generator) for r in (0, 24, 25, 124, 125, 9999)] == [
        range(0, 4), range(0, 4), range(1, 5), range(4, 8), range(5, 9), range(5, 9),
    ]  # fmt: skip
    strided = dataclasses.replace(sliding, window_stride=3, window_rollouts=1, window_wraps=True)
    assert [grpo.trained_steps(strided, 10, r, generator).start for r in range(5)] == [0, 3, 5, 0, 3]
    with pytest.raises(ValueError, match="window of 3"):
        grpo.trained_steps(fast, 3, 0, generator)


def test_the_micro_steps_of_a_rollout_are_in_order():
    """2 epochs x 2 minibatches x 2 parts: 8 micro-steps per rollout."""
    reuse = Reuse(epochs=2, minibatches=2, accumulate=2)
    places = [reuse.position(micro_step) for micro_step in range(9)]
    assert places[0] == Position(0, 0, 0, 0) and places[0].starts_rollout and places[8] == Position(1, 0, 0, 0)
    assert places[5] == Position(0, 1, 0, 1) and not places[5].starts_rollout
    assert [place.in_first_update for place in places] == [True, True] + 6 * [False] + [True]
    assert [reuse.ends(place) for place in places] == 7 * [False] + [True, False]
    rows, groups = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19]), torch.tensor([0, 0, 0, 0, 3, 3, 3, 3])
    for epoch in range(2):
        shares = [reuse.select(rows, groups, 3, place, 1) for place in places[4 * epoch : 4 * epoch + 4]]
        pairs = [pair for one, two in shares for pair in zip(one.tolist(), two.tolist(), strict=True)]
        assert sorted(pairs) == [(row, column) for row in rows.tolist() for column in range(3)]
        assert [len(one) for one, _ in shares] == [6, 6, 6, 6]
        updates = [{row for one, _ in shares[update : update + 2] for row in one.tolist()} for update in (0, 2)]
        assert all(sum(row < 10 for row in update) == len(update) / 2 == 2 for update in updates)
    assert len(reuse.select(rows[:0], groups[:0], 3, places[0], 1)[0]) == 0


def test_what_an_update_holds_of_a_group_does_not_depend_on_who_holds_the_others():
    """Groups 0 to 3 of 3 samples in 2 updates: the odd one goes to the first update of two of them."""
    reuse, rows = Reuse(epochs=1, minibatches=2, accumulate=1), torch.arange(12)
    updates = [reuse.select(rows, rows // 3, 1, reuse.position(update), 1)[0] for update in range(2)]
    for update, together in enumerate(updates):
        apart = [reuse.select(part, part // 3, 1, reuse.position(update), 1)[0] for part in rows.split(6)]
        assert torch.equal(torch.cat(apart), together) and len(together) == 6


# ----------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("sampler", ["flow_sde", "flow_cps"])
@pytest.mark.parametrize("window", ["all", "random", "progressive"])
def test_the_first_ratio_is_one_and_kl_to_the_reference_zero(method, sampler, window):
    fresh = changed(method, sampler=sampler, window=window, guard=sampler == "flow_sde")
    batch = fresh.batch_at(0)
    loss, metrics = fresh.step(batch)
    assert metrics["ratio_spread"] < 1e-5 and metrics["clipped"] == 0
    assert metrics["kl"] < 1e-9  # the reference is the same network, without the adapter's additions
    assert loss.requires_grad


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_first_ratio_is_one_wherever_the_policy_is(method, guidance_scale):
    move(method.sampler.policy)
    guided = with_sampler(changed(method, sample_batch=2, window="all"), guidance_scale=guidance_scale)
    _, metrics = guided.step(guided.batch_at(0))
    assert metrics["ratio_spread"] < 1e-5 and metrics["kl"] > 1e-6


def test_a_first_ratio_that_is_not_one_stops_the_run(method):
    batch = method.batch_at(0)
    move(method.sampler.policy)
    with pytest.raises(
        FloatingPointError, match="the first ratio after rollout 0 differs from 1 by .*expected at most"
    ):
        method.step(batch)


def test_later_updates_of_a_rollout_may_leave_one(method):
    reusing = changed(method, epochs=2)
    reusing.batch_at(0)
    move(method.sampler.policy)
    _, metrics = reusing.step(reusing.batch_at(1))
    assert metrics["ratio_spread"] > 1e-5 and metrics["clipped"] > 0


@pytest.mark.parametrize("guard", [False, True])
def test_how_an_update_is_cut_does_not_change_its_gradient(method, guard):
    move(method.sampler.policy)
    settings = {"minibatches": 2, "guard": guard, "sampler": "flow_sde"}
    whole = gradient_of(changed(method, **settings), 0, 1)
    in_parts = gradient_of(changed(method, accumulate=3, sample_batch=2, **settings), 0, 3)
    more_parts_than_samples = gradient_of(changed(method, accumulate=8, **settings), 0, 8)
    assert whole.norm() > 0
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())
    torch.testing.assert_close(more_parts_than_samples, whole, rtol=1e-4, atol=1e-5 * whole.abs().max().item())


def test_groups_of_equal_scores_give_no_gradient(method):
    def first_prompt_alone(latents, *, prompts, **_):
        """Brightness for the prompt of the first group, 1 for every other."""
        mine = torch.tensor([prompt == first for prompt in prompts])
        return torch.where(mine, brightness(latents), torch.ones(len(prompts)))

    first = method.sampler.conditions.prompts[int(method.roll_out(0).indices[0])]
    for reward, dropped in ((first_prompt_alone, 0.5), (lambda latents, **_: torch.ones(len(latents)), 1.0)):
        one = with_reward(changed(method), reward)
        batch = one.batch_at(0)
        loss, metrics = one.step(batch)
        assert metrics["dropped_groups"] == dropped
        assert (set(batch.conditions.prompts), batch.count) == ({first}, 6) if dropped < 1 else batch.count == 0
        loss = loss * batch.count
        gradients = torch.autograd.grad(loss, list(method.sampler.policy.parameters.values()), allow_unused=True)
        size = sum(float(g.abs().sum()) for g in gradients if g is not None)
        assert (size > 0) == (dropped < 1)


def test_the_score_inside_is_the_score_outside(method, tiny_world, tiny_pipeline):
    """A latent reward: the rollout compares `reward(latents)` of its final latents, at the noise of each group."""
    reward = LatentReward.from_pretrained(tiny_world / "dinalrm", pipeline=tiny_pipeline)
    prompts = ["a red circle", "a blue square", "a green cross", "a red square", "a blue circle"]
    embeds = method.sampler.conditions
    conditions = Conditions(prompts, embeds.prompt_embeds, embeds.pooled_prompt_embeds)
    real = dataclasses.replace(changed(method, reward_draws=2, advantage_floor=1e-12), reward=reward)
    real = with_sampler(real, conditions=conditions)
    rollout = real.roll_out(4)
    window = range(rollout.start, rollout.start + 2)
    chosen = conditions.take(rollout.indices.tolist())
    with torch.no_grad():
        final, *_ = real.trajectories(4, range(6), chosen, window)
        outside = torch.stack([
            reward(
                final,
                chosen,
                noise=seeded_noise(SHAPE, [seeded_generator(REWARDS, 3, 4, i // 3, draw) for i in range(6)]),
            )
            for draw in range(2)
        ]).mean(dim=0)  # fmt: skip
    expected = surrogate.group_advantages(outside.view(2, 3), "global", 1e-12).float().flatten()
    torch.testing.assert_close(rollout.advantages, expected, rtol=1e-3, atol=1e-4)
    assert dict(zip(grpo.RECORDED, rollout.statistics.tolist(), strict=True))["reward"] == pytest.approx(
        outside.mean().item(), rel=1e-4
    )


def test_a_group_shares_the_rewards_noise_and_the_rest_is_measured(method):
    """The reward is brightness plus its noise's mean: common noise cancels within a group, and its variance is logged.

    The mean of n = 16 x 8 x 8 normals has variance 1 / n; over two draws averaged, 1 / (2 n).
    """
    seen = []

    def noisy(latents, *, prompts, sigma, noise):
        seen.append(noise)
        return brightness(latents) + noise.mean(dim=(1, 2, 3))

    one = changed(method, groups=4, group_size=4, sample_batch=16, reward_draws=2, advantage_std="group")
    plain = one.roll_out(0)
    rollout = with_reward(one, noisy).roll_out(0)
    torch.testing.assert_close(rollout.advantages, plain.advantages, rtol=1e-4, atol=1e-5)
    first, second = (draw.view(4, 4, *SHAPE) for draw in seen)
    assert torch.equal(first[:, :1].expand_as(first), first) and not torch.equal(first[0, 0], first[1, 0])
    assert not torch.equal(first, second)
    logged = dict(zip(grpo.RECORDED, rollout.statistics.tolist(), strict=True))
    drawn = torch.stack([first[:, 0].mean(dim=(1, 2, 3)), second[:, 0].mean(dim=(1, 2, 3))])
    assert logged["reward_noise_variance"] == pytest.approx(drawn.var(dim=0).mean().item() / 2, rel=1e-3)
    assert logged["group_variance"] == pytest.approx(
        dict(zip(grpo.RECORDED, plain.statistics.tolist(), strict=True))["group_variance"], rel=1e-3
    )


def test_parts_of_a_reward_are_normalised_one_by_one(method):
    """Parts on scales a thousand apart, weights 1 and -1: the sum follows the larger, the parts weigh the same."""

    def parts(latents, **_):
        return {"bright": brightness(latents), "rough": 1000 * latents.var(dim=(1, 2, 3))}

    weights = {"bright": 1.0, "rough": -1.0}

    class Two:
        """A reward of two parts."""

        reads_noise = wants_groups = False

        def __init__(self, weights):
            self.weights = weights

        def score_parts(self, latents, conditions, **noise):
            return parts(latents)

    one = changed(dataclasses.replace(method, reward=Two(weights)), advantage_of="parts")
    with torch.no_grad():
        rollout = one.roll_out(0)
        window = range(rollout.start, rollout.start + 2)
        final, *_ = one.trajectories(0, range(6), one.sampler.conditions.take(rollout.indices.tolist()), window)
    scores = {name: values.view(2, 3) for name, values in parts(final).items()}
    expected = sum(
        weights[name] * surrogate.group_advantages(values, "global", 1e-4) for name, values in scores.items()
    )
    torch.testing.assert_close(rollout.advantages.view(2, 3), expected.float(), rtol=1e-3, atol=1e-4)
    decoupled = changed(one, advantage_of="gdpo").roll_out(0).advantages
    whole = expected / expected.std(correction=0)
    torch.testing.assert_close(decoupled, whole.float().flatten(), rtol=2e-3, atol=1e-3)
    with pytest.raises(ValueError, match="its weights are for \\['other'\\]"):
        dataclasses.replace(one, reward=Two({"other": 1.0})).roll_out(0)


def test_an_anchor_has_its_say_in_every_second_rollout(method):
    """A = A_reward + 0.5 A_anchor, each normalised by itself; the recorded reward leaves out the anchor."""

    def darkness(latents, **_):
        return -100 * latents.mean(dim=(1, 2, 3))

    anchored = dataclasses.replace(method, anchor=Anchor(reward_of(darkness), every=2, weight=0.5))
    for number, weight in ((0, 0.0), (1, 0.5)):
        alone, mixed = (one.roll_out(number) for one in (method, anchored))
        other = with_reward(method, darkness).roll_out(number)
        torch.testing.assert_close(mixed.advantages, alone.advantages + weight * other.advantages)
        recorded = [dict(zip(grpo.RECORDED, one.statistics.tolist())) for one in (alone, mixed, other)]
        assert recorded[1]["reward"] == recorded[0]["reward"]
        assert (
            recorded[1]["anchor"] == recorded[2]["reward"] if weight else recorded[1]["anchor"] != recorded[1]["anchor"]
        )


def test_a_reward_that_compares_groups_gets_whole_ones(method):
    reward = reward_of(brightness)
    reward.wants_groups = True
    whole = dataclasses.replace(changed(method, sample_batch=3), reward=reward)
    with pytest.raises(ValueError, match="grpo.sample_batch: got 4; expected a multiple of group_size 3"):
        changed(whole, sample_batch=4)
    with pytest.raises(ValueError, match="grpo.sample_batch: got 4"):
        dataclasses.replace(changed(method, sample_batch=4), anchor=Anchor(reward, every=2, weight=0.5))


def test_rollouts_do_not_depend_on_how_they_are_cut(method):
    whole, cut = changed(method).roll_out(1), changed(method, sample_batch=4).roll_out(1)
    torch.testing.assert_close(cut.latents, whole.latents, rtol=1e-4, atol=1e-5)
    assert torch.equal(cut.indices, whole.indices) and cut.start == whole.start
    other_rank = with_sampler(method, rank=1, num_processes=2).roll_out(1)
    assert not torch.equal(other_rank.latents, whole.latents) and other_rank.start == whole.start


def test_outside_the_window_the_flow_is_followed(method):
    """With a shared start and a window at step 1 of 4, the state before it is the same for the whole group."""
    shared = changed(method, shared_start=True, window_size=1, window_range=(1, 2))
    rollout = shared.roll_out(0)
    groups = rollout.latents.view(2, 3, 2, *SHAPE)
    torch.testing.assert_close(groups[:, :1, 0].expand(-1, 3, *SHAPE), groups[:, :, 0])
    assert not torch.allclose(groups[:, 0, 1], groups[:, 1, 1])
    assert not torch.allclose(groups[0, 0, 0], groups[1, 0, 0])


def test_the_empty_prompts_velocity_may_be_held_constant(method):
    move(method.sampler.policy)
    guided = with_sampler(changed(method), guidance_scale=3.0)
    held, both = (gradient_of(dataclasses.replace(changed(guided, negative_gradient=on)), 0, 1) for on in (False, True))
    assert (held - both).norm() > 0.01 * both.norm() > 0


def test_only_the_lora_gets_a_gradient_and_the_reward_rises(method):
    learner = changed(method, groups=2, group_size=8, kl_beta=0.0, window="all", epochs=2, clip_range=1e-2)
    rewards = [row["reward"] for row in train(learner, steps=40, lr=0.01)]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 0.02


# ----------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("guard", [False, True])
def test_a_run_resumed_in_the_middle_of_a_rollout_is_the_same_run(method, guard):
    settings = {"epochs": 2, "minibatches": 2, "guard": guard, "sampler": "flow_sde"}
    uninterrupted = changed(method, accumulate=2, **settings)
    uninterrupted.batch_at(0)
    state = {name: tensor.clone() for name, tensor in uninterrupted.buffer.state_tensors().items()}
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values()) and state
    resumed = changed(method, accumulate=2, **settings)
    with pytest.raises(RuntimeError, match="micro-step 3 is in the middle of rollout 0"):
        resumed.batch_at(3)
    resumed.buffer.load_state_tensors(state)
    move(method.sampler.policy)  # what was rolled out before must not depend on the weights after
    for micro_step in range(3, 10):
        first, second = uninterrupted.batch_at(micro_step), resumed.batch_at(micro_step)
        assert torch.equal(first.latents, second.latents) and torch.equal(first.old_log_prob, second.old_log_prob)
        assert torch.equal(first.advantage, second.advantage) and first.statistics == second.statistics
        losses = [one.step(batch)[0] for one, batch in ((uninterrupted, first), (resumed, second))]
        assert torch.equal(*losses)
    resumed.buffer.load_state_tensors({})
    assert resumed.buffer.state_tensors() == {}


def test_nothing_is_pending_between_rollouts(method):
    accumulating = changed(method, accumulate=2)
    accumulating.batch_at(0)
    assert accumulating.buffer.state_tensors()
    accumulating.batch_at(1)
    assert accumulating.buffer.state_tensors() == {}


def test_another_runs_state_is_refused(method):
    method = changed(method, epochs=2)
    method.batch_at(0)
    state = method.buffer.state_tensors()
    with pytest.raises(ValueError, match="saved rollout: got the fields"):
        method.buffer.load_state_tensors({"latents": state["latents"]})
    with pytest.raises(ValueError, match="saved rollout: indices: got shape \\(6,\\); expected \\(9,\\)"):
        changed(method, groups=3).buffer.load_state_tensors(state)


def test_a_reward_that_fails_is_not_taken_for_equal_scores(method):
    broken = with_reward(changed(method), lambda latents, **_: torch.full((len(latents),), torch.nan))
    with pytest.raises(ValueError, match="6 of 6 scores"):
        broken.batch_at(0)
    broken = with_reward(broken, lambda latents, **_: torch.zeros(len(latents), 1))
    with pytest.raises(ValueError, match="shape \\(6, 1\\)"):
        broken.batch_at(0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"groups": 0}, "grpo.groups: got 0"),
        ({"group_size": 1}, "grpo.group_size: got 1"),
        ({"noise_level": 1.2}, "noise_level: got 1.2 with flow_cps"),
        ({"window_range": (0, 2), "window_size": 3}, "room for window_size 3"),
        ({"reward_sigma": []}, "grpo.reward_sigma: got"),
        ({"clip_range": 0.0}, "grpo.clip_range: got 0.0"),
        ({"kl_beta": -1.0}, "kl_beta: got -1.0"),
        ({"guard": True}, "grpo.guard: got true with sampler flow_cps"),
        ({"num_steps": 1}, "num_steps: got 1"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GrpoConfig(**values)


@pytest.mark.parametrize("tolerance", [1e-5, 3e-6])
def test_a_tolerance_of_the_ratio_that_reaches_the_clip_is_refused(tolerance):
    """A mismatch of 1e-5 would be clipped at 3e-6: the first update would train on nothing, unnoticed."""
    message = f"grpo.ratio_tolerance: got {tolerance:g}; expected less than clip_range, 3e-06"
    with pytest.raises(ValueError, match=message):
        GrpoConfig(clip_range=3e-6, ratio_tolerance=tolerance)
    assert GrpoConfig(clip_range=3e-6, ratio_tolerance=2e-6).largest_mismatch == 2e-6
    assert GrpoConfig(clip_range=3e-6).largest_mismatch == pytest.approx(1e-6)
    assert GrpoConfig(clip_range=0.3).largest_mismatch == pytest.approx(0.1)


def test_a_mismatch_beyond_a_third_of_the_clip_stops_the_run(method):
    """A shift of the old log-probabilities is what different rounding in rollout and training does."""
    narrow = changed(method, clip_range=3e-2)
    batch = narrow.batch_at(0)
    narrow.step(dataclasses.replace(batch, old_log_prob=batch.old_log_prob + 0.009))
    with pytest.raises(FloatingPointError, match="expected at most 0.01"):
        narrow.step(dataclasses.replace(batch, old_log_prob=batch.old_log_prob + 0.011))


# ----------------------------------------------------------------------------- half precision


def first_prompt_scores(method) -> Callable:
    """A reward that scores the samples of the first group, and gives all others 1, so that their groups drop out."""
    first = method.sampler.conditions.prompts[int(method.roll_out(0).indices[0])]
    return lambda latents, *, prompts, **_: torch.where(
        torch.tensor([prompt == first for prompt in prompts]), brightness(latents), torch.ones(len(prompts))
    )


@pytest.mark.parametrize(
    ("sample_batch", "accumulate", "dropped", "guard"),
    [(6, 1, 0.0, False), (1, 1, 0.0, True), (4, 5, 0.0, True), (6, 2, 0.5, False), (2, 6, 0.5, True)],
)
def test_in_half_precision_ratios_are_one_as_long_as_the_weights_stay(sample_batch, accumulate, dropped, guard):
    """Two epochs of two updates, in micro-batches of other sizes than the rollout's, uneven and empty ones included."""
    config = GrpoConfig(
        groups=2, group_size=3, sample_batch=sample_batch, window_size=3, window_range=None, reward_draws=1, epochs=2,
        minibatches=2, sampler="flow_sde", guard=guard, clip_range=3e-6,
    )  # fmt: skip
    method = grpo.Grpo(half_sampler(accumulate=accumulate), reward_of(brightness), config)
    if dropped:
        method = with_reward(method, first_prompt_scores(method))
    for micro_step in range(4 * accumulate):
        _, metrics = method.step(method.batch_at(micro_step))
        assert metrics["dropped_groups"] == dropped and metrics["ratio_spread"] == metrics["clipped"] == 0


def test_in_half_precision_later_ratios_are_to_the_weights_of_the_rollout():
    """Two updates of 6 and 6 pairs: the second's ratios compare its velocities before and after the first."""
    config = GrpoConfig(
        groups=2, group_size=3, sample_batch=4, window_size=2, window_range=None, reward_draws=1, minibatches=2,
    )  # fmt: skip
    method = grpo.Grpo(half_sampler(), reward_of(brightness), config)
    method.batch_at(0)
    batch = method.batch_at(1)

    def log_prob():
        with torch.no_grad():
            velocity = method.velocity_for(batch.conditions)(batch.latents, method.sampler.levels(batch.steps))
        sigmas = method.sampler.sigmas
        step = transition(config.sampler, batch.latents, velocity, sigmas, batch.steps, config.noise_level)
        return step.log_prob(batch.following)

    old = log_prob()
    assert batch.count == 6 and torch.equal(old, batch.old_log_prob)
    move(method.sampler.policy, seed=9)
    _, metrics = method.step(batch)
    expected = (torch.exp(log_prob() - old) - 1).abs().mean()
    assert metrics["ratio_spread"] == pytest.approx(expected.item(), rel=1e-6) and expected > 0


@pytest.mark.parametrize("guard", [False, True])
def test_a_half_precision_run_resumed_in_the_middle_of_a_rollout_is_the_same_run(guard):
    config = GrpoConfig(
        groups=2, group_size=3, sample_batch=4, window_size=2, window_range=None, reward_draws=1, minibatches=2,
        epochs=2, sampler="flow_sde", guard=guard,
    )  # fmt: skip
    whole, resumed, earlier = (grpo.Grpo(half_sampler(accumulate=2), reward_of(brightness), config) for _ in range(3))
    whole.batch_at(0)
    state = whole.buffer.state_tensors()
    resumed.buffer.load_state_tensors({name: tensor.clone() for name, tensor in state.items()})
    for each in (whole, resumed):
        move(each.sampler.policy, seed=9)
    for micro_step in range(2, 8):
        (first, one), (second, other) = (each.step(each.batch_at(micro_step)) for each in (whole, resumed))
        assert torch.equal(first, second) and one == other
    # a checkpoint of an earlier version holds one set of probabilities, of the rollout
    own = {"log_probs"} | ({"means"} if guard else set())
    earlier.buffer.load_state_tensors({name: t[:, :2] if name in own else t for name, t in state.items()})
    assert earlier.step(earlier.batch_at(4))[0].isfinite()


def test_forwards_for_old_probabilities_are_run_where_they_are_needed():
    """For 2 epochs x 2 updates x 3 micro-steps, for all but the first 3; not for one update, and not in float32."""
    config = GrpoConfig(groups=2, group_size=3, window_size=2, window_range=None, reward_draws=1, sample_batch=6)

    def forwards(sampler, **reuse) -> int:
        ran = []
        sampler.policy.transformer.register_forward_hook(lambda *given: ran.append(1))
        grpo.Grpo(sampler, reward_of(brightness), dataclasses.replace(config, **reuse)).roll_out(0)
        return len(ran)

    assert forwards(half_sampler(accumulate=3)) == forwards(make_sampler(accumulate=3), epochs=2, minibatches=2) == 4
    assert forwards(half_sampler(accumulate=3), epochs=2, minibatches=2) == 4 + 9


def test_forwards_for_old_probabilities_hold_the_activations_of_one_micro_batch(monkeypatch):
    """Each kept those of the one before, too: twice the memory of an update."""
    config = GrpoConfig(groups=2, group_size=3, sample_batch=6, window_size=2, reward_draws=1, minibatches=3)
    learner = grpo.Grpo(half_sampler(), reward_of(brightness), config)
    graphs, transitions = [], learner.sampler.transitions

    def counted(*arguments, **options):
        assert not any(graph() is not None for graph in graphs)
        found = transitions(*arguments, **options)
        graphs.append(weakref.ref(found[0].mean))
        return found

    monkeypatch.setattr(learner.sampler, "transitions", counted)
    learner.roll_out(0)
    assert len(graphs) == 2


def test_half_precision_finds_a_gross_mismatch():
    config = GrpoConfig(groups=2, group_size=3, window_size=2, window_range=None, reward_draws=1, clip_range=3e-6)
    method = grpo.Grpo(half_sampler(), reward_of(brightness), config)
    batch = method.batch_at(0)
    with pytest.raises(FloatingPointError, match="expected at most 0.0078"):
        method.step(dataclasses.replace(batch, old_log_prob=batch.old_log_prob + 0.01))


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_without_a_kl_the_base_model_does_not_run(method, weight, monkeypatch):
    learner = changed(method, kl_beta=weight)
    forwards, metrics = step_and_count(learner, method.sampler.policy.transformer, monkeypatch)
    assert forwards == (2 if weight else 1) and metrics.keys() >= {"ratio_spread", "clipped"}
    assert ("kl" in metrics) == ("step_kl" in metrics) == (weight > 0)
