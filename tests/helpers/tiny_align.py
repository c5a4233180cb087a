"""The tiny stack for the tests of on-policy methods: a policy, conditions, rewards that any policy can learn."""

import torch
from torch import Tensor

from dinalrm_align.align.policy import Policy
from dinalrm_align.flow.sampling import schedule_sigmas
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.shapes.stack import StackConfig, build_pipeline

SHAPE = (16, 8, 8)


def brightness(latents: Tensor, *, prompts, sigma=None, noise=None, generator=None) -> Tensor:
    """The mean of the latents."""
    return latents.mean(dim=(1, 2, 3))


def make_conditions(count: int, seed: int = 1) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    embeds, pooled = torch.randn(count, 5, 32, generator=generator), torch.randn(count, 32, generator=generator)
    return Conditions([f"prompt {index}" for index in range(count)], embeds, pooled)


def surroundings(num_steps: int = 4) -> dict[str, object]:
    """What every method is built from beside its config."""
    pipeline = build_pipeline(StackConfig.tiny(depth=2), seed=0)
    return {
        "policy": Policy(pipeline.transformer, LoraConfig(rank=4, alpha=4), seed=0),
        "sigmas": schedule_sigmas(pipeline.scheduler, num_steps),
        "conditions": make_conditions(5),
        "negative": make_conditions(1, seed=2),
        "latent_shape": SHAPE,
    }


def move(policy: Policy, scale: float = 0.05, seed: int = 5) -> None:
    """Leave the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


def gradient_of(method, first: int, count: int) -> Tensor:
    """The gradient that `count` micro-steps from `first` on sum up to, as `loop.fit` averages them."""
    parameters = list(method.policy.parameters.values())
    total, items = torch.zeros(sum(p.numel() for p in parameters)), 0
    for micro_step in range(first, first + count):
        batch = method.batch_at(micro_step)
        items += batch.count
        loss, _ = method.step(batch)
        parts = torch.autograd.grad(loss * batch.count, parameters, allow_unused=True)
        total += torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for p, g in zip(parameters, parts, strict=True)
            ]
        )
    return total / max(items, 1)
