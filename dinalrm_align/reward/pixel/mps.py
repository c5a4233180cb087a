"""MPS, the multi-dimensional preference score (arXiv 2405.14705): CLIP ViT-H/14 with cross-attention to the text.

    score = exp(logit_scale) cos(text, image after four blocks of cross-attention to the relevant words of the prompt)

A preference dimension is selected by a list of words, the condition. A prompt word is relevant if its text feature is
similar to that of a condition word. Code and weights are MIT: https://github.com/Kwai-Kolors/MPS, whose README links to
MPS_overall_checkpoint.pth. The checkpoint is a pickled module, of which only the tensors are read. To convert the
checkpoint to safetensors:

    python -m dinalrm_align.reward.pixel.mps MPS_overall_checkpoint.pth mps.safetensors

The tokenizer and preprocessor are those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K. The upstream code computes in
float16. This module computes in `dtype` (default float32). Because of rounding, the two can disagree on whether a
prompt word is relevant.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from jsonargparse import auto_cli
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPModel

from dinalrm_align.models.weights import (
    HubOptions,
    assign_tensors,
    find_file,
    read_module_tensors,
    read_tensors,
    rename,
)
from dinalrm_align.reward.names import CLIP_H
from dinalrm_align.reward.pixel.base import PixelReward, cached, load_tokenizer, tokenise
from dinalrm_align.reward.pixel.clip import load_preprocess
from dinalrm_align.reward.pixel.clip_h import build_clip_h, shape_of
from dinalrm_align.train.command import refusing
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import atomically

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""Words that select the overall preference. Subsets of these words select MPS's other dimensions."""
THRESHOLD = 0.3
"""A word is attended to if its relevance exceeds this fraction of the largest relevance in the prompt."""
FILE = "MPS_overall_checkpoint.pth"
MAX_CACHED = 1000
"""Number of prompts whose text features are cached. The features of a prompt take about 300 kB in float32."""

_CROSS, _SELF = (rf"cross_model\.layers\.(\d+)\.{part}\.fn\." for part in (0, 1))
NAMES = {  # names in the file -> names in a list of `CrossBlock`
    r".*\.inv_freq$": None,  # rotary frequencies, which `rotate` computes
    _CROSS + r"norm\.": r"\1.cross_norm.",
    _CROSS + r"to_q\.": r"\1.query.",
    _CROSS + r"to_kv\.": r"\1.key_value.",
    _CROSS + r"to_out\.": r"\1.cross_out.",
    _CROSS + r"ff\.0\.": r"\1.cross_up.",
    _CROSS + r"ff\.2\.": r"\1.cross_down.",
    _SELF + r"norm\.": r"\1.self_norm.",
    _SELF + r"fused_attn_ff_proj\.": r"\1.self_in.",
    _SELF + r"attn_out\.": r"\1.self_out.",
    _SELF + r"ff_out\.1\.": r"\1.self_down.",
}


class CrossBlock(nn.Module):
    """Image tokens attend to the text, then to each other. Each multi-query attention is parallel to a SwiGLU MLP."""

    def __init__(self, width: int, heads: int, head_width: int, inner: int) -> None:
        super().__init__()
        self.heads, self.head_width, self.inner = heads, head_width, inner
        across = heads * head_width
        self.cross_norm, self.self_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, across, bias=False)
        self.key_value = nn.Linear(width, 2 * head_width, bias=False)
        self.cross_out = nn.Linear(across, width, bias=False)
        self.cross_up = nn.Linear(width, 2 * inner, bias=False)
        self.cross_down = nn.Linear(inner, width, bias=False)
        self.self_in = nn.Linear(width, across + 2 * head_width + 2 * inner, bias=False)
        self.self_out = nn.Linear(across, width, bias=False)
        self.self_down = nn.Linear(inner, width, bias=False)

    def forward(self, image: Tensor, text: Tensor, read: Tensor) -> Tensor:
        """Return updated image tokens (B, N, width). `read`: mask (B, L), True for text tokens that are attended to."""
        normed = self.cross_norm(image)
        key, value = self.key_value(text).chunk(2, dim=-1)
        attended = self._attend(self._heads(self.query(normed)), key, value, read[:, None, None])
        image = image + self.cross_out(attended) + self.cross_down(_gated(self.cross_up(normed)))
        sizes = (self.heads * self.head_width, self.head_width, self.head_width, 2 * self.inner)
        query, key, value, up = self.self_in(self.self_norm(image)).split(sizes, dim=-1)
        attended = self._attend(rotate(self._heads(query)), rotate(key), value, None)
        return image + self.self_out(attended) + self.self_down(_gated(up))

    def _heads(self, query: Tensor) -> Tensor:
        return query.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, read: Tensor | None) -> Tensor:
        """Multi-query attention. query: (B, heads, N, d). key, value: (B, L, d). Returns (B, N, heads * d)."""
        key, value = (part[:, None].expand(-1, self.heads, -1, -1) for part in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=read).transpose(1, 2).flatten(2)


def _gated(up: Tensor) -> Tensor:
    first, gate = up.chunk(2, dim=-1)
    return F.silu(gate) * first


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to x (..., N, d). Position n turns channels (i, i + d/2) by n / 10000^(2i/d) radians."""
    count, width = x.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angle = torch.arange(count, device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MPSReward(PixelReward):
    """A frozen MPS reward of latents or images. Load one with `from_pretrained`."""

    def __init__(
        self,
        clip: CLIPModel,
        blocks: nn.ModuleList,
        tokenizer: Any,
        preprocess: Callable[[Tensor], Tensor],
        vae: AutoencoderKL | None = None,
        condition: str = CONDITION,
    ) -> None:
        super().__init__(vae)
        self.clip, self.blocks = clip.requires_grad_(False).eval(), blocks.requires_grad_(False).eval()
        self.tokenizer, self.preprocess, self.condition = tokenizer, preprocess, condition
        self._text: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        file: str = FILE,
        processor: str = CLIP_H,
        condition: str = CONDITION,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub: Unpack[HubOptions],
    ) -> "MPSReward":
        """Load the weights. The arguments not listed here, and the errors, are documented in `reward.pixel`.

        Args:
            source: MPS_overall_checkpoint.pth, its safetensors conversion, or a folder or hub id that contains `file`.
            processor: folder or hub id of the tokenizer and preprocessor.
            condition: list of words that selects a preference dimension.
        """
        device = available_device(device or "cpu")
        dtype = dtype or torch.float32
        path = find_file(source, file, what="MPS", **hub)
        tensors = read_mps(path)
        hub.pop("revision", None)
        tokenizer = load_tokenizer(processor, **hub)
        preprocess = load_preprocess(processor, **hub)
        own = {name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
        place = dict(dtype=dtype, device=device)
        clip = build_clip_h(own, str(path), eos_token_id=tokenizer.eos_token_id, **place)
        blocks = load_blocks(tensors, clip.config.projection_dim, str(path), **place)
        return cls(clip, blocks, tokenizer, preprocess, vae, condition)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) of images (B, 3, H, W) for B prompts. The cosine is computed in float32."""
        pixel_values = self.preprocess(images).to(self.device, self.clip.dtype)
        image = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixel_values).last_hidden_state)
        text = cached(self._text, prompts, self._encode_text, MAX_CACHED)
        tokens, pooled, read = (torch.stack(parts).to(self.device) for parts in zip(*text, strict=True))
        for block in self.blocks:
            image = block(image, tokens, read)
        cosine = (F.normalize(image[:, 0].float(), dim=-1) * F.normalize(pooled.float(), dim=-1)).sum(-1)
        return self.clip.logit_scale.exp().float() * cosine

    @torch.no_grad()
    def _encode_text(self, prompts: list[str]) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """For each prompt, return token features (L, D), a pooled feature (D,) and a mask (L,) of relevant tokens.

        Each prompt's relevances are divided by that prompt's maximum, as the upstream code does for a single prompt.
        """
        tokens, pooled = self._text_features(prompts)
        conditions, _ = self._text_features([self.condition])
        relevance = (tokens @ conditions[0].T).amax(-1)
        read = relevance / relevance.amax(-1, keepdim=True) > THRESHOLD
        return zip(tokens, pooled, read, strict=True)

    def _text_features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return projected features of all tokens (B, L, D), padding included, and of the end-of-text token (B, D)."""
        length = self.clip.config.text_config.max_position_embeddings
        output = self.clip.text_model(input_ids=tokenise(self.tokenizer, texts, length, self.device).input_ids)
        return self.clip.text_projection(output.last_hidden_state), self.clip.text_projection(output.pooler_output)


def read_mps(path: Path) -> dict[str, Tensor]:
    """Return MPS's tensors by name: `model.*` for CLIP and `cross_model.*` for the cross-attention blocks."""
    return read_tensors(path) if path.suffix == ".safetensors" else read_module_tensors(path)


def convert_mps(source: str | Path, target: str | Path) -> str | Path:
    """Convert the pickle `source` (MPS_overall_checkpoint.pth) to the safetensors file `target`. Returns `target`."""
    tensors = read_mps(Path(source))
    if not any(name.startswith("cross_model.") for name in tensors):
        raise ValueError(f"{source} does not hold an MPS: it has no cross_model.*, but {sorted(tensors)[:4]}")
    with atomically(Path(target)) as temporary:
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, temporary)
    return target


def load_blocks(
    tensors: Mapping[str, Tensor], width: int, where: str, *, dtype: torch.dtype, device: torch.device | None
) -> nn.ModuleList:
    """Return the cross-attention blocks, loaded from `cross_model.*`. Raise ValueError unless every tensor fits."""
    own = rename(tensors, NAMES)
    head_width = max(1, shape_of(own, "0.key_value.weight", 2, where)[0] // 2)
    heads = shape_of(own, "0.query.weight", 2, where)[0] // head_width
    inner = shape_of(own, "0.cross_down.weight", 2, where)[1]
    count = len({name.split(".")[0] for name in own if name[0].isdigit()})
    with init_empty_weights():
        blocks = nn.ModuleList(CrossBlock(width, heads, head_width, inner) for _ in range(count))
    assign_tensors(blocks, own, where, dtype=dtype, device=device)
    return blocks


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        target = auto_cli(convert_mps, args=argv)
    print(f"{target}: --reward mps={target}")


if __name__ == "__main__":
    main()
