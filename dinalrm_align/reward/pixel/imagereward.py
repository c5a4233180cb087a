"""ImageReward (arXiv 2304.05977): BLIP's ViT-L, BERT with cross-attention to image tokens, and a linear head on [CLS].

Weights: `ImageReward.pt` and `med_config.json` of hub id THUDM/ImageReward. Tokenizer: google-bert/bert-base-uncased.
Code and weights are Apache-2.0, BLIP is BSD-3-Clause. Score: (head output - 0.1672) / 1.0333, between about -2 and 2.

Tensors are renamed to the names in transformers' BLIP. Images are resized to a short side of 224 (antialiased bicubic),
centre-cropped and normalised as for CLIP. Prompts are truncated to 35 tokens, as in training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AddedToken, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from dinalrm_align.models.preprocess import normalise, resize
from dinalrm_align.models.weights import HubOptions, assign_tensors, beside, find_file, read_tensors, rename
from dinalrm_align.reward.pixel.base import PixelReward, load_tokenizer, tokenise
from dinalrm_align.reward.pixel.clip_h import encoder_sizes, image_sizes, shape_of
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import read_json, reading

SOURCE, WEIGHTS, TEXT_CONFIG = "THUDM/ImageReward", "ImageReward.pt", "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's output on the training images."""
TEXT_LENGTH = 35
HEAD_WIDTH = 64
"""Channels per attention head in BLIP's vision tower."""
_BLOCK = r"blip\.visual_encoder\.blocks\.(\d+)\."
_LAYER = r"vision.encoder.layers.\1."
NAMES = {  # names in the file -> names in transformers' vision and text towers and the head
    r"blip\.text_encoder\..*position_ids$": None,
    r"blip\.text_encoder\.": "text.",
    _BLOCK + r"norm(\d)\.": _LAYER + r"layer_norm\2.",
    _BLOCK + r"attn\.proj\.": _LAYER + "self_attn.projection.",
    _BLOCK + r"attn\.": _LAYER + "self_attn.",
    _BLOCK: _LAYER,
    r"blip\.visual_encoder\.cls_token$": "vision.embeddings.class_embedding",
    r"blip\.visual_encoder\.pos_embed$": "vision.embeddings.position_embedding",
    r"blip\.visual_encoder\.patch_embed\.proj\.": "vision.embeddings.patch_embedding.",
    r"blip\.visual_encoder\.norm\.": "vision.post_layernorm.",
    r"blip\.visual_encoder\.": "vision.",
    r"blip\.": None,  # heads of BLIP's pretraining
    r"mlp\.layers\.": "head.",
}
TEXT_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings", "layer_norm_eps", "hidden_act",
)  # fmt: skip


def read_text_config(path: Path) -> BlipTextConfig:
    """Return BERT's config from med_config.json. Raise ValueError if a size is missing or cross-attention is off."""
    values = read_json(path, "ImageReward's med_config.json")
    missing = [name for name in TEXT_SIZES if name not in values]
    if missing or not values.get("add_cross_attention", False):
        problem = f"missing {', '.join(missing)}" if missing else "add_cross_attention is not true"
        raise ValueError(f"{path}: {problem}; expected ImageReward's med_config.json")
    with reading("text config", path):  # is_decoder adds cross-attention; attention stays bidirectional
        return BlipTextConfig(**{name: values[name] for name in TEXT_SIZES}, is_decoder=True)


def score_head(width: int) -> nn.Sequential:
    """Return ImageReward's head: linear layers from [CLS] (B, width) to (B, 1), without activation functions."""
    first = (nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2))
    return nn.Sequential(*first, nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1))


class ImageRewardReward(PixelReward):
    """A frozen ImageReward model for latents or images. Load one with `from_pretrained`."""

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: nn.Sequential,
        tokenizer: Any,
        vae: AutoencoderKL | None,
    ) -> None:
        super().__init__(vae)
        self.vision, self.text, self.head = (part.requires_grad_(False) for part in (vision, text, head))
        self.tokenizer = tokenizer
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = SOURCE,
        *,
        tokenizer: str | Path | None = None,
        med_config: str | Path | None = None,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub: Unpack[HubOptions],
    ) -> "ImageRewardReward":
        """Load ImageReward.pt. The arguments not listed here, and the errors, are documented in `reward.pixel`.

        Args:
            tokenizer: folder or hub id of the BERT tokenizer; default: the folder of local weights, else the hub.
            med_config: path of med_config.json; default: med_config.json in the folder or hub id of the weights.
        """
        device = available_device(device or "cpu")
        path = find_file(source, WEIGHTS, **hub)
        place = path.parent if Path(source).is_file() else source
        text_config = read_text_config(find_file(med_config or place, TEXT_CONFIG, what="text config", **hub))
        tokenizer = tokenizer or beside(source, "tokenizer.json", "vocab.txt") or TOKENIZER
        hub.pop("revision", None)
        words = load_tokenizer(tokenizer, **hub)
        words.add_tokens([AddedToken(token, special=True) for token in ("[DEC]", "[ENC]")], special_tokens=True)
        if len(words) != text_config.vocab_size:
            problem = (
                f"got {len(words)} tokens with [DEC] and [ENC], by {TEXT_CONFIG} expected {text_config.vocab_size}"
            )
            raise ValueError(f"tokenizer {tokenizer}: {problem}: give bert-base-uncased's")
        parts = _load_parts(path, text_config, dtype or torch.float32, device)
        return cls(**parts, tokenizer=words, vae=vae)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32, of images (B, 3, H, W) in [0, 1] for B prompts, differentiable in the images."""
        tokens = tokenise(self.tokenizer, prompts, TEXT_LENGTH, self.device)
        seen = self.vision(preprocess(images, self.vision.config.image_size)).last_hidden_state
        read = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        return (self.head(read.last_hidden_state[:, 0]).float().squeeze(-1) - MEAN) / STD


def preprocess(images: Tensor, side: int) -> Tensor:
    """Resize the short side of images (B, 3, H, W) in [0, 1] to `side`, crop the centre, normalise. Returns float32.

    Output values differ from those of torchvision's PIL transforms by at most 0.1, and by 0.005 on average.
    """
    short = min(images.shape[-2:])
    images = resize(images, tuple(side * length // short for length in images.shape[-2:]))
    top, left = (round((length - side) / 2) for length in images.shape[-2:])  # half to even, as torchvision's crop
    return normalise(images[..., top : top + side, left : left + side])


def _load_parts(path: Path, text_config: BlipTextConfig, dtype: torch.dtype, device: torch.device) -> nn.ModuleDict:
    """Return the modules vision, text and head, loaded from `path`. The tensors' shapes determine vision's sizes."""
    tensors = rename(read_tensors(path), NAMES)
    positions = shape_of(tensors, "vision.embeddings.position_embedding", 3, path)
    patches = shape_of(tensors, "vision.embeddings.patch_embedding.weight", 4, path)
    sizes = encoder_sizes(tensors, "vision", HEAD_WIDTH, path) | image_sizes(positions, patches, path)
    vision_config = BlipVisionConfig(**sizes, layer_norm_eps=1e-6)
    text_config.encoder_hidden_size = vision_config.hidden_size
    with reading("text config", TEXT_CONFIG), init_empty_weights():
        vision, text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
        parts = nn.ModuleDict({"vision": vision, "text": text, "head": score_head(text_config.hidden_size)})
    assign_tensors(parts, tensors, path, dtype=dtype, device=device)
    return parts
