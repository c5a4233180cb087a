"""The parts of an update in examples/evidence/gpu_model.py, by hand, for the recipes' settings for SD3.5 Medium."""

import pytest
from paths import ROOT, load_evidence

from dinalrm_align.align.resolve import settings_files
from dinalrm_align.align.savings.cost import Cost
from dinalrm_align.train.command import parse

gpu_model = load_evidence("gpu_model")


def parts(name: str, **variant: object) -> dict[tuple[str, str, int], float]:
    """{(phase, kind of work, rows): times per update}, without evaluations."""
    files = settings_files(ROOT / "recipes" / f"{name}_sd35.py", "sd35", "dinalrm")
    run, _ = parse(gpu_model.RUNS[name], "", [], files)
    update = gpu_model.Update(name, run, gpu_model.Variant(**variant), 512)
    return {(p.phase, p.work.kind, p.work.batch): p.times for p in update if p.phase != "evaluations"}


def test_updates_by_hand():
    """ReFL: 16 micro-batches of 4, each 34.5 guided steps; LPO: an update is 1/19 of a rollout of 4 x 20 guided steps.

    GRPO: 144 samples in batches of 9 for two updates; NFT: 1152 in batches of 12, then 864 micro-batches of 12.
    """
    assert parts("refl") == {
        ("rollout", "policy_forward", 8): 16 * 34.5,
        ("gradient", "policy_gradient", 4): 16,
        ("gradient", "gradient", 4): 16,
    }
    assert parts("grpo")["rollout", "policy_forward", 9] == 16 * 10 / 2
    # the reference and, for every second update, old log-probabilities
    assert parts("grpo")["other forwards", "policy_forward", 9] == 24 * (1 + 1 / 2)
    assert parts("lpo")["rollout", "policy_forward", 8] == pytest.approx(20 / 19)
    assert parts("lpo")["gradient", "policy_gradient", 8] == parts("lpo")["other forwards", "policy_forward", 8] == 1
    assert parts("nft")["rollout", "policy_forward", 12] == 96 * 10
    assert parts("nft")["other forwards", "policy_forward", 12] == 2 * 864
    assert parts("dpo", draws_at_once=1)["gradient", "policy_gradient", 2] == 8 * 39
    assert parts("dpo")["gradient", "policy_gradient", 26] == 8 * 3
    assert parts("dpo")["rollout", "policy_forward", 16] == 8 * 3 * 40


def test_options_of_refls_rollout_by_hand():
    """Of two different steps from 30 to 39 the later one is 36.33 on average, and half of the rollouts remain."""
    assert parts("refl", sample_batch=64)["rollout", "policy_forward", 128] == 34.5
    assert parts("refl", steps_per_rollout=2)["rollout", "policy_forward", 8] == pytest.approx(8 * (29 + 22 / 3))


def test_costs_between_counted_batches_are_interpolated(monkeypatch):
    monkeypatch.setattr(gpu_model.Work, "count", lambda work: Cost(*[work.batch] * 7, kernels=100))
    costs = gpu_model.Costs(gpu_model.tqdm(disable=True))
    for batch in (2, 5, 8, 20, 128):
        cost = costs(gpu_model.Work("policy_forward", batch))
        assert (cost.f2, cost.kernels) == (pytest.approx(batch), 100)
    assert {work.batch for work in costs.counted} == {2, 8, 32}
