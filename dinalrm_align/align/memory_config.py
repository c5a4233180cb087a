"""Settings that make an alignment run smaller or faster and leave the method as it is. Torch-free.

What each saves and costs: `python recipes/savings.py`.
"""

from dataclasses import dataclass
from typing import Any, Literal

from dinalrm_align.train.settings import check_fields, check_integer


@dataclass
class MemoryConfig:
    """Options that save memory or time. None is on by default; gradient_checkpointing and optim.name are elsewhere.

    Args:
        base_quant: hold the linear layers of the base model's blocks in 8 or 4 bits (bitsandbytes, the extra `quant`);
            policy and latent reward share them. Values change: a few percent of a velocity with nf4.
        vae_dtype: of the VAE's weights; bfloat16 halves what decoding holds, and rounds pictures.
        decode_slice: pictures that a pixel reward decodes at a time; none: the whole batch. Each slice is decoded once
            more in the backward pass.
        decode_tile: decode large pictures tile by tile (diffusers' tiling): pixels near the seams change.
        offload: keep off the GPU what is not used: text encoders run before the base model is moved there, the VAE
            visits it for evaluations alone (unless a pixel reward decodes with it at every update).
        compile: torch.compile every block of policy and latent reward, one by one; the first update takes minutes.
        attention: which of torch's CUDA kernels attention uses. (diffusers' set_attention_backend does not reach SD3's
            attention, which calls torch's.)
    """

    base_quant: Literal["none", "int8", "nf4"] = "none"
    vae_dtype: Literal["float32", "bfloat16"] = "float32"
    decode_slice: int | None = None
    decode_tile: bool = False
    offload: bool = False
    compile: bool = False
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "memory")
        if self.decode_slice is not None:
            check_integer("memory.decode_slice", self.decode_slice, low=1)


@dataclass
class Hpsv3Config:
    """How HPSv3 is loaded, where it is part of the reward.

    Args:
        quantization: hold the linear layers of its blocks in 8 or 4 bits (bitsandbytes, the extra `quant`).
        template: data_collator_qwen.py of the package hpsv3, or a JSON file with its two texts; none given, what lies
            beside the weights, else the installed package.
        base: folder or hub id of Qwen2-VL-7B-Instruct, of which config and tokenizer are read; none given, what lies
            beside the weights, else the hub's.
    """

    quantization: Literal["none", "int8", "nf4"] = "none"
    template: str | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "hpsv3")

    def options(self) -> dict[str, Any]:
        """What differs from the defaults, as arguments of `HPSv3Reward.from_pretrained`."""
        default = Hpsv3Config
        return {name: value for name, value in vars(self).items() if value != vars(default)[name]}
