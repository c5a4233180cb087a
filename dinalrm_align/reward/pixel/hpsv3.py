"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B with a head of three layers on a reward token. Score = mu of (mu, log sigma).

Weights: hub id MizzenAI/HPSv3, `HPSv3.safetensors`; tokenizer and sizes: Qwen/Qwen2-VL-7B-Instruct; code and weights
under the MIT licence, Qwen2-VL's under Apache-2.0. Scores lie between about -2 and 12. 16 GB in bfloat16.

Differences from the released code (package `hpsv3` 1.0.0), which change a score by rounding alone: pictures are resized
in torch, antialiased bicubic as PIL's but not rounded to bytes, so that gradients reach them; they go through one by
one; the language model's unused output layer is not kept. As there, and unlike Qwen2-VL itself, positions count up by
one over text and picture alike on all three rotary axes: the released forward leaves them out, and so it was trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AddedToken, AutoTokenizer, Qwen2VLConfig, Qwen2VLModel

from dinalrm_align.models.hub import check_source
from dinalrm_align.models.quantization import check_quantization, quantise_linears
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.hps_template import (
    INSTRUCTION_SHA256,
    SCRIPT,
    SUFFIX_SHA256,
    HPSTemplate,
    load_template,
)
from dinalrm_align.reward.pixel.qwen2vl import fitted_size, preprocess
from dinalrm_align.reward.pixel.weights import beside, check_fit, find_file, shapes_of
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import reading

SOURCE, WEIGHTS, BASE = "MizzenAI/HPSv3", "HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28
"""Every picture is resized to about so many: 448 x 448 for a square one, 256 tokens."""
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
EMBEDDING = "language_model.embed_tokens.weight"
RENAMED = (  # the file's prefixes (transformers before and since 4.52) and Qwen2VLModel's own
    ("model.visual.", "visual."),
    ("visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("model.", "language_model."),
    ("rm_head.", "rm_head."),
)


def rank_head(width: int) -> nn.Sequential:
    """Hidden state (..., width) -> (..., 2): mu and log sigma."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def add_reward_token(tokenizer: Any) -> None:
    """Give Qwen2-VL's tokenizer the token that the head reads, after all others: number 151657 in the released size."""
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True, normalized=False)], special_tokens=True)


class HPSv3Reward(PixelReward):
    """A frozen HPSv3 over latents or pictures; build one with `from_pretrained`."""

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
        """model: float weights or quantised ones; head: `rank_head`; tokenizer: with the reward token; pixels: PIXELS
        for the released weights."""
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
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "HPSv3Reward":
        """Load HPSv3.safetensors.

        Args:
            source: a hub id (with `revision`), a folder that holds the file, or the file.
            base: folder or hub id of Qwen2-VL-7B-Instruct: its config.json and tokenizer alone are read. Default:
                what lies beside the weights in a folder, else the hub's.
            template, template_sha256: where the instruction is read, and what it must hash to (`load_template`).
                Default: data_collator_qwen.py beside the weights, else the installed package `hpsv3`.
            vae: the decoder of the latents to be scored; without one, pictures alone can be scored.
            dtype: of the backbone, bfloat16 by default; the head stays in float32 (float64 beside a float64 backbone).
            quantization: "none", or "int8" or "nf4" for the linear layers of all blocks (bitsandbytes).

        Raises ValueError when the template is another, or when a tensor is missing, unexpected or of another shape;
        ImportError, OSError when a package or a file is missing. The template is checked before weights are read.
        """
        check_quantization(quantization)
        if template is None and (folder := beside(source, SCRIPT)):
            template = folder / SCRIPT
        text = load_template(template, sha256=template_sha256)
        device = torch.device("cpu") if device is None else available_device(device)
        dtype = dtype or torch.bfloat16
        base = base or beside(source, "config.json") or BASE
        check_source("base model", base)
        with reading("Qwen2-VL config and tokenizer", base):
            config = Qwen2VLConfig.from_pretrained(base, local_files_only=local_files_only)
            tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=local_files_only)
        add_reward_token(tokenizer)
        if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != config.image_token_id:
            raise ValueError(
                f"{base}: {IMAGE_TOKEN} has id {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}, by its config.json "
                f"expected {config.image_token_id}; give Qwen2-VL-7B-Instruct's folder as base"
            )
        path = find_file(source, WEIGHTS, revision=revision, local_files_only=local_files_only)
        place = torch.device("cpu") if quantization != "none" else device
        model, head = _read_model(path, config, len(tokenizer), place, dtype)
        if quantization != "none":
            quantise_linears(model.visual.blocks, quantization, device, dtype)
            quantise_linears(model.language_model.layers, quantization, device, dtype)
        return cls(model.to(device), head.to(device), tokenizer, text, vae=vae)

    @property
    def device(self) -> torch.device:
        return self.head[0].weight.device

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W) in [0, 1], B prompts -> mu (B,), float32, differentiable in the images."""
        with torch.autocast(images.device.type, enabled=False):  # the head is a float32 one
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
        """How many tokens a picture of that size becomes: one per merged patch."""
        vision = self.model.config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        rows, columns = fitted_size(height, width, factor=factor, low=self.pixels, high=self.pixels)
        return rows * columns // factor**2

    def token_ids(self, prompt: str, image_tokens: int) -> list[int]:
        """Qwen2-VL's chat around a picture and the filled template, up to where an answer would begin.

        786 tokens for the empty prompt and a square picture under the released template and tokenizer. ValueError for a
        prompt that holds one of the two tokens which the model looks for.
        """
        text = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            f"{IMAGE_TOKEN * image_tokens}<|vision_end|>{self.template.fill(prompt)}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        image_id = self.model.config.image_token_id
        if ids.count(self.reward_id) != 1 or ids.count(image_id) != image_tokens:
            raise ValueError(
                f"prompt {prompt!r:.80}: with it the text has {ids.count(self.reward_id)} {REWARD_TOKEN} and "
                f"{ids.count(image_id)} {IMAGE_TOKEN}; expected 1 and {image_tokens}: take them out of the prompt"
            )
        return ids


def renamed(name: str) -> str | None:
    """A tensor's name in Qwen2VLModel, or rm_head.*, for its name in the file; None for the unused output layer."""
    if name == "lm_head.weight":
        return None
    return next((new + name.removeprefix(old) for old, new in RENAMED if name.startswith(old)), name)


def _read_model(
    path: Path, config: Qwen2VLConfig, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> tuple[Qwen2VLModel, nn.Sequential]:
    """Backbone in `dtype` and head, from the file alone; ValueError unless each tensor is there and fits."""
    with reading("safetensors file", path):
        file = safe_open(path, framework="pt")
    with file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        own = {new: old for old in shapes if (new := renamed(old)) is not None}
        config.text_config.vocab_size = vocabulary
        with init_empty_weights():
            model, head = Qwen2VLModel(config), rank_head(config.text_config.hidden_size)
        rows = shapes.get(own.get(EMBEDDING), (vocabulary,))[0]
        if rows != vocabulary:
            raise ValueError(
                f"{path} has embeddings of {rows} tokens, the base model's tokenizer with {REWARD_TOKEN} {vocabulary}: "
                "the base model is not the one that it was trained from"
            )
        expected = shapes_of(model) | shapes_of(head, "rm_head.")
        check_fit(expected, {new: shapes[old] for new, old in own.items()}, path)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {
            new: file.get_tensor(old).to(device, exact if new.startswith("rm_head.") else dtype)
            for new, old in own.items()
        }
    for module, prefix in ((model, ""), (head, "rm_head.")):
        names = module.state_dict()
        module.load_state_dict({name: tensors[prefix + name] for name in names}, strict=True, assign=True)
    return model, head
