"""Tiny random LRMs in the released layout, and the base models that go with them."""

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_clip import LENGTH, token_settings
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dinalrm_align.shapes.stack import clip_tokenizer

PARTS = ("text_encoder", "text_encoder_2")
SCALES = {"sd15": 0.18215, "sdxl": 0.13025}
UNETS = {
    "sd15": dict(block_out_channels=(8, 16, 32, 32), cross_attention_dim=16, attention_head_dim=2),
    "sdxl": dict(
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        cross_attention_dim=16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 24,
    ),
}


def disturbed(model):
    """Add noise to every parameter: biases and norms begin at 0 and 1, and would hide a swap."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def tiny_vae_of(scale):
    """4 latent channels, 8 pixels per latent position."""
    kinds = dict(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    sizes = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4)
    return AutoencoderKL(**kinds, **sizes, scaling_factor=scale).eval()


def save_lrm(folder, family, seed=0):
    """Write folder/lrm, an LRM as LPO saves it, and folder/base, its base model; return both."""
    torch.manual_seed(seed)
    lrm, base = folder / "lrm", folder / "base"
    unet = disturbed(UNet2DConditionModel(sample_size=8, norm_num_groups=4, **UNETS[family]))
    unet.save_pretrained(lrm / "unet")
    (base / "unet").mkdir(parents=True)
    unet.save_config(base / "unet")
    tokenizer = clip_tokenizer(["red", "blue", "circle", "square"], LENGTH)
    kinds = {"text_encoder": (CLIPTextModel, 16)}
    if family == "sdxl":
        kinds["text_encoder_2"] = CLIPTextModelWithProjection, 24
    for part, (kind, width) in kinds.items():
        sizes = dict(hidden_size=width, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
        config = CLIPTextConfig(projection_dim=width, **sizes, **token_settings(tokenizer))
        disturbed(kind(config)).save_pretrained(lrm / part)
        config.save_pretrained(base / part)
        tokenizer.save_pretrained(base / part.replace("text_encoder", "tokenizer"))
    old_names(lrm / "text_encoder" / "model.safetensors")
    tiny_vae_of(SCALES[family]).save_pretrained(base / "vae")
    width, features = (16, 8 + 16 + 32 + 32 + 32) if family == "sd15" else (24, 8 + 16 + 32 + 32)
    head = {"visual_projection": {"weight": torch.randn(width, features)}, "logit_scale": torch.tensor(2.6592)}
    if family == "sd15":
        head["text_projection"] = {"weight": torch.randn(width, width)}
    torch.save(head, lrm / "state_dict.pt")
    return lrm, base


def old_names(path):
    """Rename the tensors of a CLIPTextModel as transformers 4 names them; older versions also store position_ids."""
    tensors = load_file(path)
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(tensors, path, metadata={"format": "pt"})


def one_file(lrm, path):
    """Write an LRM as one file that holds all tensors, with those of a VAE; return its path."""
    tensors = {"vae.encoder.conv_in.weight": torch.zeros(2)}
    for weights in (file for part in ("unet", *PARTS) for file in (lrm / part).glob("*.safetensors")):
        part = weights.parent.name
        tensors |= {f"{part}.{name}": tensor for name, tensor in load_file(weights).items()}
    for name, value in torch.load(lrm / "state_dict.pt", weights_only=True).items():
        tensors |= {f"{name}.weight": value["weight"]} if name.endswith("projection") else {name: value}
    torch.save(tensors, path)
    return path
