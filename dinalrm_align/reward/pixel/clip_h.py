"""Build CLIP ViT-H/14 and similar models from tensors whose shapes determine the layer sizes.

Settings that the shapes do not determine are those of ViT-H/14: 80 channels per attention head in the vision tower, 64
in the text tower, and exact GELU. Tensors must have transformers' names; `from_open_clip` renames tensors of
open_clip. `encoder_sizes` and `image_sizes` are also used for BLIP.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from dinalrm_align.models.weights import assign_tensors, rename

VISION_HEAD, TEXT_HEAD = 80, 64
"""Channels per attention head in the vision and text towers of ViT-H/14."""

_BLOCKS = {
    rf"{prefix}transformer\.resblocks\.(\d+)\.{name}\.": rf"{tower}_model.encoder.layers.\1.{new}."
    for prefix, tower in (("", "text"), (r"visual\.", "vision"))
    for name, new in (
        ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), (r"mlp\.c_fc", "mlp.fc1"), (r"mlp\.c_proj", "mlp.fc2"),
        (r"attn\.out_proj", "self_attn.out_proj"), (r"attn\.([qkv])_proj", r"self_attn.\2_proj"),
    )
}  # fmt: skip
NAMES = _BLOCKS | {  # open_clip's names -> transformers' names
    r"token_embedding\.": "text_model.embeddings.token_embedding.",
    r"positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"ln_final\.": "text_model.final_layer_norm.",
    r"text_projection$": "text_projection.weight",
    r"visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"visual\.ln_post\.": "vision_model.post_layernorm.",
    r"visual\.proj$": "visual_projection.weight",
    r"attn_mask$": None,  # the causal mask, in old files
}


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's CLIP tensors with transformers' names and layout."""
    split = {}
    for name, tensor in tensors.items():
        head, fused, kind = name.rpartition("in_proj_")
        if name in ("text_projection", "visual.proj"):  # multiplied from the right; a Linear stores the transpose
            split[name] = tensor.t().contiguous()
        elif fused:
            thirds = zip("qkv", tensor.chunk(3), strict=True)
            split |= {f"{head}{letter}_proj.{kind}": third.clone() for letter, third in thirds}
        else:
            split[name] = tensor
    return rename(split, NAMES)


def build_clip_h(
    tensors: Mapping[str, Tensor], where: str, *, eos_token_id: int | None, dtype: torch.dtype, device: torch.device
) -> CLIPModel:
    """Return a frozen CLIPModel with the given tensors. `where`: path of the tensors' file, for error messages.

    eos_token_id: id of the tokenizer's end-of-text token, at which CLIP pools the text features.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    with init_empty_weights(include_buffers=False):
        model = CLIPModel(_config(tensors, eos_token_id, where))
    assign_tensors(model, tensors, where, dtype=dtype, device=device)
    return model.requires_grad_(False).eval()


def _config(tensors: Mapping[str, Tensor], eos_token_id: int | None, where: str) -> CLIPConfig:
    eyes, words = "vision_model.embeddings.", "text_model.embeddings."
    positions = shape_of(tensors, f"{eyes}position_embedding.weight", 2, where)
    patches = shape_of(tensors, f"{eyes}patch_embedding.weight", 4, where)
    vocabulary, _ = shape_of(tensors, f"{words}token_embedding.weight", 2, where)
    length, _ = shape_of(tensors, f"{words}position_embedding.weight", 2, where)
    projection, _ = shape_of(tensors, "visual_projection.weight", 2, where)
    if eos_token_id is None or not 0 <= eos_token_id < vocabulary:
        expected = f"expected a token below {vocabulary}, the number of embeddings"
        raise ValueError(f"{where}: end of text: got {eos_token_id}; {expected}: give this CLIP's own tokenizer")
    shared = dict(projection_dim=projection, hidden_act="gelu")
    vision = encoder_sizes(tensors, "vision_model", VISION_HEAD, where) | image_sizes(positions, patches, where)
    text = encoder_sizes(tensors, "text_model", TEXT_HEAD, where)
    text |= dict(vocab_size=vocabulary, max_position_embeddings=length)
    text |= dict(eos_token_id=eos_token_id, bos_token_id=0, pad_token_id=0)
    return CLIPConfig(projection_dim=projection, vision_config=vision | shared, text_config=text | shared)


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, where: str | Path) -> tuple[int, ...]:
    """Return the shape of tensor `name`. Raise ValueError if the tensor is missing or does not have `dims` axes."""
    if name not in tensors:
        raise ValueError(f"{where}: the tensors do not fit the model: missing {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims:
        raise ValueError(f"{where}: the tensors do not fit the model: {name}: got {shape}; expected {dims} dimensions")
    return shape


def encoder_sizes(tensors: Mapping[str, Tensor], tower: str, head_width: int, where: str | Path) -> dict[str, int]:
    """Return the config arguments of encoder `tower`: hidden size, MLP size, numbers of layers and attention heads."""
    inner, width = shape_of(tensors, f"{tower}.encoder.layers.0.mlp.fc1.weight", 2, where)
    if width % head_width:
        raise ValueError(f"{where}: {tower}: got width {width}; expected a multiple of {head_width}")
    layers = len({name.split("layers.")[1].split(".")[0] for name in tensors if name.startswith(f"{tower}.encoder.")})
    heads = width // head_width
    return dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)


def image_sizes(positions: tuple[int, ...], patches: tuple[int, ...], where: str | Path) -> dict[str, int]:
    """Return image_size and patch_size for two shapes: positions (..., n^2 + 1, width) and patches (width, 3, p, p)."""
    side = math.isqrt(max(0, positions[-2] - 1))
    if side == 0 or side * side + 1 != positions[-2]:
        raise ValueError(f"{where}: image positions: got {positions[-2]}; expected one more than a square")
    return dict(image_size=side * patches[3], patch_size=patches[3])
