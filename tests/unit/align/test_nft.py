"""DiffusionNFT's arithmetic by hand and its invariants on a tiny policy."""

import pytest
import torch
from forwards import step_and_count
from tiny_align import brightness, changed, gradient_of, half_sampler, make_sampler, move, reward_of, train, with_reward

from dinalrm_align.align import nft
from dinalrm_align.align.nft_config import NftConfig


@pytest.fixture
def method() -> nft.Nft:
    config = NftConfig(groups=2, group_size=3, levels=2, advantage_std="global", kl_beta=1e-4)
    return nft.Nft(make_sampler(), reward_of(brightness), config)


def test_goodness_by_hand():
    """c = 5: 0 is 0.5, 2.5 is 0.75, beyond -5 and 5 it is 0 and 1."""
    assert nft.goodness(torch.tensor([0.0, 2.5, -7.0, 9.0]), 5.0).tolist() == [0.5, 0.75, 0.0, 1.0]


def test_contrast_loss_by_hand():
    """x0 = 1, x_sigma = 2, sigma = 0.5, v = 1, v_old = 3, beta = 0.5, r = 0.75.

    v_good = 0.5 + 1.5 = 2: x0_good = 1, off by 0 (w floored): 0. v_bad = 4.5 - 0.5 = 4: x0_bad = 0, off by -1, w = 1.
    Loss (0.75 0 + 0.25 1) / 0.5 = 0.5. x0_bad = 2 - 0.5 (4.5 - 0.5 v), so d/dv = 0.25 (2 (-1) 0.25) / 0.5 = -0.25.
    """
    one = torch.ones(1, 1, 1, 1)
    v = one.clone().requires_grad_()
    loss = nft.contrast_loss(v, 3 * one, 2 * one, torch.tensor([0.5]), one, torch.tensor([0.75]), 0.5)
    assert loss.tolist() == pytest.approx([0.5])
    assert torch.autograd.grad(loss.sum(), v)[0].item() == pytest.approx(-0.25)


def test_at_the_sampling_policy_the_gradient_is_that_of_the_goodness_less_a_half(method):
    """v = v_old: good and bad policy agree, and r (x0_good - x0)^2 + (1 - r) (x0_bad - x0)^2 pulls by 2 r - 1."""
    generator = torch.Generator().manual_seed(0)
    v, x0, x_sigma = torch.randn(3, 4, 2, 3, 3, generator=generator)
    sigma = torch.full((4,), 0.5)
    gradients = []
    for good in (0.5, 0.75, 1.0, 0.0):
        v = v.detach().requires_grad_()
        loss = nft.contrast_loss(v, v.detach(), x_sigma, sigma, x0, torch.full((4,), good), 1.0)
        gradients.append(torch.autograd.grad(loss.sum(), v)[0])
    assert gradients[0].abs().max() < 1e-7
    torch.testing.assert_close(gradients[1], 0.5 * gradients[2])
    torch.testing.assert_close(gradients[3], -gradients[2])


def test_the_reference_is_the_policy_at_first_and_groups_of_equal_scores_say_nothing(method):
    loss, metrics = method.step(method.batch_at(0))
    assert metrics["kl"] < 1e-9 and metrics["moved"] < 1e-9 and loss.requires_grad
    equal = with_reward(changed(method), lambda latents, **_: torch.ones(len(latents)))
    batch = equal.batch_at(0)
    loss, metrics = equal.step(batch)
    assert batch.count == 0 and loss.isfinite() and metrics["dropped_groups"] == 1
    assert gradient_of(equal, 0, 1).abs().max() == 0


def test_how_an_update_is_cut_does_not_change_its_gradient(method):
    move(method.sampler.policy)
    whole = gradient_of(changed(method, minibatches=2), 0, 1)
    in_parts = gradient_of(changed(method, accumulate=4, sample_batch=2, minibatches=2), 0, 4)
    assert whole.norm() > 0
    torch.testing.assert_close(in_parts, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


def test_the_sampling_policy_follows(method):
    follower = changed(method, old_slope=0.25, old_limit=0.5)
    follower.batch_at(0)
    name, p = next(iter(method.sampler.policy.parameters.items()))
    before = p.detach().clone()
    move(method.sampler.policy)
    follower.follow(1)
    torch.testing.assert_close(follower.old.mean[name], 0.25 * before + 0.75 * p.detach())
    follower.follow(9)
    torch.testing.assert_close(follower.old.mean[name], 0.125 * before + 0.875 * p.detach())
    samples = follower.roll_out(0).latents
    torch.testing.assert_close(p.detach(), follower.sampler.policy.parameters[name].detach())
    assert not torch.allclose(samples, changed(method).roll_out(0).latents)  # a fresh one samples as the policy is now


def test_the_reward_rises(method):
    learner = changed(method, groups=2, group_size=8)
    rewards = [row["reward"] for row in train(learner, steps=25, lr=0.01)]
    assert sum(rewards[-6:]) / 6 > sum(rewards[:6]) / 6 + 0.02


def test_a_run_resumed_in_the_middle_of_a_rollout_is_the_same_run(method):
    settings = {"epochs": 2, "minibatches": 2, "old_slope": 0.3}
    first = changed(method, **settings)
    first.batch_at(0)
    move(method.sampler.policy)
    first.follow(1)
    state = {name: tensor.clone() for name, tensor in first.state_tensors().items()}
    resumed = changed(method, **settings)
    with pytest.raises(RuntimeError, match="micro-step 1 is in the middle of rollout 0"):
        resumed.batch_at(1)
    resumed.load_state_tensors(state)
    for micro_step in range(1, 6):
        batches = [one.batch_at(micro_step) for one in (first, resumed)]
        assert torch.equal(batches[0].latents, batches[1].latents) and torch.equal(batches[0].noise, batches[1].noise)
        assert torch.equal(first.step(batches[0])[0], resumed.step(batches[1])[0])
    with pytest.raises(ValueError, match="saved rollout: indices: got shape \\(6,\\); expected \\(9,\\)"):
        changed(method, groups=3).load_state_tensors(state)
    lost = next(name for name in state if name.startswith("old."))
    with pytest.raises(ValueError, match=f"weights of another LoRA: {lost.removeprefix('old.')}: got None"):
        changed(method, **settings).load_state_tensors({name: t for name, t in state.items() if name != lost})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": 0}, "nft.levels: got 0"),
        ({"group_size": 1}, "nft.group_size: got 1"),
        ({"earliest": 0.6, "latest": 0.5}, "nft.earliest: got 0.6; expected less than nft.latest, 0.5"),
        ({"beta": 0.0}, "nft.beta: got 0.0"),
        ({"old_limit": 1.0}, "old_limit: got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        NftConfig(**values)


def test_levels_that_do_not_fit_are_refused(method):
    with pytest.raises(ValueError, match="nft.levels: got 5"):
        changed(method, levels=5)


def test_groups_of_equal_scores_can_be_kept_as_half_good(method):
    """One group of two has a spread: with it alone, or with the samples of the other group at r = 1/2."""
    start = method.sampler.prompt_indices(2, 0)[0]

    def one_group(latents, prompts=None, **_):
        return torch.stack([
            latent.mean() if prompt == f"prompt {start}" else torch.tensor(1.0)
            for latent, prompt in zip(latents, prompts, strict=True)
        ])  # fmt: skip

    left_out, kept = (with_reward(changed(method, keep_equal=keep), one_group) for keep in (False, True))
    assert left_out.batch_at(0).count == 6 and kept.batch_at(0).count == 12
    samples = kept.roll_out(0)
    assert samples.good[3:].tolist() == [0.5] * 3 and samples.good[:3].unique().numel() == 3
    assert samples.kept.all() and samples.statistics[3] == 0.5  # the share of groups of equal scores is still told
    all_equal = with_reward(changed(method, keep_equal=True), lambda latents, **_: torch.ones(len(latents)))
    assert all_equal.batch_at(0).count == 12
    assert gradient_of(all_equal, 0, 1).abs().max() < 1e-6  # at the sampling policy, half good pulls nowhere


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_without_a_kl_the_base_model_does_not_run(method, weight, monkeypatch):
    learner = changed(method, kl_beta=weight)
    forwards, metrics = step_and_count(learner, method.sampler.policy.transformer, monkeypatch)
    assert forwards == (3 if weight else 2) and ("kl" in metrics) == (weight > 0) and "moved" in metrics


def test_in_half_precision_the_old_policy_is_compared_in_the_same_batches():
    """Before the first update both policies are equal: no distance, whatever the sizes of the batches."""
    config = NftConfig(groups=2, group_size=3, levels=2, sample_batch=4, kl_beta=0.0)
    method = nft.Nft(half_sampler(accumulate=5), reward_of(brightness), config)
    for micro_step in range(5):
        assert method.step(method.batch_at(micro_step))[1]["moved"] == 0
