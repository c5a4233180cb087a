"""Load SD3 pipelines, transformers and VAEs; convert images to scaled latents, (z - shift_factor) * scaling_factor."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from dinalrm_align.flow.noise import check_latents
from dinalrm_align.models.images import Images, image_tensor
from dinalrm_align.models.layout import TEXT_ENCODERS, check_files, weight_options, without_t5
from dinalrm_align.models.text import text_encoders
from dinalrm_align.models.weights import HubOptions, check_source, fetch, find_file, load_model, loading, stored_dtype
from dinalrm_align.train.files import read_json, reading

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline


def load_transformer(
    source: str | Path, *, dtype: torch.dtype | None, **hub: Unpack[HubOptions]
) -> SD3Transformer2DModel:
    """Load a frozen SD3 transformer from a pipeline folder, a transformer folder, or the hub id of a pipeline.

    dtype: dtype of the weights; None: that of the files.
    """
    check_source("base model", source)
    bare = (Path(source) / "config.json").is_file()
    if Path(source).is_dir():
        config = Path(source) / ("config.json" if bare else "transformer/config.json")
        kind = read_json(config, "that of an SD3Transformer2DModel").get("_class_name")
        if kind != SD3Transformer2DModel.__name__:
            raise ValueError(f"{config}: got a {kind}; expected an SD3Transformer2DModel (SD3 or SD3.5)")
    part = "" if bare else "transformer"
    if dtype is None:
        files = ("config.json", "*model.safetensors*", "*model-*.safetensors")
        dtype = stored_dtype(fetch(source, files, what="base model", subfolder=part, **hub), "diffusion_pytorch_model")
    options = dict(subfolder=part or None, torch_dtype=dtype, **weight_options(source, part), **hub)
    return load_model(SD3Transformer2DModel, source, **options).requires_grad_(False)


@loading()
def load_pipeline(source: str | Path, *, dtype: torch.dtype) -> "StableDiffusion3Pipeline":
    """Load a frozen StableDiffusion3Pipeline from a folder or hub id: the VAE in float32, the rest in `dtype`.

    A pipeline may have been saved without T5, as the variant fp16 or bf16, or as .bin files (see `weight_options`).
    """
    from diffusers import StableDiffusion3Pipeline

    if Path(source).is_dir():
        check_files(Path(source))
    absent = without_t5(find_file(source, "model_index.json"))
    transformer, vae = load_transformer(source, dtype=dtype), load_vae(source, device="cpu")
    with reading("StableDiffusion3Pipeline", source):
        options = dict(transformer=transformer, vae=vae, dtype=dtype, **weight_options(source, *TEXT_ENCODERS))
        pipeline = StableDiffusion3Pipeline.from_pretrained(str(source), **options, **absent)
    for encoder in text_encoders(pipeline):
        encoder.requires_grad_(False)
    return pipeline


def frozen_view(pipeline: "StableDiffusion3Pipeline") -> "StableDiffusion3Pipeline":
    """Freeze the models of a pipeline; return a second pipeline that shares them, and can release some of them."""
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return type(pipeline)(**pipeline.components)


def load_vae(source: str | Path, *, device: torch.device | str, **hub: Unpack[HubOptions]) -> "AutoencoderKL":
    """Load the VAE of a pipeline folder or hub id, frozen and in float32."""
    from diffusers import AutoencoderKL

    if Path(source).is_dir() and not (Path(source) / "vae" / "config.json").is_file():
        raise ValueError(f"images need a VAE, and {source} has no vae folder: pass pipeline=..., or score latents")
    check_source("VAE", source)
    options = dict(subfolder="vae", torch_dtype=torch.float32, **weight_options(source, "vae"), **hub)
    vae = load_model(AutoencoderKL, source, **options)
    return vae.requires_grad_(False).eval().to(device)


def vae_scaling(source: str | Path) -> tuple[float, float]:
    """Return (scaling_factor, shift_factor) of the VAE of a pipeline, a folder or hub id. Weights are not read."""
    from diffusers import AutoencoderKL

    with reading("VAE", source):
        config = AutoencoderKL.load_config(str(source), subfolder="vae")
        return config["scaling_factor"], config.get("shift_factor") or 0.0


def encode_images(vae: "AutoencoderKL", images: Images, *, differentiable: bool = False) -> Tensor:
    """Encode images, as `image_tensor` takes them. Returns the scaled posterior mean (B, C, h, w).

    differentiable: whether gradients reach image tensors. The mean is a deterministic function of the images.
    """
    pixels = image_tensor(images)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = pixels.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"images: got {height} x {width} pixels; expected multiples of {factor}, crop or resize first")
    needs_gradient = differentiable and torch.is_grad_enabled()
    with torch.set_grad_enabled(needs_gradient), torch.autocast(vae.device.type, enabled=False):
        z = vae.encode((2 * pixels - 1).to(vae.device, vae.dtype)).latent_dist.mean
        return (z.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Decode scaled latents (B, C, h, w) to images (B, 3, H, W), float32, clipped to [0, 1]; differentiable."""
    check_latents("latents", latents)
    if latents.shape[1] != vae.config.latent_channels:
        raise ValueError(f"latents: got {latents.shape[1]} channels; expected {vae.config.latent_channels}, the VAE's")
    z = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
