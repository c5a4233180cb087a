"""Checks that the tests of several image rewards share."""

from collections.abc import Callable, Sequence

import torch


def check_recomputation(
    reward, prompts: Sequence[str], calls: Sequence[object], set_mode: Callable[[], object]
) -> None:
    """Assert that gradient checkpointing recomputes the 4 layers that append to `calls`, and keeps the gradient.

    `set_mode`: reward.train or reward.eval, called after checkpointing is enabled.
    """
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(4), requires_grad=True)
    (plain,) = torch.autograd.grad(reward(latents, prompts=prompts).sum(), latents)
    assert len(calls) == 4
    reward.enable_gradient_checkpointing()
    set_mode()
    try:
        (recomputed,) = torch.autograd.grad(reward(latents, prompts=prompts).sum(), latents)
    finally:
        reward.disable_gradient_checkpointing()
    assert len(calls) == 12
    torch.testing.assert_close(recomputed, plain)
    torch.autograd.grad(reward(latents, prompts=prompts).sum(), latents)
    assert len(calls) == 16
