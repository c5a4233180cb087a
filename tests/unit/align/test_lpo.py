"""LPO's arithmetic by hand, and what makes a pair, on a tiny policy and a reward that reads noisy latents."""

import dataclasses
import math

import pytest
import torch
from tiny_align import SHAPE, changed, gradient_of, half_sampler, make_sampler, move, train, with_sampler

from dinalrm_align import LatentReward
from dinalrm_align.align import lpo
from dinalrm_align.align.lpo_config import LpoConfig
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.flow.sde import transition
from dinalrm_align.models.text import Conditions


class NoisyBrightness:
    """A reward of noisy latents whose differences are clear: 1000 times their mean."""

    def score_noisy(self, latents, sigma, prompts):
        assert isinstance(sigma, float) and len(prompts) == len(latents)
        return 1000 * latents.mean(dim=(1, 2, 3))


@pytest.fixture
def method() -> lpo.Lpo:
    config = LpoConfig(batch_size=3, candidates=3, steps=None, threshold=(0.0, 0.0), beta=500.0)
    return lpo.Lpo(make_sampler(), NoisyBrightness(), config)


# ----------------------------------------------------------------------------- arithmetic


def test_clearest_pair_by_hand():
    """Scores 0, 2, 1: the second is best, the first worst; at temperature 2 softmax(1, 0) = e / (1 + e) = 0.731059,
    so that they differ by 2 (0.731059) - 1 = 0.462117 = tanh(1 / 2). Of equal scores nothing is preferred.
    """
    best, worst, clearness = lpo.clearest_pair(torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 3.0]]), 2.0)
    assert (best[0].item(), worst[0].item()) == (1, 0)
    assert clearness.tolist() == pytest.approx([0.462117, 0.0], abs=1e-6)
    assert clearness[0].item() == pytest.approx(math.tanh(0.5))


def test_dynamic_threshold_by_hand():
    """Injected 0.2, 0.5, 0.3: 0.35 at the least, 0.5 at the most, 0.35 + 0.15 / 3 = 0.4 a third of the way."""
    assert lpo.dynamic_threshold(torch.tensor([0.2, 0.5, 0.3]), 0.35, 0.5).tolist() == pytest.approx([0.35, 0.5, 0.4])
    assert lpo.dynamic_threshold(torch.tensor([0.7, 0.7]), 0.35, 0.5).tolist() == pytest.approx([0.35, 0.35])


def test_step_preference_loss_by_hand():
    """beta 10, clip 0.1. Log-ratios log 1.05 and log 0.95: 10 (0.0487902 + 0.0512933) = 1.000835, and
    log(1 + exp(-1.000835)) = 0.313037. Ratios of 2 and 0.5 count as 1.1 and 0.9: 10 (0.0953102 + 0.1053605) = 2.006707,
    0.126131, and pass no gradient. Equal ratios: log 2. d/d log r_chosen = -beta sigmoid(-1.000835) = -2.687776.
    """
    chosen = torch.tensor([math.log(1.05), math.log(2.0), 0.0], requires_grad=True)
    rejected = torch.tensor([math.log(0.95), math.log(0.5), 0.0])
    loss = lpo.step_preference_loss(chosen, rejected, 10.0, 0.1)
    assert loss.tolist() == pytest.approx([0.313037, 0.126131, math.log(2)], abs=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    assert gradient.tolist() == pytest.approx([-2.687776, 0.0, -5.0], abs=1e-4)


# ----------------------------------------------------------------------------- pairs


def test_pairs_are_the_true_clearest_pair(method):
    """Replay the rollout: of the candidates drawn from every kept state, the reward's best and worst were taken."""
    pairs = method.roll_out(0)
    assert len(pairs.steps) == 9 and sorted(set(pairs.steps.tolist())) == [0, 1, 2]
    assert pairs.latents.shape == (9, *SHAPE)
    first = pairs.steps == 0
    generators = [seeded_generator(lpo.PATHS, 3, 0, sample) for sample in range(3)]
    latents = seeded_noise(SHAPE, generators)
    torch.testing.assert_close(pairs.latents[first], latents)
    with torch.no_grad():
        v = method.velocity_for(method.sampler.take(pairs.indices[first].tolist()))(latents, 1.0)
    step = transition("flow_sde", latents, v, method.sampler.sigmas, 0, 0.7)
    candidates = torch.stack([step.draw(seeded_noise(SHAPE, generators)) for _ in range(3)], dim=1)
    scores = candidates.mean(dim=(2, 3, 4))
    rows = torch.arange(3)
    torch.testing.assert_close(pairs.chosen[first], candidates[rows, scores.argmax(dim=1)])
    torch.testing.assert_close(pairs.rejected[first], candidates[rows, scores.argmin(dim=1)])


def test_a_trajectory_goes_on_from_any_of_its_candidates(method):
    """Over many trajectories the next state is the best one, the worst one and neither: about a third each."""
    many = changed(method, batch_size=60, steps=(0, 2))
    pairs = many.roll_out(0)
    chosen, rejected = (part[pairs.steps == 0] for part in (pairs.chosen, pairs.rejected))
    onward = pairs.latents[pairs.steps == 1]
    went = [int((onward - part).abs().amax(dim=(1, 2, 3)).lt(1e-6).sum()) for part in (chosen, rejected)]
    assert all(8 < count < 34 for count in (*went, 60 - sum(went)))


def test_pairs_below_the_threshold_are_left_out(method):
    """temperature 1000 makes the score the mean again: no two differ by more than tanh(0.05)."""
    everything = changed(method, batch_size=20, temperature=1000.0)
    assert len(everything.roll_out(0).steps) == 60
    few = changed(everything, threshold=(0.005, 0.005)).roll_out(0)
    gap = (few.chosen - few.rejected).mean(dim=(1, 2, 3))
    assert 0 < len(few.steps) < 60 and bool((torch.tanh(gap / 2) > 0.005).all())
    statistics = dict(zip(lpo.STATISTICS, few.statistics.tolist(), strict=True))
    assert statistics["pairs"] == len(few.steps) and statistics["pairs_kept"] == pytest.approx(len(few.steps) / 60)
    none = changed(everything, threshold=(0.9, 0.9))
    batch = none.batch_at(0)
    loss, metrics = none.step(batch)
    assert batch.count == 0 and loss.isfinite() and loss.requires_grad and metrics["pairs"] == 0
    assert gradient_of(none, 1, 1).abs().max() == 0


def test_thresholds_follow_the_injected_noise(method):
    """flow_sde at noise level 0.7 on this schedule injects most at the second step: the threshold is highest there."""
    thresholds = changed(method, threshold=(0.35, 0.5)).thresholds
    blank = torch.zeros(1, 1, 1, 1)
    stds = [transition("flow_sde", blank, blank, method.sampler.sigmas, index, 0.7).std.item() for index in range(3)]
    assert thresholds[stds.index(max(stds))] == pytest.approx(0.5)
    assert thresholds[stds.index(min(stds))] == pytest.approx(0.35)


def test_candidates_are_scored_at_their_own_level(method, tiny_world, tiny_pipeline):
    """With a latent reward: what ranks the candidates of step i is `score_noisy` at the level that they are at."""
    reward = LatentReward.from_pretrained(tiny_world / "dinalrm", pipeline=tiny_pipeline)
    prompts = ["a red circle", "a blue square", "a green cross", "a red square", "a blue circle"]
    given = method.sampler.conditions
    conditions = Conditions(prompts, given.prompt_embeds, given.pooled_prompt_embeds)
    real = with_sampler(dataclasses.replace(method, reward=reward), conditions=conditions)
    pairs = real.roll_out(0)
    for index in range(3):
        at = pairs.steps == index
        named = conditions.take(pairs.indices[at].tolist()).prompts
        level = method.sampler.sigmas[index + 1]
        better, worse = (reward.score_noisy(part[at], level, named) for part in (pairs.chosen, pairs.rejected))
        assert bool((better > worse).all())


# ----------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("sampler", ["flow_sde", "flow_cps"])
def test_at_the_reference_the_loss_is_log_two(method, sampler):
    fresh = changed(method, sampler=sampler)
    loss, metrics = fresh.step(fresh.batch_at(0))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-3) and metrics["kl"] < 1e-9
    gradients = torch.autograd.grad(loss, list(method.sampler.policy.parameters.values()))
    assert sum(float(g.abs().sum()) for g in gradients) > 0


def test_how_an_update_is_cut_does_not_change_its_gradient(method):
    move(method.sampler.policy, scale=0.01)
    whole = gradient_of(changed(method, beta=10.0), 0, 1)
    in_parts = gradient_of(changed(method, accumulate=4, sample_batch=2, beta=10.0), 0, 4)
    more_parts_than_pairs = gradient_of(changed(method, accumulate=11, beta=10.0), 0, 11)
    assert whole.norm() > 0
    for other in (in_parts, more_parts_than_pairs):
        torch.testing.assert_close(other, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


def test_guided_training(method):
    move(method.sampler.policy, scale=0.01)
    guided = with_sampler(changed(method, beta=10.0), guidance_scale=3.0)
    held = with_sampler(changed(method, beta=10.0, negative_gradient=False), guidance_scale=3.0)
    one, other = gradient_of(guided, 0, 1), gradient_of(held, 0, 1)
    assert (one - other).norm() > 0.01 * one.norm() > 0


def test_the_policy_learns_the_preference(method):
    learner = changed(method, batch_size=8, candidates=4, beta=50.0)
    rewards = [row["reward"] for row in train(learner, steps=30, lr=0.003)]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 10  # 1000 times a mean that was 0


def test_a_run_resumed_between_the_updates_of_a_rollout_is_the_same_run(method):
    settings = {"epochs": 2, "minibatches": 2}
    uninterrupted = changed(method, **settings)
    uninterrupted.batch_at(0)
    state = {name: tensor.clone() for name, tensor in uninterrupted.buffer.state_tensors().items()}
    resumed = changed(method, **settings)
    with pytest.raises(RuntimeError, match="micro-step 1 is in the middle of rollout 0"):
        resumed.batch_at(1)
    resumed.buffer.load_state_tensors(state)
    move(method.sampler.policy)
    for micro_step in range(1, 6):
        first, second = uninterrupted.batch_at(micro_step), resumed.batch_at(micro_step)
        assert torch.equal(first.chosen, second.chosen) and first.statistics == second.statistics
        assert torch.equal(uninterrupted.step(first)[0], resumed.step(second)[0])
    for micro_step in (6, 7):
        resumed.batch_at(micro_step)
    assert resumed.buffer.state_tensors() == {}
    with pytest.raises(ValueError, match="saved rollout: got the fields"):
        resumed.buffer.load_state_tensors({"latents": state["latents"]})
    with pytest.raises(ValueError, match="saved rollout: latents: got shape"):
        resumed.buffer.load_state_tensors(state | {"latents": state["latents"][:, :, :4]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"candidates": 1}, "lpo.candidates: got 1"),
        ({"threshold": (0.3, 1.0)}, r"lpo.threshold\[1\]: got 1.0"),
        ({"clip_range": 1.0}, "lpo.clip_range: got 1.0"),
        ({"temperature": 0.0}, "lpo.temperature: got 0.0"),
        ({"steps": (3, 3)}, "lpo.steps"),
        ({"sampler": "flow_cps", "noise_level": 1.5}, "noise_level: got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LpoConfig(**values)


def test_steps_that_do_not_fit_are_refused(method):
    with pytest.raises(ValueError, match="lpo.steps: got \\(0, 4\\)"):
        changed(method, steps=(0, 4))


def test_an_update_per_step_of_a_rollout_moves_the_loss_further_than_one(method):
    """The same eight rollouts in 24 updates and in eight. The first update has the reference's loss, log 2."""
    losses = {}
    for minibatches in (3, 1):
        config = dataclasses.replace(method.config, batch_size=8, minibatches=minibatches)
        learner = lpo.Lpo(make_sampler(), NoisyBrightness(), config)
        losses[minibatches] = [row["loss"] for row in train(learner, 8 * minibatches, lr=3e-3)]
        assert losses[minibatches][0] == pytest.approx(math.log(2), abs=1e-4)
        assert learner.batch_at(0).count == 24 / minibatches
    many, one = (sum(each[-len(each) // 4 :]) / (len(each) // 4) for each in losses.values())
    assert many < one - 0.03 and many < math.log(2) - 0.1


def test_in_half_precision_the_reference_is_compared_in_the_same_batches(method):
    """The policy equals its reference: ratios of 1 in any micro-batch, whatever the rollout's batches."""
    half = dataclasses.replace(changed(method, sample_batch=2), sampler=half_sampler(0.0, accumulate=4))
    for micro_step in range(4):
        metrics = half.step(half.batch_at(micro_step))[1]
        assert metrics["kl"] == metrics["clipped"] == 0
