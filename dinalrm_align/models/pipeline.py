"""Load an SD3 pipeline, or its transformer alone, from a folder or a hub id."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from diffusers import SD3Transformer2DModel

from dinalrm_align.models.hub import HubOptions, check_source, load_model
from dinalrm_align.models.text import text_encoders
from dinalrm_align.models.vae import load_vae
from dinalrm_align.train.files import read_json, reading

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline


def load_transformer(source: str | Path, *, dtype: torch.dtype, **hub: Unpack[HubOptions]) -> SD3Transformer2DModel:
    """The frozen transformer of a pipeline folder, a bare transformer folder, or a hub id."""
    check_source("base model", source)
    bare = (Path(source) / "config.json").is_file()
    if Path(source).is_dir():
        config = Path(source) / ("config.json" if bare else "transformer/config.json")
        kind = read_json(config, "that of an SD3Transformer2DModel").get("_class_name")
        if kind != SD3Transformer2DModel.__name__:
            raise ValueError(f"{config}: got a {kind}; expected an SD3Transformer2DModel (SD3 or SD3.5)")
    options = dict(subfolder=None if bare else "transformer", torch_dtype=dtype, use_safetensors=True, **hub)
    return load_model(SD3Transformer2DModel, source, **options).requires_grad_(False)


def load_pipeline(source: str | Path, *, dtype: torch.dtype) -> "StableDiffusion3Pipeline":
    """The frozen pipeline of a folder or hub id: the VAE in float32, the rest in `dtype`."""
    from diffusers import StableDiffusion3Pipeline

    transformer, vae = load_transformer(source, dtype=dtype), load_vae(source, device="cpu")
    with reading("StableDiffusion3Pipeline", source):
        options = dict(transformer=transformer, vae=vae, dtype=dtype, use_safetensors=True)
        pipeline = StableDiffusion3Pipeline.from_pretrained(str(source), **options)
    for encoder in text_encoders(pipeline):
        encoder.requires_grad_(False)
    return pipeline
