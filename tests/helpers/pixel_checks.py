"""Checks that the tests of several image rewards share."""

from collections.abc import Callable, Sequence

import torch

from dinalrm_align.models.pipeline import decode_latents


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


def check_decoding(reward, vae, prompts: Sequence[str]) -> None:
    """Assert that two latents score as the images that the VAE decodes them to."""
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        images = decode_latents(vae, latents)
    torch.testing.assert_close(reward(latents, prompts=prompts).detach(), reward.score_images(images, prompts))
