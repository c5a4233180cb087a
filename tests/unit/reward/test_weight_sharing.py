"""Sharing the policy's weights is exact and leaves the policy alone: adapters, checkpointing, threads, refusals."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig
from tiny_reward import make_inputs

from dinalrm_align import LatentReward


@pytest.fixture
def policy(tiny_pipeline):
    """A frozen transformer of its own to each test."""
    return copy.deepcopy(tiny_pipeline.transformer)


def add_policy_lora(transformer, seed=3):
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "to_add_out"]), "policy")
    generator = torch.Generator().manual_seed(seed)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def load(folder, transformer, **options):
    return LatentReward.from_pretrained(folder, transformer=transformer, **options)


def gradient(reward, inputs):
    """Score and its gradient at the latents."""
    latents = inputs["latents"].clone().requires_grad_()
    score = reward(**{**inputs, "latents": latents})
    score.sum().backward()
    return score.detach(), latents.grad


def velocity(transformer, inputs):
    timestep = torch.full((len(inputs["latents"]),), 500.0)
    arguments = (inputs["latents"], inputs["prompt_embeds"], inputs["pooled_prompt_embeds"], timestep)
    return transformer(*arguments, return_dict=False)[0]


@pytest.fixture
def expected(tiny_reward_dir, tiny_world, tiny_inputs):
    """Score and gradient of a reward that has a transformer for itself."""
    return gradient(LatentReward.from_pretrained(tiny_reward_dir), tiny_inputs)


def assert_equal(got, expected, tolerance=1e-6):
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=tolerance)


def test_every_base_parameter_and_buffer_is_the_policys_own(tiny_reward_dir, policy):
    reward = load(tiny_reward_dir, policy)
    base = dict(policy.named_parameters()) | dict(policy.named_buffers())
    mine = dict(reward.model.trunk.named_parameters()) | dict(reward.model.trunk.named_buffers())
    shared = {name.replace(".base_layer", ""): tensor for name, tensor in mine.items() if ".lora_" not in name}
    assert len(shared) > 50 and set(shared) <= set(base)
    assert all(tensor.data_ptr() == base[name].data_ptr() and tensor is base[name] for name, tensor in shared.items())


def test_private_weights_are_no_ones_else(tiny_reward_dir, policy, tiny_inputs, expected):
    reward = load(tiny_reward_dir, policy, share_weights=False)
    theirs = {tensor.data_ptr() for tensor in (*policy.parameters(), *policy.buffers())}
    assert theirs.isdisjoint(tensor.data_ptr() for tensor in (*reward.parameters(), *reward.buffers()))
    assert_equal(gradient(reward, tiny_inputs), expected)


@pytest.mark.parametrize("share_weights", [True, False], ids=["shared", "private"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("sigma", [0.4, (0.2, 0.5)], ids=["single", "ensemble"])
def test_checkpointing_changes_no_gradient(tiny_reward_dir, policy, tiny_inputs, share_weights, use_reentrant, sigma):
    reward, ran = load(tiny_reward_dir, policy, share_weights=share_weights), []
    for index, block in enumerate(reward.model.trunk.transformer_blocks):
        block.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    plain = gradient(reward, {**tiny_inputs, "sigma": sigma})
    assert ran == [0, 1, 2]
    reward.enable_gradient_checkpointing(use_reentrant=use_reentrant)
    assert_equal(gradient(reward, {**tiny_inputs, "sigma": sigma}), plain, tolerance=1e-8)
    assert ran[3:] == [0, 1, 2, 2, 1, 0], "the backward pass runs every block again"
    reward.disable_gradient_checkpointing()
    gradient(reward, {**tiny_inputs, "sigma": sigma})
    assert ran[9:] == [0, 1, 2]


@pytest.mark.parametrize("state", ["active", "disabled", "training"])
def test_the_policys_lora_does_not_matter(tiny_reward_dir, policy, tiny_inputs, expected, state):
    add_policy_lora(policy)
    if state == "disabled":
        policy.disable_adapters()
    policy.train(state == "training")
    assert_equal(gradient(load(tiny_reward_dir, policy), tiny_inputs), expected)
    assert_equal(gradient(load(tiny_reward_dir, policy, share_weights=False), tiny_inputs), expected)


def test_lora_added_after_the_reward_was_built_does_not_matter(tiny_reward_dir, policy, tiny_inputs, expected):
    reward = load(tiny_reward_dir, policy)
    add_policy_lora(policy)
    assert_equal(gradient(reward, tiny_inputs), expected)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("share_weights", [True, False], ids=["shared", "private"])
def test_a_policy_trained_through_the_reward_gets_the_right_gradients(
    tiny_reward_dir, policy, tiny_inputs, use_reentrant, share_weights
):
    """x0 = x - sigma * policy(x), scored, back to the policy's LoRA: both checkpointed, against neither, unshared."""

    def policy_gradients(transformer, reward):
        latents = tiny_inputs["latents"].clone().requires_grad_()
        denoised = latents - 0.5 * velocity(transformer, {**tiny_inputs, "latents": latents})
        reward(**{**tiny_inputs, "latents": denoised}).sum().backward()
        return [parameter.grad.clone() for parameter in transformer.parameters() if parameter.requires_grad]

    reference = copy.deepcopy(policy)
    add_policy_lora(reference)
    alone = policy_gradients(reference, LatentReward.from_pretrained(tiny_reward_dir))
    add_policy_lora(policy)
    reward = load(tiny_reward_dir, policy, share_weights=share_weights)
    policy.enable_gradient_checkpointing(
        lambda block, *args: torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=use_reentrant)
    )
    reward.enable_gradient_checkpointing(use_reentrant=use_reentrant)
    together = policy_gradients(policy, reward)
    assert len(together) == len(alone) > 10 and all(grad.abs().max() > 0 for grad in together[1::2])
    assert_equal(together, alone)


def test_scoring_leaves_the_policy_bit_identical(tiny_reward_dir, policy, tiny_inputs):
    add_policy_lora(policy)
    flags = {name: parameter.requires_grad for name, parameter in policy.named_parameters()}
    before = velocity(policy, tiny_inputs).detach()
    reward = load(tiny_reward_dir, policy)
    gradient(reward, tiny_inputs)
    reward.train()
    assert not any(module.training for module in reward.modules())
    assert torch.equal(velocity(policy, tiny_inputs).detach(), before)
    assert {name: parameter.requires_grad for name, parameter in policy.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_reward_parameters_never_get_a_gradient(tiny_reward_dir, policy, tiny_inputs):
    reward = load(tiny_reward_dir, policy)
    _, at_latents = gradient(reward, tiny_inputs)
    assert at_latents.abs().max() > 0
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in reward.parameters())


def test_policy_and_reward_in_two_threads(tiny_reward_dir, policy, tiny_inputs):
    add_policy_lora(policy)
    reward = load(tiny_reward_dir, policy)
    inputs = [make_inputs(policy, height=8, width=8, seed=seed) for seed in range(4)]
    one_by_one = [(velocity(policy, x).detach(), *gradient(reward, x)) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        velocities = [pool.submit(velocity, policy, x) for x in inputs * 3]
        gradients = [pool.submit(gradient, reward, x) for x in inputs * 3]
        at_once = [(v.result().detach(), *g.result()) for v, g in zip(velocities, gradients, strict=True)]
    for got, expected in zip(at_once, one_by_one * 3, strict=True):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_trained_weights_are_not_shared(tiny_reward_dir, policy):
    policy.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"requires_grad: got True.*transformer.requires_grad_\(False\).*share_weights=False"
    ):
        load(tiny_reward_dir, policy)
    assert all(parameter.requires_grad for parameter in policy.parameters())
    reward = load(tiny_reward_dir, policy, share_weights=False)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


def test_weights_that_start_to_be_trained_later_are_noticed_when_scoring(tiny_reward_dir, policy, tiny_inputs):
    reward = load(tiny_reward_dir, policy)
    policy.transformer_blocks[1].attn.to_q.requires_grad_(True)
    with pytest.raises(ValueError, match="requires_grad: got True for 2 of"):
        reward(**tiny_inputs)


def test_a_policy_with_merged_adapters_is_refused(tiny_reward_dir, policy):
    add_policy_lora(policy)
    policy.fuse_lora()
    with pytest.raises(ValueError, match=r"merged adapters: got \['policy'\].*unfuse_lora"):
        load(tiny_reward_dir, policy)


def test_adapters_that_are_merged_later_are_noticed_when_scoring(tiny_reward_dir, policy, tiny_inputs):
    reward = load(tiny_reward_dir, policy)
    before = reward(**tiny_inputs)
    add_policy_lora(policy)
    policy.fuse_lora()
    with pytest.raises(ValueError, match=r"merged adapters: got \['policy'\].*unfuse_lora"):
        reward(**tiny_inputs)
    policy.unfuse_lora()
    torch.testing.assert_close(reward(**tiny_inputs), before)


def test_a_policy_with_fused_projections_is_refused(tiny_reward_dir, policy):
    policy.fuse_qkv_projections()
    with pytest.raises(ValueError, match="projections are fused; call unfuse_qkv_projections"):
        load(tiny_reward_dir, policy)


def test_a_sharing_reward_is_not_moved_or_cast_by_itself(tiny_reward_dir, policy, tiny_inputs):
    reward = load(tiny_reward_dir, policy)
    for change in (lambda: reward.to(torch.float64), lambda: reward.to("meta"), reward.half):
        with pytest.raises(RuntimeError, match="cannot be moved or cast separately"):
            change()
    assert policy.dtype == torch.float32
    reward.to("cpu").float()
    assert reward(**tiny_inputs).shape == (2,)


def test_a_private_reward_may_be_cast(tiny_reward_dir, policy, tiny_inputs, expected):
    reward = load(tiny_reward_dir, policy, share_weights=False).to(torch.float64)
    assert policy.dtype == torch.float32
    torch.testing.assert_close(reward(**tiny_inputs).float(), expected[0], rtol=1e-4, atol=1e-4)


def test_a_bfloat16_policy_with_float32_lora_is_shared_as_bfloat16(tiny_reward_dir, policy, tiny_inputs, expected):
    add_policy_lora(policy.to(torch.bfloat16))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    reward = load(tiny_reward_dir, policy, dtype=torch.bfloat16)
    assert reward.model.trunk.dtype == torch.bfloat16
    torch.testing.assert_close(reward(**tiny_inputs), expected[0], rtol=0.1, atol=0.2)


def test_sharing_at_another_dtype_is_refused(tiny_reward_dir, policy):
    with pytest.raises(ValueError, match="on cpu in torch.float32, but cpu in torch.bfloat16 was asked for"):
        load(tiny_reward_dir, policy, dtype=torch.bfloat16)


# ----------------------------------------------------------------------------- weights that change under a reward


def without_grad(change):
    """The change, made as users make it: in place, without gradient."""

    def made(weight):
        with torch.no_grad():
            change(weight)

    return made


CHANGES = {
    "a factor": without_grad(lambda w: w.mul_(1.01)),
    "a sign": without_grad(lambda w: w.neg_()),
    "data": lambda w: w.data.add_(0.01),
    "zeros": without_grad(lambda w: w.zero_()),
    "other data": lambda w: setattr(w, "data", torch.ones_like(w)),
    "copied": without_grad(lambda w: w.copy_(w.flip(0))),
    "NaN": lambda w: w.data.fill_(torch.nan),
    "one column": lambda w: w.data[:, 5].add_(0.1),
    "one row": lambda w: w.data[3].add_(0.1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_change_later_are_noticed_when_scoring(tiny_reward_dir, policy, tiny_inputs, name):
    reward = load(tiny_reward_dir, policy)
    before = reward(**tiny_inputs)
    weight = policy.transformer_blocks[1].attn.to_q.weight
    kept = weight.data.clone()
    CHANGES[name](weight)
    with pytest.raises(ValueError, match=r"transformer_blocks.1.attn.to_q.weight \(and 0 more\): got other values"):
        reward(**tiny_inputs)
    weight.data = kept
    torch.testing.assert_close(reward(**tiny_inputs), before)


def small_lora(transformer):
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "add_v_proj"]), "policy")
    for name, parameter in transformer.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data = torch.full_like(parameter, 0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_lora_fused_and_unloaded_is_noticed_and_one_fused_and_unfused_is_not(
    tiny_reward_dir, policy, tiny_inputs, dtype
):
    policy = policy.to(dtype)
    reward = load(tiny_reward_dir, policy)
    if dtype != torch.float32:
        reward = LatentReward.from_pretrained(tiny_reward_dir, transformer=policy, dtype=dtype)
    reward(**tiny_inputs)
    small_lora(policy)
    reward(**tiny_inputs)
    policy.fuse_lora()
    policy.unfuse_lora()
    reward(**tiny_inputs)
    policy.fuse_lora()
    policy.unload_lora()
    with pytest.raises(ValueError, match="transformer_blocks.0.attn.to_q.weight .*unfuse a LoRA before unloading it"):
        reward(**tiny_inputs)


def test_every_way_to_score_notices(tiny_reward_dir, tiny_pipeline, tiny_inputs):
    pipeline = copy.deepcopy(tiny_pipeline)
    reward = LatentReward.from_pretrained(tiny_reward_dir, pipeline=pipeline)
    pipeline.transformer.load_state_dict({k: 1.1 * v for k, v in pipeline.transformer.state_dict().items()})
    latents = tiny_inputs["latents"]
    for score in (
        lambda: reward(latents, ["a", "b"]),
        lambda: reward.raw(latents, ["a", "b"]),
        lambda: reward.score_noisy(latents, 0.4, ["a", "b"]),
        lambda: reward.score_images(torch.rand(1, 3, 64, 64), ["a"]),
    ):
        with pytest.raises(ValueError, match=r"\(and \d+ more\): got other values than when the reward was built"):
            score()


def test_equal_weights_loaded_again_and_private_ones_are_no_change(tiny_reward_dir, policy, tiny_inputs):
    shared, private = load(tiny_reward_dir, policy), load(tiny_reward_dir, policy, share_weights=False)
    expected = shared(**tiny_inputs)
    policy.load_state_dict({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    torch.testing.assert_close(shared(**tiny_inputs), expected)
    policy.transformer_blocks[1].attn.to_q.weight.data.zero_()
    torch.testing.assert_close(private(**tiny_inputs), expected, rtol=1e-4, atol=1e-5)
    policy.proj_out.weight.data.zero_()  # read by the policy alone


def test_a_policy_in_training_does_not_change_what_is_shared(tiny_reward_dir, policy, tiny_inputs):
    reward = load(tiny_reward_dir, policy)
    before = reward(**tiny_inputs)
    add_policy_lora(policy)
    velocity(policy, tiny_inputs).sum().backward()
    torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1).step()
    torch.testing.assert_close(reward(**tiny_inputs), before)


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("hooks", ["layerwise casting", "group offloading"])
def test_a_transformer_with_diffusers_hooks_is_refused(tiny_pipeline, tiny_reward_dir, hooks, share_weights):
    transformer = copy.deepcopy(tiny_pipeline.transformer)
    if hooks == "layerwise casting":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    else:
        transformer.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="the transformer has diffusers' hooks .* pass transformer=FOLDER"):
        LatentReward.from_pretrained(tiny_reward_dir, transformer=transformer, share_weights=share_weights)
