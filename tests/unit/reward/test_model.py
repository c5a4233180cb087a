"""RewardModel: noise levels, ensembles in one backbone pass, precision, trainable parameters, seeds."""

import pytest
import torch
from tiny_reward import make_inputs, shake, tiny_reward_config

from dinalrm_align.flow.noise import scheduler_sigmas, snap_sigma
from dinalrm_align.reward.model import build_reward_model, noise_levels


@pytest.fixture
def build(tiny_pipeline):
    def make(seed=1, share_weights=True, **changes):
        config = tiny_reward_config(**changes)
        model = build_reward_model(config, tiny_pipeline.transformer, share_weights=share_weights, seed=seed)
        shake(model, seed=2)
        return model

    return make


def test_noise_levels_take_every_documented_form():
    cpu = torch.device("cpu")
    assert noise_levels(0.5, 2, cpu).tolist() == [[0.5, 0.5]]
    assert noise_levels([0.25, 0.5], 2, cpu).tolist() == [[0.25, 0.25], [0.5, 0.5]]
    per_sample = torch.tensor([0.25, 0.75])
    assert noise_levels(per_sample, 2, cpu).tolist() == [[0.25, 0.75]]
    assert noise_levels([per_sample, 0.5], 2, cpu).tolist() == [[0.25, 0.75], [0.5, 0.5]]
    assert noise_levels(torch.stack([per_sample, per_sample]), 2, cpu).shape == (2, 2)
    with pytest.raises(ValueError, match=r"sigma: got shape \(3,\) for 2 latents"):
        noise_levels(torch.zeros(3), 2, cpu)


def test_one_level_per_sample_equals_each_alone(build, tiny_inputs):
    model = build()
    both = model(**tiny_inputs, sigma=torch.tensor([0.2, 0.6]))
    alone = [model(**{k: v[i : i + 1] for k, v in tiny_inputs.items()}, sigma=s) for i, s in enumerate((0.2, 0.6))]
    torch.testing.assert_close(both, torch.cat(alone))


@pytest.mark.parametrize("ensemble", ["tokens", "average"])
def test_all_levels_go_through_the_backbone_at_once(build, tiny_inputs, ensemble):
    model = build(ensemble=ensemble)
    batches = []
    model.trunk.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    model(**tiny_inputs, sigma=(0.2, 0.5, 0.7))
    assert batches == [6]


def test_token_ensemble_equals_separate_passes_joined_in_the_head(build, tiny_inputs):
    model = build()
    seen = []
    handle = model.trunk.register_forward_hook(lambda *args: seen.append(args[-1]))
    for sigma in (0.2, 0.7):
        model(**tiny_inputs, sigma=sigma)
    handle.remove()
    torch.testing.assert_close(model(**tiny_inputs, sigma=(0.2, 0.7)), model.head(seen))


def test_average_ensemble_is_the_mean_of_the_levels_scores(build, tiny_inputs):
    model = build(ensemble="average")
    mean = sum(model(**tiny_inputs, sigma=sigma) for sigma in (0.2, 0.7)) / 2
    torch.testing.assert_close(model(**tiny_inputs, sigma=(0.2, 0.7)), mean)


def test_average_over_noise_draws(build, tiny_inputs):
    model = build(ensemble="average")
    draws = torch.stack([tiny_inputs.pop("noise"), torch.ones_like(tiny_inputs["latents"])])
    mean = sum(model(**tiny_inputs, noise=noise, sigma=0.5) for noise in draws) / 2
    torch.testing.assert_close(model(**tiny_inputs, noise=draws, sigma=(0.5, 0.5)), mean)


def test_snapping_rounds_to_the_scheduler_table(build, tiny_inputs):
    plain, snapped = build(), build(snap_sigma=True)
    nearest = snap_sigma(torch.tensor(0.4), scheduler_sigmas()).item()
    assert nearest != pytest.approx(0.4, abs=1e-5)
    torch.testing.assert_close(snapped(**tiny_inputs, sigma=0.4), plain(**tiny_inputs, sigma=nearest))


def test_without_noising_the_backbone_sees_clean_latents_at_the_levels_timestep(build, tiny_inputs):
    model = build(add_noise=False)
    seen = []
    model.trunk.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    model(**tiny_inputs, sigma=0.3)
    assert torch.equal(seen[0][0], tiny_inputs["latents"])
    torch.testing.assert_close(seen[0][1], torch.tensor([300.0, 300.0]))


def test_noising_and_timesteps_are_float32_in_a_bfloat16_model(build, tiny_inputs):
    model = build(share_weights=False)
    exact = model(**tiny_inputs, sigma=0.85714)
    model.freeze(dtype=torch.bfloat16)
    seen = []
    model.trunk.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[:2]))
    rough = model(**tiny_inputs, sigma=0.85714)
    assert [tensor.dtype for tensor in seen[0]] == [torch.float32, torch.float32]
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)


def test_lora_and_head_train_and_nothing_else(build, tiny_inputs, tiny_pipeline):
    model = build()
    model(**tiny_inputs, sigma=0.4).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("head.") for name in trained)
    assert all(parameter.grad is None for parameter in tiny_pipeline.transformer.parameters())


def test_tuning_none_trains_the_head_alone(build):
    model = build(tuning="none")
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"head"}


def test_tuning_full_trains_a_private_trunk(build, tiny_pipeline):
    model = build(tuning="full", share_weights=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    theirs = {parameter.data_ptr() for parameter in tiny_pipeline.transformer.parameters()}
    assert theirs.isdisjoint(parameter.data_ptr() for parameter in model.parameters())
    with pytest.raises(ValueError, match="share_weights: got True; expected False"):
        build(tuning="full")


def test_initialisation_depends_on_the_seed_alone(build):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(seed=3).tuned_tensors()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, third = build(seed=3).tuned_tensors(), build(seed=4).tuned_tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.query_tokens"], third["head.query_tokens"])


def test_fresh_lora_changes_no_feature(tiny_pipeline, tiny_inputs):
    """B starts at zero."""
    models = [
        build_reward_model(tiny_reward_config(tuning=tuning), tiny_pipeline.transformer) for tuning in ("lora", "none")
    ]
    arguments = (tiny_inputs["latents"], torch.full((2,), 400.0), *list(tiny_inputs.values())[2:])
    torch.testing.assert_close(models[0].trunk(*arguments).visual[-1], models[1].trunk(*arguments).visual[-1])


def test_merged_lora_equals_unmerged(build, tiny_inputs):
    model = build(share_weights=False)
    expected = model(**tiny_inputs, sigma=0.4)
    stored = {name: tensor.detach().clone() for name, tensor in model.tuned_tensors().items()}
    model.freeze(merge=True)
    torch.testing.assert_close(model(**tiny_inputs, sigma=0.4), expected)
    assert model.trunk.lora_parameters() == {}
    kept = model.tuned_tensors()
    assert kept.keys() == stored.keys() and all(torch.equal(kept[name], stored[name]) for name in stored)


def test_a_frozen_full_trunk_skips_the_text_half_that_nobody_reads_and_is_saved_whole(build, tiny_inputs):
    model = build(tuning="full", share_weights=False, text_taps=(0, 2))
    expected, names = model(**tiny_inputs, sigma=0.4), model.tuned_tensors().keys()
    assert "backbone.transformer_blocks.2.ff_context.net.2.weight" in names
    model.freeze()
    assert model.trunk.transformer_blocks[2].ff_context is None
    torch.testing.assert_close(model(**tiny_inputs, sigma=0.4), expected)
    assert model.tuned_tensors().keys() == names


def test_shared_weights_are_not_merged_into(build):
    with pytest.raises(ValueError, match="would change the shared transformer"):
        build().trunk.merge_lora()


def test_non_square_latents_and_any_text_length(build, tiny_pipeline):
    model = build()
    for sizes in (dict(height=4, width=30, tokens=1), dict(height=48, width=2, tokens=40)):
        inputs = make_inputs(tiny_pipeline.transformer, batch=1, **sizes)
        assert model(**inputs, sigma=0.4).shape == (1,)
