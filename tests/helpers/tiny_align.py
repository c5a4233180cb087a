"""The tiny stack for the tests of on-policy methods: a policy, conditions, rewards that any policy can learn."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dinalrm_align.align.policy import Policy
from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.flow.sampling import schedule_sigmas
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.callables import LatentFunction, as_reward
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.shapes.stack import StackConfig, build_pipeline
from dinalrm_align.train.cost import PhaseMeter

SHAPE = (16, 8, 8)


def brightness(latents: Tensor, prompts=None, sigma=None, noise=None) -> Tensor:
    """The mean of the latents."""
    return latents.mean(dim=(1, 2, 3))


def half(latents: Tensor) -> Tensor:
    """The same score for every sample, with a gradient of zero."""
    return 0.5 + 0 * latents.mean(dim=(1, 2, 3))


def reward_of(function: Callable[..., Tensor]) -> LatentFunction:
    """A function over latents as a reward."""
    return as_reward(function, name="a function")


def make_conditions(count: int, seed: int = 1) -> Conditions:
    generator = torch.Generator().manual_seed(seed)
    embeds, pooled = torch.randn(count, 5, 32, generator=generator), torch.randn(count, 32, generator=generator)
    return Conditions([f"prompt {index}" for index in range(count)], embeds, pooled)


def make_sampler(num_steps: int = 4, guidance_scale: float = 1.0, **changes) -> Sampler:
    """Samples five training prompts on a stack of two blocks."""
    pipeline = build_pipeline(StackConfig.tiny(depth=2), seed=0)
    values = dict(
        policy=Policy(pipeline.transformer, LoraConfig(rank=4, alpha=4), seed=0), conditions=make_conditions(5),
        negative=make_conditions(1, seed=2), sigmas=schedule_sigmas(pipeline.scheduler, num_steps),
        latent_shape=SHAPE, guidance_scale=guidance_scale, seed=3, meter=PhaseMeter("cpu"),
    )  # fmt: skip
    return Sampler(**(values | changes))


def changed(method, accumulate: int | None = None, **values: object):
    """The method with other values in its config, and another number of micro-steps per update."""
    if accumulate is not None:
        method = with_sampler(method, accumulate=accumulate)
    return dataclasses.replace(method, config=dataclasses.replace(method.config, **values))


def with_sampler(method, **values: object):
    """The method with other values in its sampler."""
    return dataclasses.replace(method, sampler=dataclasses.replace(method.sampler, **values))


def with_reward(method, function: Callable[..., Tensor]):
    """The method with a function over latents as its reward."""
    return dataclasses.replace(method, reward=reward_of(function))


def move(policy: Policy, scale: float = 0.05, seed: int = 5) -> None:
    """Leave the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator), alpha=scale)


def gradient_of(method, first: int, count: int) -> Tensor:
    """The gradient that `count` micro-steps from `first` on sum up to, as `loop.fit` averages them."""
    parameters = list(method.sampler.policy.parameters.values())
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


def train(method, steps: int, lr: float, batches: int | None = None) -> list[dict[str, float]]:
    """Train the LoRA with Adam; return the loss and metrics of each step. Asserts that no base weight gets a gradient.

    batches: number of batches, which are repeated; None for a new batch at each step.
    """
    policy = method.sampler.policy
    optimizer = torch.optim.Adam(policy.parameters.values(), lr=lr)
    rows = []
    for step in range(steps):
        loss, metrics = method.step(method.batch_at(step % (batches or steps)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rows.append(
            {"loss": loss.item()} | {name: float(torch.as_tensor(value).detach()) for name, value in metrics.items()}
        )
    assert all(p.grad is None for n, p in policy.transformer.named_parameters() if ".lora_" not in n)
    return rows


def half_sampler(distance: float = 0.05, **changes) -> Sampler:
    """A sampler with a bfloat16 policy, `distance` away from its reference. Velocities depend on the size of the batch.

    GPUs choose kernels by the shapes, and round differently. Here each velocity grows by 1/1024 per sample.
    """
    transformer = build_pipeline(StackConfig.tiny(depth=2), seed=0).transformer.to(torch.bfloat16)
    sampler = make_sampler(policy=Policy(transformer, LoraConfig(rank=4, alpha=4), seed=0), **changes)
    move(sampler.policy, distance)
    transformer.register_forward_hook(lambda module, given, output: (output[0] * (1 + len(output[0]) / 1024),))
    return sampler
