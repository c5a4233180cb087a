"""Build the networks of a configuration (`Case`), and the workload that runs on them.

The networks are diffusers and transformers classes, built from their configs without weights and wrapped in this
package's policy and rewards. Workloads call the same code as the recipes. Text encoders are replaced by random
embeddings of the right shape, because recipes cache embeddings before training. Tokenizers are replaced by objects that
return the same number of token ids.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import BatchEncoding, CLIPConfig, CLIPModel, Qwen2VLConfig, Qwen2VLModel

from dinalrm_align.align.grpo import Grpo, GrpoBatch
from dinalrm_align.align.grpo_config import GrpoConfig
from dinalrm_align.align.policy import Policy
from dinalrm_align.align.refl import Refl
from dinalrm_align.align.refl_config import ReflConfig
from dinalrm_align.align.rollouts import Position, Sampler
from dinalrm_align.align.savings.config import Architecture, Case
from dinalrm_align.models.pipeline import decode_latents, encode_images
from dinalrm_align.models.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.loading import DTYPES
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.pixel.clip import ClipReward
from dinalrm_align.reward.pixel.hpsv3 import FIELD, IMAGE_TOKEN, REWARD_TOKEN, HPSTemplate, HPSv3Reward, rank_head
from dinalrm_align.train.config import OptimConfig
from dinalrm_align.train.cost import PhaseMeter
from dinalrm_align.train.state import adamw, bitsandbytes

REWARD_SIGMAS = (0.4, 0.2, 0.5, 0.7, 0.1, 0.3, 0.6, 0.8)  # noise levels sigma; n levels are the first n

NF4_BLOCK = 64
"""Number of weights that share a scale in NF4, bitsandbytes' default."""


class CachedText:
    """A replacement for the text encoders (`PromptEncoder`) that returns random embeddings of the same shapes."""

    def __init__(self, architecture: Architecture, case: Case, device: torch.device) -> None:
        self.text_length, self.device, self.dtype = case.text_length, device, DTYPES[case.dtype]
        self.clip_tokens = architecture.clip_tokens
        self.sizes = self.clip_tokens + case.text_length, architecture.transformer["joint_attention_dim"]
        self.pooled_width = architecture.transformer["pooled_projection_dim"]

    def __call__(self, prompts: Sequence[str], batch_size: int = 32) -> tuple[Tensor, Tensor]:
        given = dict(dtype=self.dtype, device=self.device)
        return torch.randn(len(prompts), *self.sizes, **given), torch.randn(len(prompts), self.pooled_width, **given)


class ClipTokens:
    """A replacement for CLIP's tokenizer. Every prompt has `max_length` token ids, of which the last is `end`."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, texts: Sequence[str], *, max_length: int, **_: object) -> BatchEncoding:
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        ids[:, -1] = self.end
        return BatchEncoding(dict(input_ids=ids, attention_mask=torch.ones_like(ids)))


class QwenTokens:
    """A replacement for HPSv3's tokenizer. Every prompt has `count` token ids, image and reward tokens included."""

    def __init__(self, count: int, image: int, reward: int) -> None:
        self.count, self.ids = count, {IMAGE_TOKEN: image, REWARD_TOKEN: reward}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.ids[token]

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        image = [self.ids[IMAGE_TOKEN]] * text.count(IMAGE_TOKEN)
        return SimpleNamespace(input_ids=[*image, *[0] * (self.count - len(image) - 1), self.ids[REWARD_TOKEN]])


def replace_tensors(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Replace every parameter and buffer by make(tensor), and keep tied tensors tied. Returns {id(old): new tensor}."""
    holders = [held for module in modules for part in module.modules() for held in (part._parameters, part._buffers)]
    slots = [(held, name, tensor) for held in holders for name, tensor in held.items() if tensor is not None]
    made: dict[int, Tensor] = {}
    for held, name, tensor in slots:
        if id(tensor) not in made:
            new = make(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = new
        held[name] = made[id(tensor)]
    return made


class _UnpackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, bias: Tensor | None, unpack: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.unpack = unpack
        return F.linear(inputs, unpack(inputs), None if bias is None else bias.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.unpack(gradient), None, None


class PackedLinear(nn.Linear):
    """A replacement for bitsandbytes' frozen linear layers, with the same number of bytes and the same operations.

    Each forward and backward pass unpacks the weight into the input's dtype. The kind "nf4" stores 4 bits per weight
    and a float32 scale per 64 weights. The kind "int8" stores 8 bits per weight and a float32 scale per row. The 8-bit
    product of "int8" is counted as a product in the input's dtype. Real weights are unpacked by bitsandbytes ("nf4").
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.kind = kind
        count = linear.weight.numel()
        size, scales = (count // 2, -(-count // NF4_BLOCK)) if kind == "nf4" else (count, linear.out_features)
        dtype = torch.uint8 if kind == "nf4" else torch.int8
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, device="meta"))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return _UnpackedLinear.apply(inputs, self.bias, self.unpack)

    def unpack(self, like: Tensor) -> Tensor:
        """Return the weight (out, in) in the dtype of `like`. While costs are counted, it has no values."""
        shape = self.out_features, self.in_features
        if isinstance(self.weight, FakeTensor):
            return like.new_empty(shape)
        functional, blocks = bitsandbytes().functional, dict(blocksize=NF4_BLOCK, quant_type="nf4")
        state = functional.QuantState(self.scales, shape=torch.Size(shape), dtype=like.dtype, **blocks)
        return functional.dequantize_4bit(self.weight[:, None], state, **blocks)


def pack_linears(module: nn.Module, kind: str) -> None:
    """Replace every nn.Linear inside `module` by a `PackedLinear`, which stands for a layer quantised to `kind`."""
    for name, linear in [(name, part) for name, part in module.named_modules() if type(part) is nn.Linear]:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, PackedLinear(linear, kind))


@dataclass
class Networks:
    """The networks of a configuration; only the policy's LoRA is trainable. `modules`: the networks on the device."""

    case: Case
    architecture: Architecture
    device: torch.device
    policy: Policy | None
    reward: LatentReward | PixelReward | None
    vae: AutoencoderKL | None
    modules: tuple[nn.Module, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.case.size // self.architecture.vae_factor
        return self.architecture.transformer["in_channels"], side, side

    @property
    def prompts(self) -> list[str]:
        return ["a prompt"] * self.case.batch

    def latents(self) -> Tensor:
        return torch.randn(self.case.batch, *self.latent_shape, device=self.device)

    def images(self) -> Tensor:
        return torch.rand(self.case.batch, 3, self.case.size, self.case.size, device=self.device)

    def conditions(self) -> Conditions:
        return Conditions(self.prompts, *CachedText(self.architecture, self.case, self.device)(self.prompts))

    def weight_bytes(self) -> int:
        """Return the bytes of all parameters and buffers on the device. Shared tensors count once."""
        tensors = {id(t): t for module in self.modules for t in (*module.parameters(), *module.buffers())}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def build_networks(
    architecture: Architecture, case: Case, make: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
) -> Networks:
    """Build a configuration's networks on the meta device, then replace each of their tensors by make(tensor)."""
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
            reward = _reward(architecture, case, transformer, vae, device)
        if needs_policy:
            policy = Policy(transformer, architecture.policy, seed=0)
    if transformer is not None and not needs_policy and not case.merged:  # only the reward's blocks are needed
        transformer.transformer_blocks = transformer.transformer_blocks[: architecture.reward.num_layers]
        transformer.norm_out = transformer.proj_out = None
    modules = [part for part in (transformer if needs_policy or not case.merged else None, vae, reward) if part]
    made = replace_tensors(modules, make)
    for part in reward.noise_parts if reward is not None else ():
        part.backbone.share(made[id(tensor)] for tensor in part.backbone.shared)
    if policy is not None:
        policy.parameters = {n: p for n, p in policy.transformer.named_parameters() if p.requires_grad}
        if case.policy_checkpointing:
            policy.transformer.enable_gradient_checkpointing()
    if reward is not None:
        reward.set_decode_slice(case.decode_slice)
        if case.reward_checkpointing:
            reward.enable_gradient_checkpointing()
    if vae is not None and case.work == "vae_gradient" and case.reward_checkpointing:
        vae.enable_gradient_checkpointing()
    return Networks(case, architecture, device, policy, reward, vae, tuple(modules))


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a module to `dtype` and freeze it, without the warning of diffusers' own `to` method."""
    return nn.Module.to(module, dtype).requires_grad_(False)


def _reward(
    architecture: Architecture, case: Case, transformer: nn.Module, vae: AutoencoderKL | None, device: torch.device
) -> LatentReward | PixelReward:
    dtype = DTYPES[case.dtype]
    if case.reward == "dinalrm":
        model = build_reward_model(architecture.reward, transformer, share_weights=not case.merged)
        model.freeze(merge=case.merged, dtype=dtype, as_trained={})
        return LatentReward(model, encoder=CachedText(architecture, case, device))
    if case.reward == "pickscore":
        config = CLIPConfig(**architecture.clip)
        side = config.vision_config.image_size
        preprocess = Preprocess(side, (side, side), CLIP_MEAN, CLIP_STD)
        tokenizer = ClipTokens(config.text_config.eos_token_id)
        return ClipReward(_cast(CLIPModel(config), dtype), tokenizer, preprocess, vae)
    config = Qwen2VLConfig(**architecture.qwen)
    model, head = _cast(Qwen2VLModel(config), dtype), rank_head(config.text_config.hidden_size)
    if case.reward_quant != "none":
        pack_linears(model.visual.blocks, case.reward_quant)
        pack_linears(model.language_model.layers, case.reward_quant)
    tokens = QwenTokens(architecture.qwen_tokens, config.image_token_id, config.text_config.vocab_size - 1)
    template = HPSTemplate(FIELD, REWARD_TOKEN)
    return HPSv3Reward(model, head, tokens, template, vae=vae, pixels=architecture.qwen_pixels)


def workload_of(networks: Networks) -> tuple[Callable[[], None], Callable[[], object]]:
    """Return (prepare, run): prepare() allocates AdamW's moments before the count, and run() runs the workload once."""
    case, reward, policy = networks.case, networks.reward, networks.policy
    sigma = list(REWARD_SIGMAS[: case.levels])

    def score(latents: Tensor) -> Tensor:
        return reward(latents, networks.prompts, sigma=sigma if case.levels > 1 else sigma[0])

    def gradient_of(inputs: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        function(inputs.requires_grad_()).sum().backward()

    works = {
        "score": lambda: torch.no_grad()(score)(networks.latents()),
        "gradient": lambda: gradient_of(networks.latents(), score),
        "pixels": lambda: torch.no_grad()(reward.score_pixels)(networks.images(), networks.prompts),
        "pixels_gradient": lambda: gradient_of(
            networks.images(), lambda images: reward.score_pixels(images, networks.prompts)
        ),
        "policy_forward": lambda: torch.no_grad()(policy.velocity)(networks.latents(), 0.5, networks.conditions()),
        "policy_gradient": lambda: policy.velocity(networks.latents(), 0.5, networks.conditions()).sum().backward(),
        "vae_decode": lambda: torch.no_grad()(decode_latents)(networks.vae, networks.latents()),
        "vae_gradient": lambda: gradient_of(networks.latents(), lambda latents: decode_latents(networks.vae, latents)),
        "vae_encode": lambda: encode_images(networks.vae, networks.images()),
    }
    if not case.trains:
        return lambda: None, works[case.work]
    loss = _refl_loss(networks, sigma) if case.work == "refl" else _grpo_loss(networks, sigma)
    tensors = list(policy.parameters.values())
    foreach = {} if case.optimizer == "adamw8bit" else {"foreach": True}  # torch's choice on CUDA
    optimizer = adamw([{"params": tensors, **foreach}], OptimConfig(name=case.optimizer))

    def prepare() -> None:
        for tensor in tensors:
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def update() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(tensors, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return prepare, update


def _sampler(networks: Networks, sigmas: list[float]) -> Sampler:
    conditions = networks.conditions()
    return Sampler(
        policy=networks.policy, conditions=conditions, negative=conditions.take([0]), sigmas=sigmas,
        latent_shape=networks.latent_shape, guidance_scale=1.0, seed=0, meter=PhaseMeter(networks.device),
    )  # fmt: skip


def _refl_loss(networks: Networks, sigma: list[float]) -> Callable[[], Tensor]:
    """Return a function that computes the loss of a ReFL update, without its rollout."""
    config = ReflConfig(batch_size=networks.case.batch, earliest=1.0, kl_weight=4.0, reward_sigma=sigma)
    method = Refl(_sampler(networks, [1.0, 0.0]), networks.reward, config)
    return lambda: method.step(method.batch_at(0))[0]


def _grpo_loss(networks: Networks, sigma: list[float]) -> Callable[[], Tensor]:
    """Return a function that rolls out two steps, computes scores, and returns Flow-GRPO's loss on the first step."""
    batch = networks.case.batch
    config = GrpoConfig(
        groups=1, group_size=max(2, batch), sample_batch=batch, window="all", window_range=None, shared_start=False,
        reward_draws=1, reward_sigma=sigma,
    )  # fmt: skip
    method = Grpo(_sampler(networks, [1.0, 0.5, 0.0]), networks.reward, config)

    def loss() -> Tensor:
        samples, conditions, device = list(range(batch)), networks.conditions(), networks.device
        with torch.no_grad():
            final, states, log_probs, _ = method.trajectories(0, samples, conditions, range(1))
            scores = method.scores(0, samples, final, conditions)
        trained = GrpoBatch(
            position=Position(rollout=0, epoch=1, minibatch=0, part=0), conditions=conditions,
            steps=torch.zeros(batch, dtype=torch.int64), latents=states[:, 0].to(device),
            following=states[:, 1].to(device), old_log_prob=log_probs[:, 0].to(device), count=batch, statistics={},
            old_mean=torch.zeros(batch, 0, device=device), advantage=scores["reward"][0].to(device),
        )  # fmt: skip
        return method.step(trained)[0]

    return loss
