"""Bytes of the activations that a backward pass needs if none are recomputed. Imports no torch.

The coefficients are counted on full-size SD3.5 Medium in bfloat16 with a bfloat16 LoRA, by `align.savings`; a test
compares them. Activations are linear in tokens, images and blocks. A unit is one number per token and channel.
"""

IMAGE, SECOND, TEXT = 18.3, 11.3, 18.3
"""Units per block of the policy: per image token, added by a second attention, and per text token."""
REWARD = 27.8
"""Units per block of a latent reward, per token of either stream. Its first 12 blocks all have a second attention."""


def policy_bytes(
    *, width: int, blocks: int, second: int, image_tokens: int, text_tokens: int, images: int, itemsize: int
) -> int:
    """Return the bytes for `images` images. second: blocks with a second attention. itemsize: bytes of a number."""
    units = image_tokens * (IMAGE * blocks + SECOND * second) + TEXT * text_tokens * blocks
    return round(images * units * width * itemsize)


def reward_bytes(*, width: int, blocks: int, tokens: int, images: int, itemsize: int) -> int:
    """Return the bytes for `images` noisy latents: the number of noise levels times the number of images."""
    return round(images * REWARD * blocks * tokens * width * itemsize)
