"""HPSv3 (arXiv 2508.03789): Qwen2-VL-7B with a three-layer head that predicts (mu, log sigma). The score is mu.

The weights are HPSv3.safetensors of hub id MizzenAI/HPSv3; tokenizer and config are those of Qwen/Qwen2-VL-7B-Instruct.
HPSv3 is MIT, Qwen2-VL is Apache-2.0. Scores are between about -2 and 12. The model takes 16 GB in bfloat16.

HPSv3 was trained with one fixed instruction, and its scores are meaningless with any other. The instruction is read
from the user's copy of the PyPI package `hpsv3` (MIT) and verified by its hash. The package is not imported, since it
requires another version of transformers.

Three differences from the released code (`hpsv3` 1.0.0) change scores only by rounding errors:

- Images are resized in torch, with antialiased bicubic interpolation as in PIL but without rounding to bytes, so that
  gradients reach the images.
- Images are scored one at a time.
- The language model's unused output layer is dropped.

As in the released code but unlike Qwen2-VL, positions on all three rotary axes increase by one per text or image token.
"""

import ast
import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import AddedToken, Qwen2VLConfig, Qwen2VLModel

from dinalrm_align.models.preprocess import normalise, resize
from dinalrm_align.models.quantization import check_quantization, quantise_linears
from dinalrm_align.models.weights import (
    HubOptions,
    assign_tensors,
    beside,
    check_source,
    find_file,
    read_entries,
    read_tensors,
    rename,
)
from dinalrm_align.reward.pixel.base import PixelReward, load_tokenizer
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import read_json, read_text, reading

SOURCE, WEIGHTS, BASE = "MizzenAI/HPSv3", "HPSv3.safetensors", "Qwen/Qwen2-VL-7B-Instruct"
PIXELS = 256 * 28 * 28
"""Approximate number of pixels after resizing: a square image becomes 448 x 448, which gives 256 image tokens."""
MAX_RATIO = 200
"""Largest ratio of the long to the short side, as in Qwen2-VL's code."""
REWARD_TOKEN, IMAGE_TOKEN = "<|Reward|>", "<|image_pad|>"
EMBEDDING = "model.language_model.embed_tokens.weight"
NAMES = {  # prefixes in the file (of transformers before and since 4.52) -> prefixes in `HPSv3Reward`
    r"lm_head\.weight$": None,
    r"(model\.)?visual\.": "model.visual.",
    r"model\.(language_model\.)?": "model.language_model.",
}
TEXTS = ("INSTRUCTION", "prompt_with_special_token")
"""Names of two constants in the package: the instruction (2523 characters, one {text_prompt}) and the text after it."""
SHA256 = (
    "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a",
    "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a",
)
"""SHA-256 hashes of the instruction and of the text after it."""
SCRIPT, FIELD = "data_collator_qwen.py", "{text_prompt}"
HOW_TO_GET = (
    "run `pip install --no-deps hpsv3==1.0.0`, or pass template=, the path of that package's "
    f"hpsv3/dataset/{SCRIPT} or of a JSON file with these two texts"
)


def rank_head(width: int) -> nn.Sequential:
    """Return HPSv3's head, which maps hidden states (..., width) to (..., 2): mu and log sigma."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def add_reward_token(tokenizer: Any) -> None:
    """Add the token <|Reward|> to Qwen2-VL's tokenizer. HPSv3's head reads the hidden state at this token."""
    tokenizer.add_tokens([AddedToken(REWARD_TOKEN, special=True, normalized=False)], special_tokens=True)


@dataclass(frozen=True)
class HPSTemplate:
    """HPSv3's text after an image: `instruction`, with the prompt in place of {text_prompt}, followed by `suffix`."""

    instruction: str
    suffix: str

    def __post_init__(self) -> None:
        if self.instruction.count(FIELD) != 1:
            raise ValueError(f"instruction: got {self.instruction.count(FIELD)} {FIELD}; expected one")

    def fill(self, prompt: str) -> str:
        return self.instruction.replace(FIELD, prompt) + self.suffix


@dataclass(frozen=True)
class Release:
    """What distinguishes the releases that share this code, HPSv3 and HPSv3++.

    Args:
        model: name of the reward.
        weights: name of the weights file. base: hub id of the base model.
        base_file: a file that is beside the weights only if the base model's config and tokenizer are.
        config, backbone: classes of transformers. head: function that makes the head for hidden states of a width.
        names: rules for `rename`, from names in the file to names in the reward.
        sha256: hashes of the template's two texts. how: how to get them, for error messages.
        opening: system message that begins a chat in the base model's chat template.
    """

    model: str
    weights: str
    base: str
    base_file: str
    config: type
    backbone: type
    head: Callable[[int], nn.Module]
    names: Mapping[str, str | None]
    sha256: tuple[str, str]
    how: str
    opening: str


HPSV3 = Release(
    "HPSv3", WEIGHTS, BASE, "config.json", Qwen2VLConfig, Qwen2VLModel, rank_head, NAMES, SHA256, HOW_TO_GET,
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
)  # fmt: skip


def load_template(
    source: str | Path | None = None, *, sha256: tuple[str, str] | None = None, release: Release = HPSV3
) -> HPSTemplate:
    """Return HPSv3's instruction and its suffix. Raise ValueError if either is missing or has an unexpected hash.

    source: JSON file, or data_collator_qwen.py of the PyPI package `hpsv3`, which is parsed but not run. Default:
    data_collator_qwen.py of the installed package. sha256: expected hashes of instruction and suffix; default: those of
    the release.
    """
    model, how = release.model, release.how
    if source is None:
        spec = importlib.util.find_spec("hpsv3")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"{model} needs its instruction, and the package hpsv3 is not installed; {how}")
        source = Path(spec.submodule_search_locations[0]) / "dataset" / SCRIPT
    path = Path(source)
    if path.suffix == ".json":
        found = read_json(path, f"{model}'s template: {how}")
    else:
        found = _assigned(read_text(path, "template", how), path, how)
    texts = [found.get(name) for name in TEXTS]
    for name, text, expected in zip(TEXTS, texts, sha256 or release.sha256, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{path}: no text {name}; {how}")
        got = hashlib.sha256(text.encode()).hexdigest()
        if got != expected:
            hashes = f"got SHA-256 {got:.12}...; expected {expected:.12}..."
            raise ValueError(f"{path}: {name} is not the text that {model} was trained with ({hashes}); {how}")
    return HPSTemplate(*texts)


def _assigned(source: str, path: Path, how: str) -> dict[str, Any]:
    """Return {name: value} of the constants that the Python code `source` assigns at module level."""
    try:
        statements = ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path}: not Python source ({error}); {how}") from error
    assigned = [(part.targets[0], part.value) for part in statements if isinstance(part, ast.Assign)]
    return {n.id: v.value for n, v in assigned if isinstance(n, ast.Name) and isinstance(v, ast.Constant)}


def fitted_size(height: int, width: int, *, factor: int, pixels: int) -> tuple[int, int]:
    """Return (height, width), both multiples of `factor`, with about `pixels` pixels and almost the original aspect.

    The rule is Qwen2-VL's with min_pixels = max_pixels. Sides are rounded to the nearest multiple of `factor`. If the
    rounded size has too many pixels, the original size is scaled to `pixels` pixels and rounded down instead. If the
    rounded size has too few, the original size is scaled to `pixels` pixels and rounded up.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"images of {height} x {width}: one side is over {MAX_RATIO} times the other; crop them")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > pixels:
        shrink = math.sqrt(height * width / pixels)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < pixels:
        stretch = math.sqrt(pixels / (height * width))
        sides = [math.ceil(side * stretch / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def image_patches(
    images: Tensor, *, pixels: int, patch: int = 14, merge: int = 2, frames: int = 2
) -> tuple[Tensor, tuple[int, int]]:
    """Return patches (B * rows * columns, 3 * frames * patch^2), float32, and each image's grid size (rows, columns).

    Images (B, 3, H, W) in [0, 1] are resized to `fitted_size` and normalised. Each image is repeated as `frames` equal
    video frames. Patches that Qwen2-VL merges into one token (merge x merge) are consecutive.
    """
    size = fitted_size(*images.shape[-2:], factor=patch * merge, pixels=pixels)
    return patches_of(normalise(resize(images, size)), patch=patch, merge=merge, frames=frames)


def patches_of(images: Tensor, *, patch: int, merge: int, frames: int) -> tuple[Tensor, tuple[int, int]]:
    """Return patches and grid size, as `image_patches`, of normalised images with sides of whole merged patches."""
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    blocks = images.reshape(len(images), 3, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, block row, block column, row, column, C, y, x
    blocks = blocks.unsqueeze(6).expand(*blocks.shape[:6], frames, patch, patch)
    return blocks.reshape(len(images) * rows * columns, 3 * frames * patch * patch), (rows, columns)


class HPSv3Reward(PixelReward):
    """A frozen HPSv3 reward of latents or images. Load one with `from_pretrained`."""

    release = HPSV3

    def __init__(
        self,
        model: Any,
        head: nn.Module,
        tokenizer: Any,
        template: HPSTemplate,
        vae: AutoencoderKL | None = None,
        pixels: int = PIXELS,
    ) -> None:
        """model, head: of the kinds that `release` names. tokenizer: must have the token <|Reward|>. pixels: pixels of
        a resized image.
        """
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
        template_sha256: tuple[str, str] | None = None,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantization: str = "none",
        **hub: Unpack[HubOptions],
    ) -> Self:
        """Load the released weights. The arguments not listed here, and the errors, are documented in `reward.pixel`.

        Args:
            base: folder or hub id of the base model's config and tokenizer. Default: the folder of local weights if it
                contains them, else the hub.
            template: file of the instruction, as in `load_template`. Default: data_collator_qwen.py in the folder of
                local weights, else in the installed package `hpsv3`.
            template_sha256: expected SHA-256 hashes of instruction and suffix; default: those of the released texts.
            dtype: data type of the backbone; default: bfloat16. The head is float32 (float64 for a float64 backbone).
            quantization: bitsandbytes format of the linear layers in all blocks: none, int8 or nf4.
        """
        release = cls.release
        check_quantization(quantization)
        if template is None and (folder := beside(source, SCRIPT)):
            template = folder / SCRIPT
        text = load_template(template, sha256=template_sha256, release=release)
        device = available_device(device or "cpu")
        dtype = dtype or torch.bfloat16
        config, tokenizer = _load_base(release, base or beside(source, release.base_file) or release.base, **hub)
        path = find_file(source, release.weights, **hub)
        place = device if quantization == "none" else torch.device("cpu")
        model, head = _load_parts(release, path, config, place, dtype)
        if quantization != "none":
            for blocks in (model.visual.blocks, model.language_model.layers):
                quantise_linears(blocks, quantization, device, dtype)
        return cls(model.to(device), head.to(device), tokenizer, text, vae=vae)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return mu (B,), float32, of images (B, 3, H, W) in [0, 1] for B prompts, differentiable in the images."""
        scores = [self._mean(image[None], prompt) for image, prompt in zip(images, prompts, strict=True)]
        return torch.stack(scores).float()

    def _mean(self, image: Tensor, prompt: str) -> Tensor:
        """Return mu, a scalar in the head's dtype, of one image (1, 3, H, W) and one prompt."""
        vision = self.model.config.vision_config
        merge = vision.spatial_merge_size
        values, grid = self._patches(image, patch=vision.patch_size, merge=merge, frames=vision.temporal_patch_size)
        ids = self.token_ids(prompt, math.prod(grid) // merge**2)
        tokens, grid = torch.tensor([ids], device=self.device), torch.tensor([[1, *grid]], device=self.device)
        hidden = self.model(
            input_ids=tokens,
            position_ids=self._positions(tokens, grid),
            pixel_values=values,
            image_grid_thw=grid,
            use_cache=False,
        ).last_hidden_state
        return self.head(hidden[0, ids.index(self.reward_id)].to(next(self.head.parameters()).dtype))[0]

    def _patches(self, image: Tensor, **sizes: int) -> tuple[Tensor, tuple[int, int]]:
        return image_patches(image, pixels=self.pixels, **sizes)

    def _positions(self, tokens: Tensor, grid: Tensor) -> Tensor:
        """Return positions (3, 1, L) of tokens (1, L). grid: (1, 3), frames, rows and columns of the image."""
        return torch.arange(tokens.shape[1], device=self.device).expand(3, 1, -1)

    @property
    def reward_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    def token_ids(self, prompt: str, image_tokens: int) -> list[int]:
        """Return the token ids of a chat with `image_tokens` image tokens and the filled template.

        With the released template, an empty prompt and a square image give 786 ids. Raises ValueError if the prompt
        contains the image token or the reward token.
        """
        text = (
            f"{self.release.opening}<|im_start|>user\n<|vision_start|>"
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


def _load_base(release: Release, base: str | Path, **hub: Unpack[HubOptions]) -> tuple[Any, Any]:
    """Return the base model's config and tokenizer, with the token <|Reward|>. `revision` is not used."""
    check_source("base model", base, **hub)
    own = {name: value for name, value in hub.items() if name != "revision"}
    with reading(f"{release.base} config", base):
        config = release.config.from_pretrained(base, **own)
    tokenizer = load_tokenizer(base, **own)
    add_reward_token(tokenizer)
    if (got := tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)) != config.image_token_id:
        problem = f"got id {got}, by its config.json expected {config.image_token_id}"
        raise ValueError(f"{base}: {IMAGE_TOKEN}: {problem}; give the folder of {release.base} as base")
    config.text_config.vocab_size = len(tokenizer)
    return config, tokenizer


def _load_parts(
    release: Release, path: Path, config: Any, device: torch.device, dtype: torch.dtype
) -> tuple[Any, nn.Module]:
    """Return backbone and head with the weights in `path`, a dict of tensors or, in a .pth, its entry "model"."""
    key = "model" if path.suffix == ".pth" and "model" in read_entries(path) else None
    tensors = rename(read_tensors(path, key), release.names)
    rows, expected = tensors[EMBEDDING].shape[0] if EMBEDDING in tensors else None, config.text_config.vocab_size
    if rows not in (None, expected):
        raise ValueError(
            f"{path}: got embeddings of {rows} tokens; expected {expected}, the base model's tokenizer with "
            f"{REWARD_TOKEN}: give the base model that the weights were trained from"
        )
    with init_empty_weights():
        model, head = release.backbone(config), release.head(config.text_config.hidden_size)
    parts = nn.ModuleDict({"model": model, "rm_head": head})
    assign_tensors(parts, tensors, path, dtype=dtype, device=device, keep_in_fp32="rm_head.")
    return model, head
