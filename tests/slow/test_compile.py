"""Compiled blocks: the same values, one graph per kind of call, and no recompilation once every kind has occurred."""

import pytest
import torch
from tiny_align import make_sampler, move
from torch._dynamo.utils import counters

from dinalrm_align import LatentReward
from dinalrm_align.align.grpo import Grpo
from dinalrm_align.align.grpo_config import GrpoConfig
from dinalrm_align.align.nft import Nft
from dinalrm_align.align.nft_config import NftConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.refl import Refl
from dinalrm_align.align.refl_config import ReflConfig
from dinalrm_align.flow.sampling import rollout
from dinalrm_align.models import compilation
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.text import Conditions, PromptEncoder
from dinalrm_align.reward.config import LoraConfig

PROMPTS = ["a red circle", "a blue square", "a green cross", "a red square", "a blue circle"]


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):
        counters.clear()
        yield
    torch._dynamo.reset()


def graphs() -> int:
    """The number of graphs that dynamo has compiled so far."""
    return counters["stats"]["unique_graphs"]


def run(world, *, backend: str | None, updates: int = 3) -> tuple[list[torch.Tensor], list[int]]:
    """Train and evaluate one policy by three methods. Return all values, and the number of graphs after each round.

    The last round recomputes activations, which runs the same graphs.
    """
    pipeline = load_pipeline(world / "pipeline", dtype=torch.float32)
    encoder = PromptEncoder(pipeline, text_length=16)
    reward = LatentReward.from_pretrained(world / "dinalrm", pipeline=pipeline)
    policy = Policy(pipeline.transformer, LoraConfig(rank=4, alpha=4), seed=0)
    move(policy)
    if backend:
        compilation.compile_blocks(policy.transformer.transformer_blocks, backend)
        reward.compile_blocks(backend)
    sampler = make_sampler(
        policy=policy, conditions=Conditions.encode(encoder, PROMPTS), negative=Conditions.encode(encoder, [""]),
        guidance_scale=2.0,
    )  # fmt: skip
    grouped = dict(groups=2, group_size=3, sample_batch=4, guidance_scale=1.0, reward_draws=1)
    methods = [
        Refl(sampler, reward, ReflConfig(batch_size=2, earliest=0.5, kl_weight=0.5)),
        Grpo(sampler, reward, GrpoConfig(**grouped, window_size=2, window_range=None, kl_beta=0.1)),
        Nft(sampler, reward, NftConfig(**grouped)),
    ]
    values, known, parameters = [], [], list(policy.parameters.values())
    for update in range(updates):
        if update == 2:
            policy.transformer.enable_gradient_checkpointing()
            reward.enable_gradient_checkpointing()
        for method in methods:
            loss, _ = method.step(method.batch_at(update))
            gradients = torch.autograd.grad(loss, parameters)
            values += [loss.detach(), *gradients]
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.sub_(gradient, alpha=0.1)
        for size in (4, 3 - update % 2):  # an evaluation in batches, the last one smaller
            conditions = sampler.conditions.take(list(range(size)))
            noise = torch.randn(size, *sampler.latent_shape, generator=torch.Generator().manual_seed(update))
            latents = rollout(sampler.velocity_for(conditions), noise, sampler.sigmas)
            with torch.no_grad():
                values += [latents, reward(latents, conditions)]
        known.append(graphs())
    return values, known


def test_after_the_first_update_and_evaluation_nothing_is_compiled_again(tiny_world, fresh_dynamo):
    expected, _ = run(tiny_world, backend=None)
    got, known = run(tiny_world, backend="eager")
    assert 8 < known[0] < 40 and known[1:] == known[:1] * 2
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_too_many_graphs_are_an_error_and_not_an_uncompiled_run(tiny_world, fresh_dynamo, monkeypatch):
    monkeypatch.setattr(compilation, "GRAPHS", 2)
    torch._dynamo.config.recompile_limit = 2
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        run(tiny_world, backend="eager", updates=1)
