"""Build a frozen transformers `CLIPModel` of ViT-H/14's kind from tensors alone; their shapes give its sizes.

What shapes do not determine is that of ViT-H/14: attention heads of 80 channels in the vision tower and 64 in the text
tower, exact GELU. Names are transformers' own, or open_clip's, which `from_open_clip` maps to them.
"""

from collections.abc import Mapping

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from dinalrm_align.models.weights import assign_tensors, rename

VISION_HEAD, TEXT_HEAD = 80, 64
"""Channels per attention head of ViT-H/14."""

_BLOCKS = {
    rf"{prefix}transformer\.resblocks\.(\d+)\.{name}\.": rf"{tower}_model.encoder.layers.\1.{new}."
    for prefix, tower in (("", "text"), (r"visual\.", "vision"))
    for name, new in (
        ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), (r"mlp\.c_fc", "mlp.fc1"), (r"mlp\.c_proj", "mlp.fc2"),
        (r"attn\.out_proj", "self_attn.out_proj"), (r"attn\.([qkv])_proj", r"self_attn.\2_proj"),
    )
}  # fmt: skip
NAMES = _BLOCKS | {  # open_clip's names to transformers'
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
    """Tensors by open_clip's names -> by transformers' names."""
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
    tensors: Mapping[str, Tensor],
    *,
    eos_token_id: int | None,
    dtype: torch.dtype,
    device: torch.device | None,
    where: str,
) -> CLIPModel:
    """The frozen model of these tensors (transformers' names), in `dtype` on `device` (default: the CPU).

    eos_token_id: of the tokenizer; text features are read at this token. where: the file, for messages. Raises
    ValueError when a tensor is missing, unexpected or of another shape, or the sizes are not of ViT-H/14's kind.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    with init_empty_weights(include_buffers=False):
        model = CLIPModel(_config(tensors, eos_token_id, where))
    assign_tensors(model, tensors, where, dtype=dtype, device=device)
    return model.requires_grad_(False).eval()


def _config(tensors: Mapping[str, Tensor], eos_token_id: int | None, where: str) -> CLIPConfig:
    """Sizes from shapes. Raises ValueError for shapes that do not fit a ViT-H/14's kind or the tokenizer."""
    needed = {
        "patch": "vision_model.embeddings.patch_embedding.weight",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "vision_mlp": "vision_model.encoder.layers.0.mlp.fc1.weight",
        "tokens": "text_model.embeddings.token_embedding.weight",
        "length": "text_model.embeddings.position_embedding.weight",
        "text_mlp": "text_model.encoder.layers.0.mlp.fc1.weight",
        "projection": "visual_projection.weight",
    }
    missing = [name for name in needed.values() if name not in tensors]
    if missing:
        raise ValueError(f"{where} does not hold a whole CLIP: missing {missing[:4]}")
    shapes = {short: tuple(tensors[name].shape) for short, name in needed.items()}
    for short, shape in shapes.items():
        if len(shape) != (4 if short == "patch" else 2):
            raise ValueError(f"{where}: got {needed[short]} of shape {shape}; expected another number of dimensions")
    vision_width, _, patch, _ = shapes["patch"]
    vocabulary, text_width = shapes["tokens"]
    positions = shapes["positions"][0]
    side = round((positions - 1) ** 0.5)
    if vision_width % VISION_HEAD or text_width % TEXT_HEAD or side * side + 1 != positions:
        raise ValueError(
            f"{where} is no CLIP of ViT-H/14's kind: got widths {vision_width} and {text_width}, {positions} image "
            f"positions; expected multiples of {VISION_HEAD} and {TEXT_HEAD}, and one more than a square"
        )
    if eos_token_id is None or not 0 <= eos_token_id < vocabulary:
        raise ValueError(
            f"{where}: got a tokenizer whose end of text is {eos_token_id}, and embeddings of {vocabulary} tokens; "
            "expected the tokenizer that this CLIP was trained with"
        )
    layers = {
        tower: len({name.split(".")[3] for name in tensors if name.startswith(f"{tower}_model.encoder.layers.")})
        for tower in ("vision", "text")
    }
    return CLIPConfig(
        projection_dim=shapes["projection"][0],
        vision_config=dict(
            hidden_size=vision_width, intermediate_size=shapes["vision_mlp"][0], num_hidden_layers=layers["vision"],
            num_attention_heads=vision_width // VISION_HEAD, patch_size=patch, image_size=side * patch,
            projection_dim=shapes["projection"][0], hidden_act="gelu",
        ),
        text_config=dict(
            hidden_size=text_width, intermediate_size=shapes["text_mlp"][0], num_hidden_layers=layers["text"],
            num_attention_heads=text_width // TEXT_HEAD, vocab_size=vocabulary,
            max_position_embeddings=shapes["length"][0], projection_dim=shapes["projection"][0], hidden_act="gelu",
            eos_token_id=eos_token_id, bos_token_id=0, pad_token_id=0,
        ),
    )  # fmt: skip
