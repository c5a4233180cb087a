"""One thing to be weighed: a reward, what is done with it, at which size, with which economies. Torch-free."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

RewardName = Literal["dinalrm", "pickscore", "hpsv3"]
Work = Literal["score", "gradient", "refl", "grpo", "policy_forward", "policy_gradient", "vae_decode", "vae_gradient",
               "vae_encode", "pixels", "pixels_gradient"]  # fmt: skip
WORK: dict[str, str] = {
    "score": "score latents, no gradient",
    "gradient": "score latents, gradient to them",
    "refl": "one ReFL update: a policy step with gradient, the frozen reference, the reward's gradient, AdamW",
    "grpo": "one Flow-GRPO update: two steps of rollout, scores, one trained step with its reference, AdamW",
    "policy_forward": "one policy step, no gradient",
    "policy_gradient": "one policy step, gradient to the LoRA",
    "vae_decode": "VAE decoder, no gradient",
    "vae_gradient": "VAE decoder, gradient to latents",
    "vae_encode": "VAE encoder, no gradient",
    "pixels": "score pictures, no gradient",
    "pixels_gradient": "score pictures, gradient to them",
}


@dataclass(frozen=True)
class Case:
    """What is run, and how.

    reward, work: see `WORK`. size: of the square pictures, in pixels. batch: samples. text_length: T5 tokens (CLIP's 77
    come before them). policy_checkpointing, reward_checkpointing: recompute blocks in the backward pass. merged: the
    reward has a private copy of its blocks with the LoRA in the weights, instead of sharing the policy's. levels: K,
    noise levels of the ensemble. dtype: of the frozen weights. vae_dtype: of the VAE's. base_quant, reward_quant: of
    the base model's blocks, and of HPSv3's. optimizer: of the policy's LoRA. decode_slice: pictures decoded at a time.
    """

    reward: RewardName = "dinalrm"
    work: Work = "refl"
    size: int = 1024
    batch: int = 1
    text_length: int = 128
    policy_checkpointing: bool = True
    reward_checkpointing: bool = True
    merged: bool = False
    levels: int = 1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    vae_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    base_quant: Literal["none", "int8", "nf4"] = "none"
    reward_quant: Literal["none", "int8", "nf4"] = "none"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    decode_slice: int | None = None

    def but(self, **changes: object) -> "Case":
        """The same with these changes."""
        return dataclasses.replace(self, **changes)

    @property
    def pixel(self) -> bool:
        """Whether the reward looks at decoded pictures."""
        return self.reward != "dinalrm"

    @property
    def trains(self) -> bool:
        """Whether the policy's LoRA is updated."""
        return self.work in ("refl", "grpo")
