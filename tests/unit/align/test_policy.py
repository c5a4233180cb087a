"""The policy: starts as the reference, trains only its LoRA, restores it exactly, and exports it."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from dinalrm_align.align.lora import LORA_FILE
from dinalrm_align.align.policy import Policy
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.shapes.stack import StackConfig, build_pipeline

LATENTS = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))


def conditions(seed: int = 2) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    return Conditions(["a", "b"], torch.randn(2, 5, 32, generator=generator), torch.randn(2, 32, generator=generator))


@pytest.fixture
def pipeline() -> StableDiffusion3Pipeline:
    return build_pipeline(StackConfig.tiny(), seed=0)


@pytest.fixture
def policy(pipeline: StableDiffusion3Pipeline) -> Policy:
    return Policy(pipeline.transformer, LoraConfig(rank=4, alpha=8), seed=0)


def perturb(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)


def test_a_new_policy_is_the_base_model(pipeline):
    with torch.no_grad():
        c = conditions()
        (expected,) = pipeline.transformer(
            LATENTS, c.prompt_embeds, c.pooled_prompt_embeds, torch.full((2,), 400.0), return_dict=False
        )
        policy = Policy(pipeline.transformer, LoraConfig(rank=4, alpha=8), seed=0)
        assert torch.equal(policy.velocity(LATENTS, 0.4, c), expected)


def test_only_the_lora_of_the_eight_projections_trains_and_in_float32():
    transformer = build_pipeline(StackConfig.tiny(), seed=0).transformer.to(torch.bfloat16)
    policy = Policy(transformer, LoraConfig(rank=4, alpha=8), seed=0)
    policy.velocity(LATENTS, 0.4, conditions()).square().mean().backward()
    layers = {name.rsplit(".lora_", 1)[0] for name in policy.parameters}
    # 4 blocks of 8 projections, less to_add_out of the last, plus attn2's four in the two dual blocks
    assert len(layers) == 4 * 8 - 1 + 2 * 4
    assert all(p.dtype == torch.float32 for p in policy.parameters.values())
    trained = {name for name, p in transformer.named_parameters() if p.grad is not None}
    assert trained and all(".lora_" in name for name in trained)


def test_initial_lora_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    policies = [
        Policy(build_pipeline(StackConfig.tiny(), 0).transformer, LoraConfig(rank=4), seed=s) for s in (1, 1, 2)
    ]
    assert torch.equal(torch.get_rng_state(), expected)
    first, same, other = ([p.detach() for n, p in policy.parameters.items() if "lora_A" in n] for policy in policies)
    assert all(map(torch.equal, first, same))
    assert not any(map(torch.equal, first, other))
    assert torch.cat([p.flatten() for p in first]).std().item() == pytest.approx(1 / 4, rel=0.1)  # gaussian, 1 / rank


def test_the_reference_is_the_base_model_and_restores_the_policy(policy):
    base = policy.velocity(LATENTS, 0.4, conditions()).detach()
    perturb(policy)
    trained = policy.velocity(LATENTS, 0.4, conditions())
    frozen_b = [p for name, p in policy.parameters.items() if "lora_B" in name][0].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in policy.transformer.named_parameters()}
    with policy.reference():
        reference = policy.velocity(LATENTS, 0.4, conditions())
    assert torch.equal(reference, base) and not reference.requires_grad
    assert {name: p.requires_grad for name, p in policy.transformer.named_parameters()} == flags
    assert torch.equal(policy.velocity(LATENTS, 0.4, conditions()), trained)
    assert not torch.allclose(trained, base)
    assert not frozen_b.requires_grad


def test_the_policy_is_restored_after_an_error(policy):
    perturb(policy)
    trained = policy.velocity(LATENTS, 0.4, conditions())
    with pytest.raises(RuntimeError, match="inside"), policy.reference():
        raise RuntimeError("inside")
    assert torch.equal(policy.velocity(LATENTS, 0.4, conditions()), trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_a_reference_pass_or_on_checkpointing(policy, checkpointing):
    perturb(policy)
    policy.velocity(LATENTS, 0.4, conditions()).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in policy.parameters.items()}
    policy.transformer.zero_grad()
    if checkpointing:
        policy.transformer.enable_gradient_checkpointing()
    loss = policy.velocity(LATENTS, 0.4, conditions()).square().mean()
    with policy.reference():
        policy.velocity(LATENTS, 0.4, conditions())
    loss.backward()
    for name, p in policy.parameters.items():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=0)


def test_guidance_is_the_extrapolation_of_two_passes(policy):
    with torch.no_grad():
        positive = policy.velocity(LATENTS, 0.4, conditions(2))
        negative = policy.velocity(LATENTS, 0.4, conditions(3))
        guided = policy.velocity(LATENTS, 0.4, conditions(2), 2.5, conditions(3))
    torch.testing.assert_close(guided, negative + 2.5 * (positive - negative), rtol=1e-4, atol=1e-5)


def test_sigma_may_differ_within_a_batch(policy):
    with torch.no_grad():
        both = policy.velocity(LATENTS, torch.tensor([0.2, 0.8]), conditions())
        first = policy.velocity(LATENTS, 0.2, conditions())
    torch.testing.assert_close(both[0], first[0], rtol=1e-5, atol=1e-6)


def test_the_exported_lora_gives_identical_outputs_in_the_pipeline(policy, tmp_path):
    perturb(policy)
    policy.save_lora(tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == [LORA_FILE]
    fresh = build_pipeline(StackConfig.tiny(), seed=0)
    fresh.load_lora_weights(tmp_path / "lora")
    c = conditions()
    with torch.no_grad():
        (got,) = fresh.transformer(
            LATENTS, c.prompt_embeds, c.pooled_prompt_embeds, torch.full((2,), 400.0), return_dict=False
        )
        assert torch.equal(got, policy.velocity(LATENTS, 0.4, c))


def test_a_policy_reads_its_lora_back_strictly(policy, tmp_path):
    perturb(policy)
    policy.save_lora(tmp_path)
    other = Policy(build_pipeline(StackConfig.tiny(), seed=0).transformer, LoraConfig(rank=4, alpha=8), seed=9)
    other.load_lora(tmp_path)
    assert all(torch.equal(p, other.parameters[name]) for name, p in policy.parameters.items())
    assert all(p.requires_grad for p in other.parameters.values())
    shallow = Policy(build_pipeline(StackConfig.tiny(depth=3), seed=0).transformer, LoraConfig(rank=4, alpha=8), seed=0)
    with pytest.raises(ValueError, match="pytorch_lora_weights.safetensors"):
        shallow.load_lora(tmp_path)


def test_numbers_that_do_not_match_raise(policy):
    with pytest.raises(ValueError, match="conditions: got 2 for 1 latents"):
        policy.velocity(LATENTS[:1], 0.4, conditions())
    with pytest.raises(ValueError, match="negative: got none at guidance_scale 3"):
        policy.velocity(LATENTS, 0.4, conditions(), 3.0)
    with pytest.raises(ValueError, match="got 1 prompts, 2 prompt_embeds"):
        Conditions(["a"], torch.zeros(2, 5, 32), torch.zeros(2, 32))
