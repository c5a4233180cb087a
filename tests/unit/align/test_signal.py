"""Rollouts without a learning signal, in every method: the metric, the warning and the summary."""

import pytest
import torch
from tiny_align import brightness, half, make_sampler, reward_of, with_reward

from dinalrm_align.align.candidates import ranked_pairs
from dinalrm_align.align.dpo import OnlineDpo
from dinalrm_align.align.dpo_config import DpoConfig
from dinalrm_align.align.grpo import Grpo
from dinalrm_align.align.grpo_config import GrpoConfig
from dinalrm_align.align.lpo import Lpo
from dinalrm_align.align.lpo_config import LpoConfig
from dinalrm_align.align.nft import Nft
from dinalrm_align.align.nft_config import NftConfig
from dinalrm_align.align.refl import Refl
from dinalrm_align.align.refl_config import ReflConfig
from dinalrm_align.align.signal import PATIENCE, SignalCheck, equal_scores, has_spread, silent_rollouts
from dinalrm_align.train.metrics import MetricsLog

SMALL = dict(groups=2, group_size=3, reward_draws=1)


class Noisy(torch.nn.Module):
    """A reward for LPO that scores noisy latents by a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def score_noisy(self, latents, sigma, prompts):
        return self.function(latents)


def make(name: str, function):
    sampler = make_sampler()
    match name:
        case "grpo":
            return Grpo(sampler, reward_of(function), GrpoConfig(**SMALL, window_size=1, window_range=(0, 3)))
        case "nft":
            return Nft(sampler, reward_of(function), NftConfig(**SMALL))
        case "lpo":
            return Lpo(sampler, Noisy(function), LpoConfig(batch_size=2, candidates=3, steps=(0, 3), threshold=(0, 0)))
        case "dpo":
            return OnlineDpo(sampler, reward_of(function), DpoConfig(batch_size=2, group_size=3))
    return Refl(sampler, reward_of(function), ReflConfig(batch_size=2, kl_weight=1.0))


def row_of(method) -> dict[str, float]:
    batch = method.batch_at(0)
    loss, metrics = method.step(batch)
    (loss * batch.count).backward()
    return {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}


def large(latents):
    """Equal scores of a million, with the rounding noise of float32."""
    return 1e6 + 0.06 * torch.arange(len(latents)) % 3 + 0 * brightness(latents)


def small(latents):
    return 1e-9 * brightness(latents)


METHODS = ["refl", "grpo", "nft", "lpo", "dpo"]


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_reward_gives_no_signal_and_no_update(method):
    tried = make(method, half)
    assert row_of(tried)["signal"] == 0
    gradients = [p.grad for p in tried.sampler.policy.parameters.values() if p.grad is not None]
    assert all(gradient.abs().max() < 1e-9 for gradient in gradients)


@pytest.mark.parametrize("method", METHODS)
def test_scores_that_differ_by_rounding_alone_give_no_signal(method):
    tried = make(method, large)
    assert row_of(tried)["signal"] == 0
    assert method == "refl" or tried.batch_at(0).count == 0


@pytest.mark.parametrize("method", METHODS)
def test_small_scores_give_a_signal(method):
    tried = make(method, small)
    if method == "lpo":  # the margin depends on the temperature
        tried.config.temperature = 1e-12
    assert row_of(tried)["signal"] > 0


@pytest.mark.parametrize(
    ("scores", "spread"),
    [
        ([0.5, 0.5, 0.5], False),
        ([0.0, 0.0], False),
        ([-3.0, -3.0], False),
        ([1e6, 1e6 + 0.0625], False),
        ([-1e6, -1e6 - 0.125], False),
        ([1e6, 1e6 + 10], True),
        ([1e-9, 2e-9], True),
        ([0.0, 1e-30], True),
        ([-1e-9, 1e-9], True),
        ([20.0, 20.001], True),
        ([1e30, 1e30], False),
    ],
)
def test_the_threshold_is_relative_to_the_size_of_the_scores(scores, spread):
    assert has_spread(torch.tensor(scores, dtype=torch.float64)).item() is spread
    assert has_spread(torch.tensor([scores, scores], dtype=torch.float32)).tolist() == [spread, spread]


def test_prompts_without_spread_are_left_out_of_online_dpo_and_the_others_are_not():
    """Half of the prompts have a constant reward; the pairs of the others are those of the whole reward."""
    whole = make("dpo", brightness).batch_at(0)
    calls = []

    def first_only(latents):
        calls.append(len(latents))
        return torch.where(torch.arange(len(latents)) < 3, brightness(latents), torch.ones(len(latents)))

    method = make("dpo", first_only)
    batch = method.batch_at(0)
    assert calls == [6] and batch.count == 1 and batch.metrics["signal"] == 0.5
    assert torch.equal(batch.pairs.latents[batch.pairs.chosen], whole.pairs.latents[whole.pairs.chosen][:1])
    assert torch.equal(batch.noise, whole.noise[:, [0, 2]] if len(whole.noise[0]) == 4 else batch.noise)


def test_mined_candidates_that_differ_by_rounding_form_no_pair():
    assert ranked_pairs([1e6, 1e6 + 0.0625, 1e6], 1, 0.0) == []
    assert ranked_pairs([1e-9, 3e-9, 2e-9], 1, 0.0) == [(1, 0)]


# ---------------------------------------------------------------------------------------------- warning and summary


def watched(path, signals, **more) -> tuple[SignalCheck, list[str]]:
    said: list[str] = []
    check = SignalCheck("my:reward", equal_scores("grpo", 8), path, said.append)
    log = MetricsLog(path)
    for step, signal in enumerate(signals, start=1):
        row = {"signal": signal, "reward": 0.5} | {name: value(step) for name, value in more.items()}
        log.append({"step": step, **row})
        check(row)
    return check, said


def test_three_rollouts_without_signal_draw_one_warning_that_says_what_was_seen_and_what_to_try(tmp_path):
    check, said = watched(tmp_path / "metrics.jsonl", [0.0] * 9)
    assert len(said) == 1
    for word in ("3 rollouts", "my:reward", "mean score 0.5", "all 8 samples", "grpo.group_size", "Check the reward"):
        assert word in said[0]
    assert check.counts() == {"rollouts": 9, "rollouts_without_signal": 9}
    check.conclude()
    assert said[1].startswith("warning: the policy learned nothing from reward my:reward: 9 of 9 rollouts")


@pytest.mark.parametrize("signals", [[0.0, 0.0], [0.0, 0.0, 0.5, 0.0, 0.0], [1.0] * 5])
def test_fewer_in_a_row_draw_none(tmp_path, signals):
    check, said = watched(tmp_path / "metrics.jsonl", signals)
    assert said == [] and check.counts()["rollouts_without_signal"] == signals.count(0.0)
    check.conclude()
    assert bool(said) is (0.0 in signals)


def test_updates_of_one_rollout_count_once(tmp_path):
    rollouts = {"rollout": lambda step: (step - 1) // 4}
    assert watched(tmp_path / "a.jsonl", [0.0] * 4 * (PATIENCE - 1), **rollouts)[1] == []
    check, said = watched(tmp_path / "b.jsonl", [0.0] * 4 * PATIENCE, **rollouts)
    assert len(said) == 1 and check.counts() == {"rollouts": 3, "rollouts_without_signal": 3}


def test_rollouts_whose_gradient_is_zero_count_although_scores_differ(tmp_path):
    """As when all ratios of LPO or GRPO are clipped, for instance far from the base model."""
    check, said = watched(tmp_path / "a.jsonl", [1.0] * 4, grad_norm=lambda step: 0.0)
    assert len(said) == 1 and "gradient of every update is zero" in said[0] and "clip_range" in said[0]
    check.conclude()
    assert "learned nothing" in said[1] and "clip_range" in said[1] and "group_size" not in said[1]
    both = dict(rollout=lambda step: (step - 1) // 2, grad_norm=lambda step: float(step % 2))  # the first update learns
    check, said = watched(tmp_path / "b.jsonl", [1.0] * 8, **both)
    assert said == [] and check.counts() == {"rollouts": 4, "rollouts_without_signal": 0}


def test_a_resumed_run_counts_the_rollouts_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    watched(path, [0.0] * 2)
    said: list[str] = []
    log = MetricsLog(path, keep=path.stat().st_size)
    log.append({"step": 3, "signal": 0.0, "reward": 0.5})
    SignalCheck("r", "why", path, said.append)({"signal": 0.0, "reward": 0.5})
    assert len(said) == 1 and "mean score 0.5" in said[0]


def test_methods_without_the_metric_have_no_count(tmp_path):
    MetricsLog(tmp_path / "metrics.jsonl").append({"step": 1, "loss": 0.1})
    said: list[str] = []
    check = SignalCheck("r", "why", tmp_path / "metrics.jsonl", said.append)
    check.conclude()
    assert check.counts() == {} and said == []
    assert silent_rollouts([{"step": 0, "gold": 1.0}]) == []


def test_a_method_of_equal_scores_says_so_in_its_own_words():
    for name, word in (("grpo", "grpo.group_size"), ("nft", "nft.group_size"), ("dpo", "dpo.group_size"),
                       ("lpo", "lpo.threshold"), ("refl", "refl.target")):  # fmt: skip
        assert word in make(name, brightness).no_signal
    assert with_reward(make("nft", brightness), half).no_signal == make("nft", half).no_signal
