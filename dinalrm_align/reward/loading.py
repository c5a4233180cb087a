"""Load the parts of a latent reward: checkpoint, base model, and text encoders."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dinalrm_align.models.pipeline import load_transformer
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.models.weights import check_source, load_tensors
from dinalrm_align.reward.backbones.sd3 import SD3Trunk
from dinalrm_align.reward.checkpoint import base_location, read_checkpoint
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.train.device import available_device
from dinalrm_align.train.digest import fingerprint

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SD3_PIPELINES = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
"""Pipelines that have SD3's transformer, text encoders and VAE."""


def load_parts(
    source: str | Path,
    *,
    transformer: "SD3Transformer2DModel | str | Path | None",
    pipeline: "DiffusionPipeline | str | Path | None",
    device: torch.device | str | None,
    dtype: torch.dtype | str | None,
    share_weights: bool,
    sigma: Any,
    text_length: int | None,
    local_files_only: bool = False,
    **hub: Any,
) -> tuple[dict[str, Any], torch.dtype, str]:
    """Load a checkpoint and what it needs. Arguments and errors are those of `LatentReward.from_pretrained`.

    Returns the arguments of `LatentReward`, and the dtype of the base weights and a digest of all weights, both before
    any cast and before a LoRA is merged.
    """
    if isinstance(dtype, str) and dtype in DTYPES:
        dtype = DTYPES[dtype]
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    device = None if device is None else available_device(device)
    if isinstance(pipeline, str | Path):
        check_source("pipeline", pipeline)
    elif pipeline is not None:
        _check_pipeline(pipeline)
    checkpoint = read_checkpoint(source, local_files_only=local_files_only, **hub)
    config = checkpoint.config
    if sigma is not None:
        config = dataclasses.replace(config, sigma=sigma, image_sigma=None)
    if text_length is not None:
        config = dataclasses.replace(config, text_length=text_length)
    base = base_location(config.base_model_id, checkpoint.folder, trusted=Path(source).is_dir())
    vae = None
    if isinstance(pipeline, str | Path):
        base = pipeline = str(pipeline)
    elif pipeline is not None:
        transformer, vae = pipeline.transformer if transformer is None else transformer, pipeline.vae
    loaded_here = transformer is None or isinstance(transformer, str | Path)
    if loaded_here:
        transformer = load_transformer(
            base if transformer is None else transformer,
            dtype=dtype or DTYPES.get(config.dtype),
            local_files_only=local_files_only,
        ).to(device or "cpu")
    share = config.tuning != "full" and (share_weights or loaded_here)
    model = build_reward_model(config, transformer, share_weights=share)
    load_tensors(model.tuned_tensors(), checkpoint.tensors, checkpoint.where)
    loaded_dtype, loaded_weights = model.trunk.dtype, fingerprint(model)
    if loaded_here:
        model.trunk.share(())  # the reward is the only owner of these weights
    elif share:
        check_place(model.trunk, device, dtype)
    if not share and device is not None:
        model.to(device)
    merge = not share_weights and config.tuning == "lora"
    model.freeze(merge=merge, dtype=dtype, as_trained=checkpoint.tensors)
    encoder = PromptEncoder(
        base if pipeline is None else pipeline,
        text_length=config.text_length,
        device=model.trunk.device,
        dtype=model.trunk.dtype,
        local_files_only=local_files_only,
    )
    parts = dict(model=model, encoder=encoder, vae=vae, base=base, folder=checkpoint.folder)
    return parts | {"local_files_only": local_files_only}, loaded_dtype, loaded_weights


def _check_pipeline(pipeline: "DiffusionPipeline") -> None:
    """Raise TypeError unless `pipeline` is an SD3 pipeline."""
    if type(pipeline).__name__ not in SD3_PIPELINES:
        raise TypeError(f"pipeline: got {type(pipeline).__name__}; expected one of {', '.join(SD3_PIPELINES)}")


def check_vae(vae: "AutoencoderKL", config: RewardConfig) -> None:
    """Raise ValueError unless `vae` scales latents as the reward's config says."""
    got = (vae.config.scaling_factor, vae.config.shift_factor or 0.0)
    expected = (config.vae_scaling_factor, config.vae_shift_factor)
    if max(abs(a - b) for a, b in zip(got, expected, strict=True)) > 1e-6:
        raise ValueError(
            f"the VAE scales latents by (scaling_factor, shift_factor) = {got}, this reward was trained with "
            f"{expected}; use the VAE of its base model {config.base_model_id}"
        )


def check_place(trunk: SD3Trunk, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError if a given `device` or `dtype` differs from that of `trunk`, whose weights are shared."""
    here = (trunk.device, trunk.dtype)
    wanted = (here[0] if device is None else torch.device(device), here[1] if dtype is None else dtype)
    same_place = wanted[0].type == here[0].type and (
        wanted[0].type == "cpu" or wanted[0].index in (None, here[0].index)  # multi-process runs name it cpu:0
    )
    if not same_place or wanted[1] != here[1]:
        raise ValueError(
            f"the reward is to share the weights of a transformer on {here[0]} in {here[1]}, but {wanted[0]} in "
            f"{wanted[1]} was asked for; convert the transformer first, leave device and dtype out, or use "
            "share_weights=False"
        )
