"""Tiny random models in the layouts that CLIP rewards are released in, and a VAE to go with them."""

import torch
from diffusers import AutoencoderKL
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dinalrm_align.shapes.stack import clip_tokenizer

LENGTH, SIZE = 16, 32
"""Tokens per prompt; pixels per side."""


def tiny_vae(seed=1):
    """16 latent channels, 4 pixels per latent position."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def write_processor(folder, side=SIZE):
    """A folder with tokenizer and preprocessor_config.json; returns the tokenizer."""
    tokenizer = clip_tokenizer(["red", "blue", "circle", "square"], LENGTH)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side).save_pretrained(folder)
    return tokenizer


def token_settings(tokenizer):
    """The part of a CLIPTextConfig that follows from the tokenizer."""
    ends = {f"{end}_token_id": getattr(tokenizer, f"{end}_token_id") for end in ("bos", "eos", "pad")}
    return dict(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **ends)


def save_clip(folder, *, side=SIZE, patch=8, layers=1):
    """Write a CLIPModel in PickScore's layout, tokenizer and preprocessor beside it; returns the folder.

    side: width and height of an image in pixels. patch: width and height of a patch in pixels.
    """
    tokenizer = write_processor(folder, side)
    torch.manual_seed(0)
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2)
    text = dict(**tower, **token_settings(tokenizer))
    vision = dict(**tower, image_size=side, patch_size=patch)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    return folder


def tiny_clip_h(tokenizer, seed=0):
    """A CLIPModel of ViT-H/14's kind: heads of 80 and 64 channels, two of each, exact GELU."""
    torch.manual_seed(seed)
    vision = dict(hidden_size=160, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2, image_size=SIZE)
    text = dict(hidden_size=128, intermediate_size=48, num_attention_heads=2, num_hidden_layers=3)
    config = CLIPConfig(
        projection_dim=24,
        vision_config=dict(**vision, patch_size=8, hidden_act="gelu"),
        text_config=dict(**text, **token_settings(tokenizer), hidden_act="gelu"),
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start at 0 and 1, and would hide a swap
            parameter.add_(0.1 * torch.randn(parameter.shape))
        model.text_model.embeddings.token_embedding.weight.mul_(10)  # words that differ
    return model.requires_grad_(False).eval()


def open_clip_tensors(clip):
    """The weights of a CLIPModel by open_clip's names, as its state_dict has them: the inverse of what is tested."""
    have, out = clip.state_dict(), {}
    for tower, prefix in (("text_model", ""), ("vision_model", "visual.")):
        layers = clip.config.text_config if tower == "text_model" else clip.config.vision_config
        for index in range(layers.num_hidden_layers):
            old, new = f"{tower}.encoder.layers.{index}.", f"{prefix}transformer.resblocks.{index}."
            for kind in ("weight", "bias"):
                thirds = [have[f"{old}self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                out[f"{new}attn.in_proj_{kind}"] = torch.cat(thirds)
                out[f"{new}attn.out_proj.{kind}"] = have[f"{old}self_attn.out_proj.{kind}"]
                out[f"{new}ln_1.{kind}"] = have[f"{old}layer_norm1.{kind}"]
                out[f"{new}ln_2.{kind}"] = have[f"{old}layer_norm2.{kind}"]
                out[f"{new}mlp.c_fc.{kind}"] = have[f"{old}mlp.fc1.{kind}"]
                out[f"{new}mlp.c_proj.{kind}"] = have[f"{old}mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        out[f"ln_final.{kind}"] = have[f"text_model.final_layer_norm.{kind}"]
        out[f"visual.ln_pre.{kind}"] = have[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = have[f"vision_model.post_layernorm.{kind}"]
    out["token_embedding.weight"] = have["text_model.embeddings.token_embedding.weight"]
    out["positional_embedding"] = have["text_model.embeddings.position_embedding.weight"]
    out["text_projection"] = have["text_projection.weight"].t().contiguous()
    out["visual.class_embedding"] = have["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = have["vision_model.embeddings.position_embedding.weight"]
    out["visual.conv1.weight"] = have["vision_model.embeddings.patch_embedding.weight"]
    out["visual.proj"] = have["visual_projection.weight"].t().contiguous()
    out["logit_scale"] = have["logit_scale"]
    return out


def drop(name):
    """A function that returns tensors without the one of this name."""
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def smooth_images(batch, height, width, seed=0):
    """(batch, 3, height, width) in [0, 1], without hard edges, as photographs are."""
    small = torch.rand(batch, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
