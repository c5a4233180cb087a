"""ImageReward (arXiv 2304.05977): BLIP's ViT-L and a BERT that attends to the picture, then a linear head on [CLS].

Weights: hub id THUDM/ImageReward, `ImageReward.pt` and `med_config.json`; tokenizer google-bert/bert-base-uncased; code
and weights under Apache-2.0, BLIP's under BSD-3-Clause. score = (head - 0.1672) / 1.0333, between about -2 and 2.

The file's own names are mapped to transformers' BLIP; it is read as tensors alone. Pictures: short side to 224,
antialiased bicubic, centre crop, CLIP's normalisation. Prompts are cut off at 35 tokens, as in training.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AddedToken, AutoTokenizer, BlipTextConfig, BlipVisionConfig, BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from dinalrm_align.models.hub import check_source
from dinalrm_align.models.preprocess import normalise, resize
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.tensor_files import read_state_dict
from dinalrm_align.reward.pixel.weights import beside, check_fit, find_file, shapes_of
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import read_json, reading
from dinalrm_align.train.settings import check_fields

SOURCE, WEIGHTS, TEXT_CONFIG = "THUDM/ImageReward", "ImageReward.pt", "med_config.json"
TOKENIZER = "google-bert/bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's numbers on the training pictures."""
TEXT_LENGTH = 35
HEAD_WIDTH = 64
"""Of an attention head in both of BLIP's vision towers."""
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp."
RENAMED = (  # a block of the vision tower: the file's names and transformers'
    ("norm1.", "layer_norm1."),
    ("norm2.", "layer_norm2."),
    ("attn.qkv.", "self_attn.qkv."),
    ("attn.proj.", "self_attn.projection."),
    ("mlp.", "mlp."),
)
STEM = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}


@dataclasses.dataclass(frozen=True)
class TextTower:
    """What a med_config.json says of the BERT with cross-attention."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    hidden_act: str

    @classmethod
    def from_file(cls, path: Path) -> "TextTower":
        """ValueError for a file that lacks a size, or says something else of the tower than ImageReward's."""
        values = read_json(path, "ImageReward's med_config.json")
        missing = [field.name for field in dataclasses.fields(cls) if field.name not in values]
        if missing:
            raise ValueError(f"{path}: missing {', '.join(missing)}; expected ImageReward's med_config.json")
        if not values.get("add_cross_attention", False):
            raise ValueError(f"{path}: add_cross_attention is not true; expected ImageReward's med_config.json")
        try:
            return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __post_init__(self) -> None:
        check_fields(self, "med_config")


def score_head(width: int) -> nn.Sequential:
    """[CLS] (B, width) -> (B, 1). Linear throughout: the released head has no activations."""
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


class ImageRewardReward(PixelReward):
    """A frozen ImageReward over latents or pictures; build one with `from_pretrained`."""

    def __init__(
        self,
        vision: BlipVisionModel,
        text: BlipTextModel,
        head: nn.Sequential,
        tokenizer: Any,
        *,
        vae: AutoencoderKL | None = None,
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
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "ImageRewardReward":
        """Load ImageReward.pt.

        Args:
            source: a hub id (with `revision`), a folder with ImageReward.pt and med_config.json, or the .pt file.
            tokenizer: folder or hub id of bert-base-uncased's tokenizer. Default: what lies beside the weights in a
                folder, else the hub's.
            med_config: the file; default: beside the weights.
            vae: the decoder of the latents to be scored; without one, pictures alone can be scored.
            dtype: of towers and head, float32 by default.

        Raises ValueError when a tensor is missing, unexpected or of another shape, or when the file holds code;
        OSError when a file is missing.
        """
        device = torch.device("cpu") if device is None else available_device(device)
        options = dict(revision=revision, local_files_only=local_files_only)
        path = find_file(source, WEIGHTS, **options)
        place = path.parent if Path(source).is_file() else source
        sizes = TextTower.from_file(find_file(med_config or place, TEXT_CONFIG, what="text config", **options))
        tokenizer = tokenizer or beside(source, "tokenizer.json", "vocab.txt") or TOKENIZER
        check_source("tokenizer", tokenizer)
        with reading("tokenizer", tokenizer):
            words = AutoTokenizer.from_pretrained(tokenizer, local_files_only=local_files_only)
        words.add_tokens([AddedToken(token, special=True) for token in ("[DEC]", "[ENC]")], special_tokens=True)
        if len(words) != sizes.vocab_size:
            raise ValueError(
                f"tokenizer {tokenizer}: {len(words)} tokens with [DEC] and [ENC], by {TEXT_CONFIG} expected "
                f"{sizes.vocab_size}; give bert-base-uncased's"
            )
        vision, text, head = _build(read_state_dict(path), sizes, path, dtype or torch.float32)
        return cls(vision.to(device), text.to(device), head.to(device), words, vae=vae)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts -> scores (B,), float32, differentiable in the images."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        ).to(self.device)
        with torch.autocast(images.device.type, enabled=False):
            seen = self.vision(preprocess(images, self.vision.config.image_size)).last_hidden_state
            read = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
            return (self.head(read.last_hidden_state[:, 0]).float().squeeze(-1) - MEAN) / STD


def preprocess(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, side, side), float32: short side to `side`, the middle, normalised.

    Within 0.1 of torchvision's transforms on a PIL picture in normalised units, 0.005 on average.
    """
    short = min(images.shape[-2:])
    images = resize(images, tuple(side * length // short for length in images.shape[-2:]))
    top, left = (round((length - side) / 2) for length in images.shape[-2:])  # half to even, as torchvision's crop
    return normalise(images[..., top : top + side, left : left + side])


def renamed(name: str) -> str | None:
    """A tensor's name in {vision, text, head} for its name in the file; None for what scoring does not need."""
    if name.startswith(TEXT):
        return None if name.endswith("position_ids") else "text." + name.removeprefix(TEXT)
    if name.startswith(VISION):
        own = name.removeprefix(VISION)
        if own.startswith("blocks."):
            _, index, rest = own.split(".", 2)
            rest = next((new + rest.removeprefix(old) for old, new in RENAMED if rest.startswith(old)), rest)
            return f"vision.encoder.layers.{index}.{rest}"
        return "vision." + STEM.get(own, own)
    if name.startswith("mlp.layers."):
        return "head." + name.removeprefix("mlp.layers.")
    return None if name.startswith("blip.") else name  # heads of BLIP's pretraining


def _build(
    tensors: Mapping[str, Tensor], sizes: TextTower, path: Path, dtype: torch.dtype
) -> tuple[BlipVisionModel, BlipTextModel, nn.Sequential]:
    """The towers and the head; ValueError unless each tensor is there, fits, and none is left."""
    found = {new: tensor for name, tensor in tensors.items() if (new := renamed(name)) is not None}
    vision_config = _vision_config(found, path)
    text_config = BlipTextConfig(
        **dataclasses.asdict(sizes),
        encoder_hidden_size=vision_config.hidden_size,
        is_decoder=True,  # has cross-attention; it reads in both directions all the same
    )
    with reading("text config", TEXT_CONFIG), init_empty_weights():
        parts = {
            "vision": BlipVisionModel(vision_config),
            "text": BlipTextModel(text_config, add_pooling_layer=False),
            "head": score_head(sizes.hidden_size),
        }
    expected = {name: shape for part, module in parts.items() for name, shape in shapes_of(module, f"{part}.").items()}
    check_fit(expected, {name: tensor.shape for name, tensor in found.items()}, path)
    for part, module in parts.items():
        own = {name: found[f"{part}.{name}"].to(dtype) for name in module.state_dict()}
        module.load_state_dict(own, strict=True, assign=True)
    return parts["vision"], parts["text"], parts["head"]


def _vision_config(found: Mapping[str, Tensor], path: Path) -> BlipVisionConfig:
    """The vision tower's sizes, read off its tensors: ViT-L/16 at 224 pixels in the released file."""
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    stem = ["vision." + name for name in STEM.values()]
    first = "vision.encoder.layers.0.mlp.fc1.weight"
    missing = [name for name in (*stem, first) if name not in shapes]
    if missing:
        raise ValueError(f"{path}: not the tensors of this reward: missing {', '.join(missing[:3])}")
    positions, patch = (
        shapes["vision.embeddings.position_embedding"],
        shapes["vision.embeddings.patch_embedding.weight"],
    )
    side = math.isqrt(max(0, positions[1] - 1)) if len(positions) == 3 else 0
    fits = side > 0 and side * side + 1 == positions[1] and positions[2] % HEAD_WIDTH == 0
    if not fits or len(patch) != 4 or len(shapes[first]) != 2:
        raise ValueError(
            f"{path}: positions {positions}, patches {patch}; expected (1, n^2 + 1, width), (width, 3, p, p), and a "
            f"width in multiples of {HEAD_WIDTH}"
        )
    return BlipVisionConfig(
        hidden_size=positions[2],
        intermediate_size=shapes[first][0],
        num_hidden_layers=len({name.split(".")[3] for name in shapes if name.startswith("vision.encoder.layers.")}),
        num_attention_heads=positions[2] // HEAD_WIDTH,
        image_size=side * patch[3],
        patch_size=patch[3],
        layer_norm_eps=1e-6,
    )
