"""A half-precision policy runs with shadows of its float32 LoRA: gradients, freshness, cost."""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode

from dinalrm_align.align import policy as policies
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.shadow import cast_all
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.shapes.stack import StackConfig, build_pipeline
from dinalrm_align.train.state import Ema

EPS = torch.finfo(torch.bfloat16).eps


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LATENTS = normal(2, 16, 16, 16, seed=1)
CONDITIONS = Conditions(["a", "b"], normal(2, 5, 32, seed=2), normal(2, 32, seed=3))


def make_policy(dtype: torch.dtype = torch.bfloat16, depth: int = 4) -> Policy:
    """A policy away from the reference; its base weights are representable in bfloat16."""
    transformer = build_pipeline(StackConfig.tiny(depth=depth), seed=0).transformer.to(torch.bfloat16).to(dtype)
    policy = Policy(transformer, LoraConfig(rank=4, alpha=8), seed=0)
    perturb(policy)
    return policy


@torch.no_grad()
def perturb(policy: Policy, seed: int = 4) -> None:
    for number, p in enumerate(policy.parameters.values()):
        p.add_(normal(*p.shape, seed=100 * seed + number), alpha=0.1)


def velocity(policy: Policy) -> torch.Tensor:
    return policy.velocity(LATENTS, 0.4, CONDITIONS)


def loss_of(policy: Policy) -> torch.Tensor:
    return (velocity(policy) * normal(*LATENTS.shape, seed=5)).mean()


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.transformer.zero_grad()
    loss_of(policy).backward()
    return {name: p.grad.clone() for name, p in policy.parameters.items()}


@pytest.fixture
def policy() -> Policy:
    return make_policy()


def test_gradients_are_those_of_a_float32_lora_within_bfloat16s_error(monkeypatch):
    """Against a float32 model, a bfloat16 base with a float32 LoRA is off by 2.7 eps of each gradient's norm (median).

    Shadows round as many products again, so that their error may be half as much more; each gradient's direction stays.
    """
    exact, shadowed = gradients(make_policy(torch.float32)), gradients(make_policy())
    monkeypatch.setattr(policies, "Shadows", lambda *given: None)
    full = gradients(make_policy())
    names = [name for name in exact if exact[name].norm() > 0]
    errors, usual = (
        torch.stack([(got[name] - exact[name]).norm() / exact[name].norm() for name in names])
        for got in (shadowed, full)
    )
    assert errors.median() < 1.5 * usual.median() < 5 * EPS and errors.max() < 20 * EPS
    assert all(cosine_similarity(shadowed[n].flatten(), full[n].flatten(), dim=0) > 1 - 20 * EPS**2 for n in names)
    assert all(gradient.dtype == torch.float32 for gradient in shadowed.values())


def test_gradients_of_many_micro_steps_add_up_in_float32():
    """A bfloat16 sum of equal terms loses more than 0.3 % of 24 terms; from 256 on it stays where it is."""
    policy, count = make_policy(depth=2), 24
    one = gradients(policy)
    for _ in range(count - 1):
        loss_of(policy).backward()
    for name, p in policy.parameters.items():
        torch.testing.assert_close(p.grad, count * one[name], rtol=1e-5, atol=0)
        rounded = torch.zeros_like(p.detach(), dtype=torch.bfloat16)
        for _ in range(count):
            rounded += one[name].bfloat16()
        assert one[name].norm() == 0 or (rounded.float() - p.grad).norm() > 0.003 * p.grad.norm()


@pytest.mark.parametrize("change", ["in place", ".data in place", "exchanged", "average", "loaded"])
def test_every_change_of_the_weights_takes_effect(policy, change):
    other = make_policy()
    perturb(other, seed=6)
    weights, before, expected = other.weights(), velocity(policy).detach(), velocity(other).detach()
    average = Ema(policy.parameters, 0.9)
    average.mean = weights
    contexts = {"exchanged": policy.with_weights, "average": lambda weights: average.in_place()}
    if change in contexts:
        with contexts[change](weights):
            assert torch.equal(velocity(policy), expected)
        assert torch.equal(velocity(policy), before)
        return
    if change == "loaded":
        policy.transformer.load_state_dict(other.transformer.state_dict())
    for name, p in policy.parameters.items():
        if change == "in place":
            torch.no_grad()(p.copy_)(weights[name])
        elif change == ".data in place":  # leaves p's version number, as bitsandbytes' kernels do
            p.data.copy_(weights[name])
    assert torch.equal(velocity(policy), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_pass_with_other_weights_leaves_a_pending_gradient_alone(policy, checkpointing):
    """With checkpointing, the backward runs the blocks again: with the shadows of the forward that it belongs to."""
    expected, other = gradients(policy), {name: t + 0.5 for name, t in policy.weights().items()}
    if checkpointing:
        policy.transformer.enable_gradient_checkpointing()
    policy.transformer.zero_grad()
    loss = loss_of(policy)
    with policy.with_weights(other):
        velocity(policy)
    with policy.reference():
        velocity(policy)
    loss.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in policy.parameters.items())


def test_autograd_grad_and_frozen_matrices_work_as_with_any_parameter(policy):
    frozen = next(p for name, p in policy.parameters.items() if "lora_B" in name).requires_grad_(False)
    trained = [p for p in policy.parameters.values() if p is not frozen]
    found = torch.autograd.grad(loss_of(policy), trained)
    loss_of(policy).backward()
    assert frozen.grad is None and all(torch.equal(p.grad, g) for p, g in zip(trained, found, strict=True))


def test_weights_files_and_copies_hold_the_float32_lora(policy, tmp_path):
    gradients(policy)
    policy.save_lora(tmp_path)
    read = make_policy()
    read.load_lora(tmp_path)
    assert all(torch.equal(p, read.parameters[name]) for name, p in policy.parameters.items())
    assert {p.dtype for p in policy.parameters.values()} == {torch.float32}
    assert not any("shadow" in name for name in policy.transformer.state_dict())
    twin = copy.deepcopy(policy.transformer)
    with torch.no_grad():
        expected = velocity(policy)
        for name, p in twin.named_parameters():
            if ".lora_" in name:
                p.mul_(2)
        moved = velocity(policy)
        policy.transformer = twin
        assert torch.equal(expected, moved) and not torch.equal(velocity(policy), expected)


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_forward_casts_nothing_in_the_lora_and_the_shadows_at_once():
    """Casts of a forward: those of the inputs, norms and outputs, none for a projection; for the LoRA, one operator."""
    for depth in (2, 3):
        policy = make_policy(depth=depth)
        with Operators() as cast:
            cast_all([p.detach() for p in policy.parameters.values()], torch.bfloat16)
        assert [name for name in cast.names if name not in ("split", "view", "split_with_sizes", "detach")] == [
            "new_empty", "_foreach_copy_",
        ]  # fmt: skip
        with Operators() as trained:
            velocity(policy)
        with policy.reference(), Operators() as plain:
            velocity(policy)
        assert trained.names.count("_to_copy") == plain.names.count("_to_copy")
        assert (trained.names.count("_foreach_copy_"), plain.names.count("_foreach_copy_")) == (1, 0)


def test_a_float32_policy_has_no_shadows():
    policy = make_policy(torch.float32)
    with Operators() as run:
        velocity(policy)
    assert "_foreach_copy_" not in run.names


def test_the_gpus_generators_are_left_alone(monkeypatch):
    """Seeding every GPU would start a context on each of them, and change what others draw there."""
    transformer = build_pipeline(StackConfig.tiny(), seed=0).transformer
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeds the GPUs"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("saves the states of all GPUs"))
    Policy(transformer, LoraConfig(rank=4, alpha=8), seed=0)
