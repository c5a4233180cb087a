"""MPS, the multi-dimensional preference score (arXiv 2405.14705): a CLIP ViT-H/14 whose image tokens read the text.

    score = exp(logit_scale) cos(text, image after four blocks of cross-attention to those words of the prompt that one
    of the condition's words is near to)

Code and weights MIT, https://github.com/Kwai-Kolors/MPS, whose README links to MPS_overall_checkpoint.pth. That file is
a pickled module; its tensors alone are read (`tensor_files`), and

    python -m dinalrm_align.reward.pixel.mps MPS_overall_checkpoint.pth mps.safetensors

writes them once and for all as safetensors. Tokenizer and preprocessor: laion/CLIP-ViT-H-14-laion2B-s32B-b79K's.
Upstream computes in float16, this in `dtype`, float32 by default: a word at the edge of the threshold may be read by
one and not by the other.
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from dinalrm_align.reward.names import CLIP_H
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.clip import load_preprocess, load_tokenizer
from dinalrm_align.reward.pixel.clip_h import build_clip_h
from dinalrm_align.reward.pixel.tensor_files import read_module_tensors
from dinalrm_align.reward.pixel.weights import find_file
from dinalrm_align.train.command import refusing
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import reading

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""The overall preference; subsets of these words are its other dimensions."""
THRESHOLD = 0.3
"""Words of the prompt whose relevance, relative to the most relevant one's, is above are read."""
FILE = "MPS_overall_checkpoint.pth"
MAX_CACHED = 1000
"""Prompts whose text features are kept, about 300 kB each in float32."""

_NAMES = {
    "0.fn.norm": "cross_norm", "0.fn.to_q": "query", "0.fn.to_kv": "key_value", "0.fn.to_out": "cross_out",
    "0.fn.ff.0": "cross_up", "0.fn.ff.2": "cross_down", "1.fn.norm": "self_norm",
    "1.fn.fused_attn_ff_proj": "self_in", "1.fn.attn_out": "self_out", "1.fn.ff_out.1": "self_down",
}  # fmt: skip
"""Linear layers and norms of a block, by the file's names and ours."""
_LAYER = re.compile(r"cross_model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class CrossBlock(nn.Module):
    """Image tokens attend to text tokens, then to each other; all heads share one key and value (multi-query), and a
    gated feed-forward layer runs beside each attention.
    """

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
        """image (B, N, width), text (B, L, width), read (B, L) bool, the tokens attended to -> (B, N, width)."""
        normed = self.cross_norm(image)
        key, value = self.key_value(text).chunk(2, dim=-1)
        attended = self._attend(self._heads(self.query(normed)), key, value, read[:, None, None])
        image = image + self.cross_out(attended) + self.cross_down(_gated(self.cross_up(normed)))
        across = self.heads * self.head_width
        query, key, value, up = self.self_in(self.self_norm(image)).split(
            (across, self.head_width, self.head_width, 2 * self.inner), dim=-1
        )
        attended = self._attend(rotate(self._heads(query)), rotate(key), value, None)
        return image + self.self_out(attended) + self.self_down(_gated(up))

    def _heads(self, query: Tensor) -> Tensor:
        """(B, N, heads * head_width) -> (B, heads, N, head_width)"""
        return query.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, read: Tensor | None) -> Tensor:
        """query (B, heads, N, d); key, value (B, L, d), the same for every head -> (B, N, heads * d)."""
        key, value = (part[:, None].expand(-1, self.heads, -1, -1) for part in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=read).transpose(1, 2).flatten(2)


def _gated(up: Tensor) -> Tensor:
    """SwiGLU: the second half, through SiLU, gates the first."""
    first, gate = up.chunk(2, dim=-1)
    return F.silu(gate) * first


def rotate(x: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on (..., N, d): channel i and i + d/2 turn by n / 10000^(2i/d)."""
    count, width = x.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angle = torch.arange(count, device=x.device, dtype=torch.float32)[:, None] * rates
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class MPSReward(PixelReward):
    """A frozen MPS over latents or pictures; build one with `from_pretrained`."""

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
        self.clip = clip.requires_grad_(False).eval()
        self.blocks = blocks.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.condition = condition
        self._text: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        file: str = FILE,
        processor: str = CLIP_H,
        condition: str = CONDITION,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "MPSReward":
        """Load the weights from MPS's own file, or from what `convert_mps` wrote (*.safetensors).

        source: the file, or the folder or hub id of a repository that holds `file`. processor: folder or hub id of
        tokenizer and preprocessor. condition: the words that choose what is judged. vae: the decoder of the latents to
        be scored; without one, pictures alone can be scored. Raises ValueError when a weight is missing, unexpected or
        of another shape; OSError when a file is not there.
        """
        device = None if device is None else available_device(device)
        dtype = dtype or torch.float32
        path = find_file(source, file, what="MPS", revision=revision, local_files_only=local_files_only)
        tensors = read_mps(path)
        tokenizer = load_tokenizer(processor, local_files_only=local_files_only)
        preprocess = load_preprocess(processor, local_files_only=local_files_only)
        clip = build_clip_h(
            {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")},
            eos_token_id=tokenizer.eos_token_id, dtype=dtype, device=device, where=str(path),
        )  # fmt: skip
        blocks = build_blocks(tensors, width=clip.config.projection_dim, where=str(path))
        return cls(clip, blocks.to(device or "cpu", dtype), tokenizer, preprocess, vae, condition)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W), B prompts -> (B,): exp(logit_scale) cos, the product in float32."""
        with torch.autocast(self.device.type, enabled=False):  # in the weights' own dtype, whatever is on around it
            pixel_values = self.preprocess(images).to(self.device, self.clip.dtype)
            image = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixel_values).last_hidden_state)
            tokens, pooled, read = (torch.stack(parts) for parts in zip(*self._encode_text(prompts), strict=True))
            for block in self.blocks:
                image = block(image, tokens, read)
            cosine = (F.normalize(image[:, 0].float(), dim=-1) * F.normalize(pooled.float(), dim=-1)).sum(-1)
            return self.clip.logit_scale.exp().float() * cosine

    @torch.no_grad()
    def _encode_text(self, prompts: Sequence[str]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per prompt its tokens (L, D), its pooled feature (D,) and which tokens are read (L,); each encoded once.

        How relevant a token is, is divided by its own prompt's largest: upstream's division by the batch's largest is
        the same for one prompt at a time, as its evaluation goes.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text]
        if new:
            tokens, pooled = self._text_features(new)
            conditions, _ = self._text_features([self.condition])
            relevance = (tokens @ conditions[0].T).amax(-1)
            read = relevance / relevance.amax(-1, keepdim=True) > THRESHOLD
            self._text.update(zip(new, zip(tokens, pooled, read, strict=True), strict=True))
        found = [self._text[prompt] for prompt in prompts]
        for oldest in list(self._text)[:-MAX_CACHED]:
            del self._text[oldest]
        return [tuple(part.to(self.device) for part in parts) for parts in found]

    def _text_features(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Projected features of all tokens (B, L, D), padding included as upstream has it, and of the end (B, D)."""
        length = self.clip.config.text_config.max_position_embeddings
        ids = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids.to(self.device)
        output = self.clip.text_model(input_ids=ids)
        return self.clip.text_projection(output.last_hidden_state), self.clip.text_projection(output.pooler_output)


def read_mps(path: Path) -> dict[str, Tensor]:
    """The tensors of MPS, by the names of its own module: `model.*` (a CLIPModel) and `cross_model.*`."""
    if path.suffix == ".safetensors":
        with reading("safetensors file", path):
            return load_file(path)
    return read_module_tensors(path)


def convert_mps(source: str | Path, target: str | Path) -> None:
    """Write the tensors of MPS_overall_checkpoint.pth as safetensors: a file that holds no code and opens at once."""
    tensors = read_mps(Path(source))
    if not any(name.startswith("cross_model.") for name in tensors):
        raise ValueError(f"{source} does not hold an MPS: it has no cross_model.*, but {sorted(tensors)[:4]}")
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, target)


def build_blocks(tensors: Mapping[str, Tensor], *, width: int, where: str) -> nn.ModuleList:
    """The cross-attention blocks of these tensors (the file's names), sizes read from their shapes; strict."""
    layers: dict[int, dict[str, Tensor]] = {}
    unexpected = []
    for name, tensor in tensors.items():
        layer = _LAYER.fullmatch(name)
        if layer and layer[2] in _NAMES:
            layers.setdefault(int(layer[1]), {})[f"{_NAMES[layer[2]]}.{layer[3]}"] = tensor
        elif not name.startswith("model.") and not name.endswith(".inv_freq"):  # the rates, which `rotate` computes
            unexpected.append(name)
    if unexpected or sorted(layers) != list(range(len(layers))) or not layers:
        raise ValueError(
            f"{where} does not hold an MPS: got blocks {sorted(layers)}, unexpected {sorted(unexpected)[:4]}; expected "
            "cross_model.layers.0 and so on, without a gap"
        )
    blocks = nn.ModuleList()
    for index, part in sorted(layers.items()):
        try:
            head_width, inner = part["key_value.weight"].shape[0] // 2, part["cross_down.weight"].shape[1]
            block = CrossBlock(width, part["query.weight"].shape[0] // head_width, head_width, inner)
            block.load_state_dict(part)
        except (KeyError, IndexError, ZeroDivisionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{where}: cross_model.layers.{index} is not a block of MPS ({reason})") from error
        blocks.append(block)
    return blocks


def main(argv: Sequence[str] | None = None) -> None:
    """Convert the file named first into the one named second."""
    parser = argparse.ArgumentParser(description="Write the tensors of MPS's pickled file as safetensors.")
    parser.add_argument("source", help="MPS_overall_checkpoint.pth; nothing in it is run")
    parser.add_argument("target", help="the .safetensors to write")
    arguments = parser.parse_args(argv)
    with refusing():
        convert_mps(arguments.source, arguments.target)
    print(f"{arguments.target}: --reward mps={arguments.target}")


if __name__ == "__main__":
    main()
