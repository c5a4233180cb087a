"""Sizes of transformers' CLIP and BLIP towers, from the shapes of their tensors."""

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def shape_of(tensors: Mapping[str, Tensor], name: str, dims: int, where: str | Path) -> tuple[int, ...]:
    """The shape of a tensor. Raises ValueError if it is missing or does not have `dims` dimensions."""
    if name not in tensors:
        raise ValueError(f"{where}: the tensors do not fit the model: missing {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != dims:
        raise ValueError(f"{where}: the tensors do not fit the model: {name}: got {shape}; expected {dims} dimensions")
    return shape


def encoder_sizes(tensors: Mapping[str, Tensor], tower: str, head_width: int, where: str | Path) -> dict[str, int]:
    """Arguments of a config for `tower`.encoder.layers: hidden_size, intermediate_size, layers and attention heads."""
    inner, width = shape_of(tensors, f"{tower}.encoder.layers.0.mlp.fc1.weight", 2, where)
    if width % head_width:
        raise ValueError(f"{where}: {tower}: got width {width}; expected a multiple of {head_width}")
    layers = len({name.split("layers.")[1].split(".")[0] for name in tensors if name.startswith(f"{tower}.encoder.")})
    heads = width // head_width
    return dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)


def image_sizes(positions: tuple[int, ...], patches: tuple[int, ...], where: str | Path) -> dict[str, int]:
    """image_size and patch_size, from the shapes (..., n^2 + 1, width) and (width, 3, p, p) of both embeddings."""
    side = math.isqrt(max(0, positions[-2] - 1))
    if side == 0 or side * side + 1 != positions[-2]:
        raise ValueError(f"{where}: image positions: got {positions[-2]}; expected one more than a square")
    return dict(image_size=side * patches[3], patch_size=patches[3])
