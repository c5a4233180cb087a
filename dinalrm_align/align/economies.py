"""What `config.memory` asks for, done to the parts of a stage: each function one option, each leaves the rest alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import Tensor, nn

from dinalrm_align.align.config import MemoryConfig
from dinalrm_align.models.quantization import check_quantization, quantise_linears
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.models.vae import decode_latents
from dinalrm_align.reward.combine import Part, RewardSum
from dinalrm_align.reward.registry import latent_rewards, pixel_rewards

KERNELS = ("flash", "mem_efficient", "cudnn")
"""Of torch.backends.cuda.enable_*_sdp; math is always left on, for what a kernel cannot do: the VAE's one wide head."""
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def check_economies(config: MemoryConfig, device: torch.device) -> None:
    """ImportError or ValueError, before anything is loaded, for an option that cannot be had on this machine."""
    check_quantization(config.base_quant)
    if config.attention != "auto" and device.type != "cuda":
        raise ValueError(
            f"memory.attention: got {config.attention}, which chooses among CUDA kernels, and this run is on "
            f"{device.type}; leave it at auto"
        )


def use_attention(name: str) -> None:
    """Let torch's attention on CUDA use this kernel alone, and math where it cannot; for the whole process."""
    if name == "auto":
        return
    wanted = {"efficient": "mem_efficient"}.get(name, name)
    for kernel in KERNELS:
        getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(kernel == wanted)


def economise_pipeline(pipeline: StableDiffusion3Pipeline, config: MemoryConfig, device: torch.device) -> None:
    """Quantise the base model's blocks, cast and tile the VAE; before the pipeline is moved to `device`."""
    if config.base_quant != "none":
        quantise_linears(pipeline.transformer.transformer_blocks, config.base_quant, device, pipeline.transformer.dtype)
    if config.vae_dtype != "float32":  # as it is loaded
        pipeline.vae.to(getattr(torch, config.vae_dtype))
    if config.decode_tile:
        pipeline.vae.enable_tiling()


def encode_ahead(
    pipeline: StableDiffusion3Pipeline, lengths: set[int], prompts: Sequence[str], device: torch.device
) -> dict[int, PromptEncoder]:
    """Encode the prompts with the pipeline's text encoders on `device`, nothing else of it there; then let them go.

    Returns, by text length, encoders that know these prompts and no others.
    """
    names = [*TEXT_ENCODERS, *(name.replace("text_encoder", "tokenizer") for name in TEXT_ENCODERS)]
    taken = {name: getattr(pipeline, name) for name in names}
    text = StableDiffusion3Pipeline(transformer=None, vae=None, scheduler=pipeline.scheduler, **taken).to(device)
    encoders = {length: PromptEncoder(text, text_length=length, device=device) for length in lengths}
    for encoder in encoders.values():
        encoder(prompts)
    release_text_encoders(text)
    release_text_encoders(pipeline)
    return encoders


def release_text_encoders(pipeline: StableDiffusion3Pipeline) -> None:
    """Let the text encoders go; prompts that are not cached cannot be encoded any more."""
    for name in TEXT_ENCODERS:
        setattr(pipeline, name, None)
    torch.cuda.empty_cache()


def slice_decoding(reward: Part | RewardSum, slice_size: int | None) -> None:
    """Let the pixel rewards of it decode as many pictures at a time."""
    for part in pixel_rewards(reward):
        part.slice_size = slice_size


def compile_blocks(transformer: nn.Module, rewards: Sequence[Part | RewardSum], backend: str = "inductor") -> None:
    """torch.compile the blocks of the policy's transformer and of latent rewards, each by itself, in place."""
    trunks = [part.model.trunk for reward in rewards for part in latent_rewards(reward)]
    for owner in (transformer, *trunks):
        for block in owner.transformer_blocks:
            block.compile(backend=backend)


@contextmanager
def visiting(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Within the block the module is on `device`; afterwards where it was."""
    home = next(module.parameters()).device
    if home == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
        torch.cuda.empty_cache()


def decoder(vae: AutoencoderKL, device: torch.device, batch: int = 4) -> Callable[[Tensor], Tensor]:
    """Latents (B, C, h, w) -> pictures, `batch` at a time; the VAE visits `device` for it."""

    def decode(latents: Tensor) -> Tensor:
        with visiting(vae, device):
            return torch.cat([decode_latents(vae, part) for part in latents.split(batch)])

    return decode
