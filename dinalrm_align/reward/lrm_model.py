"""The networks of LRM (arXiv 2502.01051): half a UNet, CLIP text encoders and two projections; and strict loading.

The UNet runs up to its middle block. Its up blocks are neither kept nor run. Each down block gives one feature (of its
last layer, before downsampling), and the middle block gives one: the mean of the feature map over the positions. The
UNet runs twice: for the prompt, and for the empty prompt. Only the middle block's feature m is guided,
m = m_empty + 7.5 (m_prompt - m_empty), the paper's visual feature enhancement. The down blocks' features are those of
the prompt.
Score: exp(logit_scale) cos(visual_projection(features), text feature).

Source: Kwai-Kolors/LPO@9c2e8b8 (MIT), lpo/lpo/preference_models/models.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dinalrm_align.models.layout import find_weights
from dinalrm_align.models.weights import HubOptions, assign_tensors, fetch, read_entries, read_tensors, rename
from dinalrm_align.reward.pixel.base import load_tokenizer, tokenise
from dinalrm_align.train.files import flat, read_json, reading

GUIDANCE = 7.5
"""Weight of the visual feature enhancement, in training and in LPO."""
PIXELS = 8
"""Pixels per side of a latent position, in both families."""
HEAD = "state_dict.pt"
UNUSED = {r"unet\.(up_blocks|conv_norm_out|conv_out)\.": None, r"vae\.": None, r".*\.position_ids$": None}
"""Rules for `rename` that drop tensors which scoring does not need. Old CLIP files store position_ids."""


@dataclass(frozen=True)
class Family:
    """A base model that an LRM was trained from.

    Args:
        title: name of the base model, for messages.
        base: hub id of the base model, which has the tokenizers and the VAE.
        scaling_factor: of the VAE. Both VAEs have 4 channels and no shift.
        blocks, added: number of down blocks and `addition_embed_type` of the UNet.
        encoders: text encoders, by folder.
    """

    title: str
    base: str
    scaling_factor: float
    blocks: int
    added: str | None
    encoders: Mapping[str, type[nn.Module]]

    @property
    def latents(self) -> str:
        return f"latents of {self.title}, 4 channels with scaling_factor {self.scaling_factor}"


_SD15, _SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
_ONE = {"text_encoder": CLIPTextModel}
_TWO = {**_ONE, "text_encoder_2": CLIPTextModelWithProjection}
FAMILIES = {
    "sd15": Family("Stable Diffusion 1.5", _SD15, 0.18215, blocks=4, added=None, encoders=_ONE),
    "sdxl": Family("Stable Diffusion XL", _SDXL, 0.13025, blocks=3, added="text_time", encoders=_TWO),
}


class LrmModel(nn.Module):
    """Scores noisy latents for prompts. The names of its tensors are those of LRM's one-file layout."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
    ) -> None:
        """Remove the up blocks of `unet`. text_encoder_2: None for SD1.5. The caller sets `tokenizers`."""
        super().__init__()
        del unet.up_blocks, unet.conv_norm_out, unet.conv_out
        self.unet, self.text_encoder, self.text_encoder_2 = unet, text_encoder, text_encoder_2
        self.tokenizers: list[Any] = []
        channels = unet.config.block_out_channels
        width = text_encoder.config.hidden_size if text_encoder_2 is None else text_encoder_2.config.projection_dim
        self.visual_projection = nn.Linear(sum(channels) + channels[-1], width, bias=False)
        self.text_projection = None if text_encoder_2 is not None else nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    @property
    def side(self) -> int:
        """Height and width in pixels of the images that the model was trained on: 512 (SD1.5) or 1024 (SDXL)."""
        return PIXELS * self.unet.config.sample_size

    def forward(self, latents: Tensor, timesteps: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), at least float32, differentiable in the latents.

        latents: (B, 4, h, w), scaled, with DDPM noise of `timesteps`, (B,) integers. The text gets no gradient.
        """
        texts = list(dict.fromkeys([*prompts, ""]))
        states, pooled = self.encode(texts)
        rows = torch.tensor([texts.index(prompt) for prompt in [*prompts, *[""] * len(prompts)]], device=latents.device)
        stages, middle = self._features(latents, timesteps, states[rows], pooled[rows])
        prompted, empty = middle.chunk(2)
        image = torch.cat([*stages, empty + GUIDANCE * (prompted - empty)], dim=-1)
        image = F.linear(image, self.visual_projection.weight.to(image.dtype))
        text = pooled[rows[: len(prompts)]].to(image.dtype)
        if self.text_projection is not None:
            text = F.linear(text, self.text_projection.weight.to(image.dtype))
        return self.logit_scale.to(image.dtype).exp() * F.cosine_similarity(image, text, dim=-1)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the text encoders' states (B, L, C) for cross-attention, and the pooled feature (B, D).

        SD1.5: the last states. SDXL: the penultimate states of both, concatenated; the second's pooled feature.
        """
        outputs = []
        for encoder, tokenizer in zip((self.text_encoder, self.text_encoder_2), self.tokenizers):
            tokens = tokenise(tokenizer, prompts, encoder.config.max_position_embeddings, self.unet.device)
            outputs.append(encoder(tokens.input_ids, output_hidden_states=True))
        if self.text_encoder_2 is None:
            return outputs[0].last_hidden_state, outputs[0].pooler_output
        return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[1].text_embeds

    def _features(
        self, latents: Tensor, timesteps: Tensor, states: Tensor, pooled: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Return features (B, C) of the down blocks, for the prompts, and the middle block's (2B, C), for both halves.

        states (2B, L, C), pooled (2B, D): those of the prompts, then those of the empty prompt.
        """
        unet, count, wide = self.unet, len(latents), torch.promote_types(self.unet.dtype, torch.float32)
        sample = torch.cat([latents, latents]).to(unet.dtype)
        sizes = torch.tensor([self.side, self.side, 0, 0, self.side, self.side], device=latents.device)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(2 * count, 6)}  # SD1.5 reads neither
        embedding = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=torch.cat([timesteps, timesteps])))
        more = unet.get_aug_embed(emb=embedding, encoder_hidden_states=states, added_cond_kwargs=added)
        embedding = embedding if more is None else embedding + more
        sample, stages = unet.conv_in(sample), []
        for block in unet.down_blocks:  # blocks without attention ignore the states
            sample, layers = block(hidden_states=sample, temb=embedding, encoder_hidden_states=states)
            stages.append(layers[len(block.resnets) - 1][:count].to(wide).mean((2, 3)))
        return stages, unet.mid_block(sample, embedding, encoder_hidden_states=states).to(wide).mean((2, 3))


def load_lrm(
    source: str | Path,
    name: str,
    base: str | Path,
    *,
    subfolder: str | None = None,
    device: torch.device,
    dtype: torch.dtype,
    **hub: Unpack[HubOptions],
) -> LrmModel:
    """Load a frozen model. name: in FAMILIES. The other arguments and the errors: see `LrmReward.from_pretrained`."""
    family, parts = FAMILIES[name], ("unet", *FAMILIES[name].encoders)
    base_hub: HubOptions = {key: value for key, value in hub.items() if key != "revision"}
    if isinstance(source, str | Path) and Path(source).is_file():
        path, tensors = Path(source), read_tensors(Path(source))
        folder = fetch(base, [f"{part}/config.json" for part in parts], what="base model", **base_hub)
    else:
        path = folder = _folder(source, f"lrm_{name}" if subfolder is None else subfolder, **hub)
        tensors = _read_folder(folder, parts)
    configs = {part: read_json(folder / part / "config.json", f"that of LRM's {part}") for part in parts}
    _check_unet(configs["unet"], folder / "unet" / "config.json", name)
    with reading("LRM's config", folder), init_empty_weights():
        encoders = [kind(CLIPTextConfig.from_dict(configs[part])) for part, kind in family.encoders.items()]
        model = LrmModel(UNet2DConditionModel.from_config(configs["unet"]), *encoders)
    got, width = model.unet.config.cross_attention_dim, sum(encoder.config.hidden_size for encoder in encoders)
    if got != width:
        raise ValueError(f"{folder}: cross_attention_dim: got {got}; expected {width}, the width of the text encoders")
    rules, prefix = dict(UNUSED), "text_encoder.text_model."
    if not any(key.startswith(prefix) for key in model.state_dict()):  # transformers 5 has no text_model
        rules[re.escape(prefix)] = "text_encoder."
    assign_tensors(model, rename(tensors, rules), path, dtype=dtype, device=device)
    model.tokenizers = [_tokenizer(base, model, part, **base_hub) for part in family.encoders]
    return model.requires_grad_(False).eval()


def _folder(source: str | Path, subfolder: str, **hub: Unpack[HubOptions]) -> Path:
    """Return the local folder that has LRM's layout: `source` itself, or its `subfolder`."""
    files = ["unet/*", "text_encoder/*", "text_encoder_2/*", HEAD]
    folder = fetch(source, files, what="LRM", subfolder=subfolder, **hub)
    found = [path for path in (Path(source), folder) if (path / HEAD).is_file()]
    if not found:
        raise FileNotFoundError(
            f"no {HEAD} in {str(source)!r} or its folder {subfolder!r}; expected LRM's layout, unet/, text_encoder/, "
            f"{HEAD}: give the folder that has it, and for a hub repository subfolder=... ('' for none)"
        )
    return found[0]


def _read_folder(folder: Path, parts: Sequence[str]) -> dict[str, Tensor]:
    """Return all tensors of a folder in LRM's layout, by the names of the one-file layout."""
    tensors = {}
    for part in parts:
        stem = "diffusion_pytorch_model" if part == "unet" else "model"
        found = find_weights(folder / part, stem)
        if found is None:
            raise FileNotFoundError(f"no weights {stem}.safetensors in {folder / part}; expected LRM's layout")
        for file in found[2]:
            tensors |= {f"{part}.{name}": tensor for name, tensor in read_tensors(folder / part / file).items()}
    with reading(HEAD, folder):
        head = flat(read_entries(folder / HEAD))
    for name, value in head.items():
        if not isinstance(value, Tensor | float):
            raise ValueError(f"{folder / HEAD}: {name}: got {type(value).__name__}; expected a tensor")
        tensors[name] = torch.as_tensor(value)
    return tensors


def _check_unet(config: Mapping[str, Any], path: Path, name: str) -> None:
    """Raise ValueError unless `config` is that of a UNet of the family `name`."""
    wanted = {"_class_name": UNet2DConditionModel.__name__, "in_channels": 4, "layers_per_block": 2}
    wanted |= {"addition_embed_type": FAMILIES[name].added, "class_embed_type": None, "encoder_hid_dim_type": None}
    pairs = {key: (config.get(key), value) for key, value in wanted.items()}
    pairs["number of down_block_types"] = len(config.get("down_block_types") or ()), FAMILIES[name].blocks
    pairs["type of sample_size"] = type(config.get("sample_size")).__name__, "int"
    if wrong := [f"{key}: got {got!r}; expected {value!r}" for key, (got, value) in pairs.items() if got != value]:
        others = " or ".join(f"lrm-{other}" for other in FAMILIES if other != name)
        advice = f"lrm-{name} reads no other: name {others} for an LRM of another base model"
        raise ValueError(f"{path}: {'; '.join(wrong)}, the UNet of {FAMILIES[name].title}; {advice}")


def _tokenizer(base: str | Path, model: LrmModel, part: str, **hub: Unpack[HubOptions]) -> Any:
    """Load the tokenizer of the text encoder `part`. Raise ValueError unless it has a token for each embedding."""
    folder = fetch(base, ["*"], what="base model", subfolder=part.replace("text_encoder", "tokenizer"), **hub)
    tokenizer, expected = load_tokenizer(folder), model.get_submodule(part).config.vocab_size
    if len(tokenizer) != expected:
        raise ValueError(f"{folder}: got {len(tokenizer)} tokens; expected {expected}, the size of LRM's {part}")
    return tokenizer
