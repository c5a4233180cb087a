"""The networks of a case, built from their configs without weights, and the inputs that they are given.

The classes and the code paths are those that the recipes run: diffusers' and transformers' networks under this
package's policy, latent reward and pixel rewards. Only what reads files is stood in for: text encoders (their
embeddings are cached before an alignment run begins) and tokenizers (as many tokens as the real ones make).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, Qwen2VLConfig, Qwen2VLModel

from dinalrm_align.align.policy import Policy
from dinalrm_align.align.savings.architectures import Architecture
from dinalrm_align.align.savings.case import Case
from dinalrm_align.align.savings.imagined import replace_tensors
from dinalrm_align.align.savings.packed import pack_linears
from dinalrm_align.models.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.latent import DTYPES, LatentReward
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.clip import ClipReward
from dinalrm_align.reward.pixel.hps_template import FIELD, HPSTemplate
from dinalrm_align.reward.pixel.hpsv3 import IMAGE_TOKEN, REWARD_TOKEN, HPSv3Reward, rank_head


class CachedText:
    """What a PromptEncoder gives once its prompts are known: embeddings of the right sizes, made up."""

    def __init__(self, architecture: Architecture, case: Case, device: torch.device) -> None:
        self.text_length, self.dtype, self.device = case.text_length, DTYPES[case.dtype], device
        self.tokens = architecture.clip_tokens + case.text_length
        self.width = architecture.transformer["joint_attention_dim"]
        self.pooled_width = architecture.transformer["pooled_projection_dim"]

    def __call__(self, prompts: Sequence[str], batch_size: int = 32) -> tuple[Tensor, Tensor]:
        given = dict(dtype=self.dtype, device=self.device)
        return (
            torch.randn(len(prompts), self.tokens, self.width, **given),
            torch.randn(len(prompts), self.pooled_width, **given),
        )


class ClipTokens:
    """Stands in for CLIP's tokenizer: every prompt is as long as the model reads."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, texts: Sequence[str], *, max_length: int, **_: object) -> SimpleNamespace:
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        ids[:, -1] = self.end
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


class QwenTokens:
    """Stands in for Qwen2-VL's tokenizer with HPSv3's reward token: a chat of `count` tokens with its picture."""

    def __init__(self, count: int, image: int, reward: int) -> None:
        self.count, self.ids = count, {IMAGE_TOKEN: image, REWARD_TOKEN: reward}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.ids[token]

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        picture = [self.ids[IMAGE_TOKEN]] * text.count(IMAGE_TOKEN)
        return SimpleNamespace(input_ids=[*picture, *[0] * (self.count - len(picture) - 1), self.ids[REWARD_TOKEN]])


@dataclass
class Subject:
    """A case, ready to run: everything frozen but the policy's LoRA, on `device`.

    on_device: the modules that lie there during the case's work, for their bytes.
    """

    case: Case
    architecture: Architecture
    device: torch.device
    policy: Policy | None
    reward: LatentReward | PixelReward | None
    vae: AutoencoderKL | None
    on_device: tuple[nn.Module, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.case.size // self.architecture.vae_factor
        return self.architecture.transformer["in_channels"], side, side

    @property
    def prompts(self) -> list[str]:
        return ["a prompt"] * self.case.batch

    def latents(self) -> Tensor:
        return torch.randn(self.case.batch, *self.latent_shape, device=self.device)

    def pictures(self) -> Tensor:
        return torch.rand(self.case.batch, 3, self.case.size, self.case.size, device=self.device)

    def conditions(self) -> Conditions:
        return Conditions(self.prompts, *CachedText(self.architecture, self.case, self.device)(self.prompts))

    def weight_bytes(self) -> int:
        """Of every parameter and buffer on the device, shared ones once."""
        tensors = {id(t): t for module in self.on_device for t in (*module.parameters(), *module.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def build_subject(
    architecture: Architecture, case: Case, make: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
) -> Subject:
    """Build a case's networks on the meta device; make: a meta tensor -> the one that takes its place on `device`."""
    device, dtype = torch.device(device), DTYPES[case.dtype]
    needs_policy = case.trains or case.work.startswith("policy")
    needs_reward = case.trains or case.work in ("score", "gradient", "pixels", "pixels_gradient")
    needs_vae = case.work.startswith("vae") or (case.pixel and needs_reward and not case.work.startswith("pixels"))
    transformer = vae = policy = reward = None
    with torch.device("meta"):
        if needs_policy or (needs_reward and not case.pixel):
            transformer = _cast(SD3Transformer2DModel(**architecture.transformer), dtype)
            if case.base_quant != "none":
                pack_linears(transformer.transformer_blocks, case.base_quant)
        if needs_vae:
            vae = _cast(AutoencoderKL(**architecture.vae), DTYPES[case.vae_dtype]).eval()
        if needs_reward:
            reward = _REWARDS[case.reward](architecture, case, transformer, vae, device)
        if needs_policy:
            policy = Policy(transformer, architecture.policy, seed=0)
    if transformer is not None and not needs_policy and not case.merged:
        _drop_unread_blocks(transformer, architecture.reward.num_layers)
    modules = [part for part in (transformer if needs_policy or not case.merged else None, vae, reward) if part]
    made = replace_tensors(modules, make)
    if isinstance(reward, LatentReward):
        reward.model.trunk.shared = tuple(made[id(tensor)] for tensor in reward.model.trunk.shared)
    if policy is not None:
        policy.parameters = {n: p for n, p in policy.transformer.named_parameters() if p.requires_grad}
        if case.policy_checkpointing:
            policy.enable_gradient_checkpointing()
    if isinstance(reward, PixelReward) and case.reward_checkpointing:
        reward.enable_gradient_checkpointing(case.decode_slice)
    elif isinstance(reward, PixelReward):
        reward.slice_size = case.decode_slice
    elif reward is not None and case.reward_checkpointing:
        reward.enable_gradient_checkpointing()
    if vae is not None and case.work == "vae_gradient" and case.reward_checkpointing:
        vae.enable_gradient_checkpointing()
    return Subject(case, architecture, device, policy, reward, vae, tuple(modules))


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In `dtype`, frozen. By nn.Module's own method: diffusers' warns of what does not apply to these models."""
    return nn.Module.to(module, dtype).requires_grad_(False)


def _drop_unread_blocks(transformer: SD3Transformer2DModel, count: int) -> None:
    """Where only the reward reads the transformer, its later blocks need not be there."""
    transformer.transformer_blocks = transformer.transformer_blocks[:count]
    transformer.norm_out = transformer.proj_out = None


def _latent(architecture: Architecture, case: Case, transformer: nn.Module, vae: object, device: torch.device):
    model = build_reward_model(architecture.reward, transformer, share_weights=not case.merged)
    model.freeze(merge=case.merged, dtype=DTYPES[case.dtype], as_trained={})
    return LatentReward(model, encoder=CachedText(architecture, case, device))


def _clip(architecture: Architecture, case: Case, transformer: object, vae: AutoencoderKL | None, device: object):
    config = CLIPConfig(**architecture.clip)
    side = config.vision_config.image_size
    preprocess = Preprocess(side, (side, side), CLIP_MEAN, CLIP_STD)
    clip = _cast(CLIPModel(config), DTYPES[case.dtype])
    return ClipReward(clip, ClipTokens(config.text_config.eos_token_id), preprocess, vae)


def _hpsv3(architecture: Architecture, case: Case, transformer: object, vae: AutoencoderKL | None, device: object):
    config = Qwen2VLConfig(**architecture.qwen)
    model, head = _cast(Qwen2VLModel(config), DTYPES[case.dtype]), rank_head(config.text_config.hidden_size)
    if case.reward_quant != "none":
        pack_linears(model.visual.blocks, case.reward_quant)
        pack_linears(model.language_model.layers, case.reward_quant)
    tokens = QwenTokens(architecture.qwen_tokens, config.image_token_id, config.text_config.vocab_size - 1)
    template = HPSTemplate(FIELD, REWARD_TOKEN)
    return HPSv3Reward(model, head, tokens, template, vae=vae, pixels=architecture.qwen_pixels)


_REWARDS = {"dinalrm": _latent, "pickscore": _clip, "hpsv3": _hpsv3}
