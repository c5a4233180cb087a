"""Functions that apply the memory-saving options of `MemoryConfig` to the base model, the VAE and the text encoders."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from dinalrm_align.align.activations import policy_bytes, reward_bytes
from dinalrm_align.align.config import MemoryConfig
from dinalrm_align.models.layout import TEXT_ENCODERS
from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.models.quantization import check_quantization, quantise_linears
from dinalrm_align.models.text import TransformerConfig
from dinalrm_align.reward.protocol import Reward

KERNELS = ("flash", "mem_efficient", "cudnn")
"""Names in torch.backends.cuda.enable_*_sdp. math stays enabled as the fallback, which the VAE's wide head needs."""


def check_memory_options(config: MemoryConfig, device: torch.device) -> None:
    """Raise ImportError or ValueError if `device` or the installation does not support an option in `config`."""
    check_quantization(config.base_quant)
    if config.attention != "auto" and device.type != "cuda":
        raise ValueError(f"memory.attention: got {config.attention} on {device.type}; expected auto, without CUDA")


def use_kernels(config: MemoryConfig) -> None:
    """Let torch use TF32 and the attention kernel that `config` asks for, in this process and on CUDA only."""
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    use_attention(config.attention)


def use_attention(name: str) -> None:
    """Let scaled_dot_product_attention on CUDA use only the kernels `name` and "math". For "auto", change nothing."""
    if name == "auto":
        return
    wanted = {"efficient": "mem_efficient"}.get(name, name)
    for kernel in KERNELS:
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(kernel == wanted)


def shrink_pipeline(pipeline: StableDiffusion3Pipeline, config: MemoryConfig, device: torch.device) -> None:
    """Quantise the base model, and cast and tile the VAE, as `config` says. `pipeline` must not be on `device` yet."""
    if config.base_quant != "none":
        quantise_linears(pipeline.transformer.transformer_blocks, config.base_quant, device, pipeline.transformer.dtype)
    if config.vae_dtype != "float32":  # its dtype when loaded
        pipeline.vae.to(getattr(torch, config.vae_dtype))
    if config.decode_tile:
        pipeline.vae.enable_tiling()


def text_pipeline(pipeline: StableDiffusion3Pipeline, device: torch.device) -> StableDiffusion3Pipeline:
    """Return a pipeline that has only the text encoders and tokenizers of `pipeline`, on `device`."""
    names = [*TEXT_ENCODERS, *(name.replace("text_encoder", "tokenizer") for name in TEXT_ENCODERS)]
    parts = {name: getattr(pipeline, name) for name in names}
    texts = StableDiffusion3Pipeline(transformer=None, vae=None, scheduler=pipeline.scheduler, **parts).to(device)
    if texts.text_encoder_3 is None:
        texts.transformer = TransformerConfig(pipeline.transformer.config)
    return texts


def release_text_encoders(*pipelines: StableDiffusion3Pipeline) -> None:
    """Remove the text encoders and free their memory. The pipelines can no longer encode prompts."""
    for pipeline in pipelines:
        for name in TEXT_ENCODERS:
            setattr(pipeline, name, None)
    torch.cuda.empty_cache()


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager that moves `module` to `device` on entry and back to its previous device on exit."""
    home = next(module.parameters()).device
    if home.type == device.type and device.index in (None, home.index):  # a single GPU is named without its index
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
        torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Return the bytes that new tensors on `device` can take: also those that torch has reserved and does not use."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def recomputation(
    chosen: bool | str,
    images: tuple[int, int],
    transformer: SD3Transformer2DModel,
    rewards: Sequence[Reward],
    accelerator: Accelerator,
    *,
    latent_shape: tuple[int, int, int],
    text_tokens: int,
) -> tuple[bool, bool]:
    """Return whether policy and rewards recompute activations in the backward pass, and print the choice of "auto".

    All ranks make the same choice. Image rewards whose gradient is needed always recompute: their VAE keeps the most.

    Args:
        chosen: the setting `gradient_checkpointing`: True, False or "auto".
        images: images whose activations a backward pass needs, of the policy and of rewards, see `AlignRun`.
    """
    if chosen != "auto":
        return chosen, chosen
    layout, (_, height, width) = transformer.config, latent_shape
    image_tokens = height * width // layout.patch_size**2
    sizes = dict(width=transformer.inner_dim, itemsize=transformer.dtype.itemsize)
    own = policy_bytes(
        blocks=layout.num_layers, second=len(layout.dual_attention_layers), image_tokens=image_tokens,
        text_tokens=text_tokens, images=images[0], **sizes,
    )  # fmt: skip
    blocks = sum(part.config.num_layers for reward in rewards for part in reward.noise_parts)
    theirs = reward_bytes(blocks=blocks, tokens=image_tokens + text_tokens, images=images[1], **sizes)
    free = torch.tensor([free_memory(accelerator.device)], device=accelerator.device)
    room = int(accelerator.gather(free).min()) // 2
    policy = own > room
    decoded = images[1] > 0 and any(reward.reads_images for reward in rewards)
    reward = decoded or theirs > room - (0 if policy else own)
    how = {True: "recomputed", False: "kept"}
    accelerator.print(
        f"gradient_checkpointing auto: activations of the policy, {own / 2**30:.2f} GiB, are {how[policy]}, those of "
        f"rewards{'' if decoded else f', {theirs / 2**30:.2f} GiB,'} {how[reward]}; "
        f"half of the free memory is {room / 2**30:.2f} GiB"
    )
    return policy, reward


def decoder(vae: AutoencoderKL, device: torch.device, batch: int = 4) -> Callable[[Tensor], Tensor]:
    """Return a function that decodes latents to images (B, 3, H, W) in [0, 1], `batch` at a time on `device`."""

    def decode(latents: Tensor) -> Tensor:
        with visiting(vae, device):
            return torch.cat([decode_latents(vae, part) for part in latents.split(batch)])

    return decode
