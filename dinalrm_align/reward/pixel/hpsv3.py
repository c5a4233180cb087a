"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B with a head of three layers on a reward token. Score = mu of (mu, log sigma).

Weights: hub id MizzenAI/HPSv3, `HPSv3.safetensors`; tokenizer and sizes: Qwen/Qwen2-VL-7B-Instruct; code and weights
under the MIT licence, Qwen2-VL's under Apache-2.0. Scores lie between about -2 and 12. 16 GB in bfloat16.

Differences from the released code (package `hpsv3` 1.0.0), which change a score by rounding alone: images are resized
in torch, antialiased bicubic as PIL's but not rounded to bytes, so that gradients reach them; they are scored one by
one; the language model's unused output layer is dropped. As in the released forward, and unlike Qwen2-VL itself,
positions increase by one per token, text and image alike, on all three rotary axes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AddedToken, Qwen2VLConfig, Qwen2VLModel

from dinalrm_align.models.hub import HubOptions, beside, check_source, find_file
from dinalrm_align.models.quantization import check_quantization, quantise_linears
from dinalrm_align.models.weights import assign_tensors, read_tensors, rename
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.hps_template import (
    INSTRUCTION_SHA256,
    SCRIPT,
    SUFFIX_SHA256,
    HPSTemplate,
    load_template,
)
from dinalrm_align.reward.pixel.prompts import load_tokenizer
from dinalrm_align.reward.pixel.qwen2vl import fitted_size, preprocess
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import reading

SOURCE, WEIGHTS, BASE = "MizzenAI/HPSv3", "HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28
"""Images are resized to about this many: 448 x 448 for a square one, 256 tokens."""
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
EMBEDDING = "model.language_model.embed_tokens.weight"
NAMES = {  # the file's prefixes (transformers before and since 4.52) to those of `HPSv3Reward`'s parts
    r"lm_head\.weight$": None,
    r"(model\.)?visual\.": "model.visual.",
    r"model\.(language_model\.)?": "model.language_model.",
}


def rank_head(width: int) -> nn.Sequential:
    """Hidden state (..., width) -> (..., 2): mu and log sigma."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def add_reward_token(tokenizer: Any) -> None:
    """Append the token that the head reads to Qwen2-VL's tokenizer: id 151657 in the released size."""
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True, normalized=False)], special_tokens=True)


class HPSv3Reward(PixelReward):
    """A frozen HPSv3 over latents or images. Load one with `from_pretrained`."""

    def __init__(
        self,
        model: Qwen2VLModel,
        head: nn.Sequential,
        tokenizer: Any,
        template: HPSTemplate,
        *,
        vae: AutoencoderKL | None = None,
        pixels: int = PIXELS,
    ) -> None:
        """model: possibly quantised; head: `rank_head`; tokenizer: with the reward token; pixels: as in training."""
        super().__init__(vae)
        self.model, self.head = model.requires_grad_(False), head.requires_grad_(False)
        self.tokenizer, self.template, self.pixels = tokenizer, template, pixels
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = SOURCE,
        *,
        base: str | Path | None = None,
        template: str | Path | None = None,
        template_sha256: tuple[str, str] = (INSTRUCTION_SHA256, SUFFIX_SHA256),
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantization: str = "none",
        **hub: Unpack[HubOptions],
    ) -> "HPSv3Reward":
        """Load HPSv3.safetensors. Further arguments and errors: see `reward.pixel`.

        Args:
            source: a hub id, a folder that holds the file, or the file.
            base: folder or hub id of Qwen2-VL-7B-Instruct, of which config.json and tokenizer are read; default:
                beside local weights, else the hub's.
            template, template_sha256: file of the instruction, and its expected hashes (`load_template`); default:
                data_collator_qwen.py beside local weights, else the installed package `hpsv3`.
            dtype: of the backbone; default: bfloat16. The head stays in float32 (float64 for a float64 backbone).
            quantization: none, or int8 or nf4 (bitsandbytes) for the linear layers of all blocks.

        The template is checked before weights are read: ValueError for another one, ImportError if it is missing.
        """
        check_quantization(quantization)
        if template is None and (folder := beside(source, SCRIPT)):
            template = folder / SCRIPT
        text = load_template(template, sha256=template_sha256)
        device = available_device(device or "cpu")
        dtype = dtype or torch.bfloat16
        base = base or beside(source, "config.json") or BASE
        check_source("base model", base)
        own = {name: value for name, value in hub.items() if name != "revision"}
        with reading("Qwen2-VL config", base):
            config = Qwen2VLConfig.from_pretrained(base, **own)
        tokenizer = load_tokenizer(base, **own)
        add_reward_token(tokenizer)
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
            raise ValueError(
                f"{base}: {IMAGE_TOKEN}: got id {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}, by its config.json "
                f"expected {config.image_token_id}; give Qwen2-VL-7B-Instruct's folder as base"
            )
        config.text_config.vocab_size = len(tokenizer)
        path = find_file(source, WEIGHTS, **hub)
        place = torch.device("cpu") if quantization != "none" else device
        model, head = _load_parts(path, config, place, dtype)
        if quantization != "none":
            quantise_linears(model.visual.blocks, quantization, device, dtype)
            quantise_linears(model.language_model.layers, quantization, device, dtype)
        return cls(model.to(device), head.to(device), tokenizer, text, vae=vae)

    @property
    def device(self) -> torch.device:
        return self.head[0].weight.device

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts -> mu (B,), float32, differentiable in the images."""
        with torch.autocast(images.device.type, enabled=False):  # the head stays in float32
            scores = [self._mean(image[None], prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.stack(scores).float()

    def _mean(self, image: Tensor, prompt: str) -> Tensor:
        """(1, 3, H, W) and a prompt -> mu (), in the head's dtype."""
        vision = self.model.config.vision_config
        values, (rows, columns) = preprocess(
            image,
            low=self.pixels,
            high=self.pixels,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
            frames=vision.temporal_patch_size,
        )
        ids = self.token_ids(prompt, rows * columns // vision.spatial_merge_size**2)
        hidden = self.model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.arange(len(ids), device=self.device).expand(3, 1, -1),
            pixel_values=values,
            image_grid_thw=torch.tensor([[1, rows, columns]], device=self.device),
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[0, ids.index(self.reward_id)].to(self.head[0].weight.dtype))[0]

    @property
    def reward_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    def image_tokens(self, height: int, width: int) -> int:
        """Tokens of an image of that size, one per merged patch."""
        vision = self.model.config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        rows, columns = fitted_size(height, width, factor=factor, low=self.pixels, high=self.pixels)
        return rows * columns // factor**2

    def token_ids(self, prompt: str, image_tokens: int) -> list[int]:
        """Qwen2-VL's chat with an image and the filled template, up to the start of the answer.

        786 tokens for the empty prompt and a square image with the released template and tokenizer. Raises ValueError
        for a prompt that contains the image token or the reward token.
        """
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"{IMAGE_TOKEN * image_tokens}<|vision_end|>{self.template.fill(prompt)}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        image_id = self.model.config.image_token_id
        if ids.count(self.reward_id) != 1 or ids.count(image_id) != image_tokens:
            raise ValueError(
                f"prompt {prompt!r:.80}: got {ids.count(self.reward_id)} {REWARD_TOKEN} and {ids.count(image_id)} "
                f"{IMAGE_TOKEN} in the text; expected 1 and {image_tokens}: take them out of the prompt"
            )
        return ids


def _load_parts(
    path: Path, config: Qwen2VLConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Qwen2VLModel, nn.Sequential]:
    """Backbone in `dtype` and head; strict."""
    tensors = rename(read_tensors(path), NAMES)
    rows, expected = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None, config.text_config.vocab_size
    if rows not in (None, expected):
        raise ValueError(
            f"{path}: got embeddings of {rows} tokens; expected {expected}, those of the base model's tokenizer with "
            f"{REWARD_TOKEN}: give the base model that the weights were trained from"
        )
    with init_empty_weights():
        model, head = Qwen2VLModel(config), rank_head(config.text_config.hidden_size)
    parts = nn.ModuleDict({"model": model, "rm_head": head})
    assign_tensors(parts, tensors, path, dtype=dtype, device=device, keep_in_fp32="rm_head.")
    return model, head
