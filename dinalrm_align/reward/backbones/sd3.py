"""The trunk: the first N blocks of an SD3 or SD3.5 transformer. It returns the tokens of selected layers.

The trunk is a separate module tree of diffusers blocks. Each block computes the same as in `SD3Transformer2DModel`.
With shared weights, the trunk's base Parameters and buffers ARE those of the policy. The reward's LoRA exists in the
trunk only. Policy and reward thus need no adapter switching, which is unsafe with gradient checkpointing and threads.
"""

import copy
import weakref
from collections.abc import Callable, Iterable

import peft
import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from dinalrm_align.reward.backbones import Taps
from dinalrm_align.reward.backbones.probes import Probes
from dinalrm_align.reward.config import LoraConfig, RewardConfig

TEXT_SIDE = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", *TEXT_SIDE)  # in the image-only second attention, attn2, as well
ADAPTER = "reward"


class SD3Trunk(nn.Module):
    """A `Backbone` that runs the first blocks of an SD3 transformer, up to the last block that the reward head reads.

    If `config.tuning` is lora, the trunk adds a trainable float32 LoRA, initialised from torch's global RNG.

    Args:
        transformer: gives the blocks; not modified. Unmerged peft adapters are ignored, merged ones raise ValueError.
        share_weights: use the transformer's weights, which must be frozen. False: copy them, as full tuning requires.
    """

    def __init__(self, transformer: SD3Transformer2DModel, config: RewardConfig, *, share_weights: bool) -> None:
        super().__init__()
        _check_transformer(transformer, config)
        parts = _parts_read(transformer, config.num_layers)
        memo = {}
        if share_weights:
            kept = [shared for part in parts for shared in (*part.parameters(), *part.buffers(), *_packing(part))]
            memo = {id(shared): shared for shared in kept}
        parts = copy.deepcopy(parts, memo)
        self.pos_embed, self.time_text_embed, self.context_embedder, self.transformer_blocks = parts
        _remove_adapters(self)
        _remove_hooks(self)

        self.width = self.temb_dim = transformer.inner_dim
        self.in_channels: int = transformer.config.in_channels
        self.text_width: int = transformer.config.joint_attention_dim
        self.pooled_width: int = transformer.config.pooled_projection_dim
        self.patch_size: int = transformer.config.patch_size
        self.max_size: int = transformer.config.pos_embed_max_size * self.patch_size
        self.visual_taps, self.text_taps, self.last_tap = config.visual_taps, config.text_taps, config.last_tap
        self.gradient_checkpointing = self.use_reentrant = False

        self.share((*self.parameters(), *self.buffers()) if share_weights else ())
        self._owner = weakref.ref(transformer)  # weak: the trunk must not keep unused blocks alive
        if share_weights:
            self.check_shared()
        else:
            self.requires_grad_(config.tuning == "full")
        if config.tuning != "full":
            self.skip_unread_text()
        if config.tuning == "lora":
            self._add_lora(config.lora, text_read=config.num_layers in config.text_taps)

    @property
    def dtype(self) -> torch.dtype:
        return self.pos_embed.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.pos_embed.proj.weight.device

    def enable_gradient_checkpointing(self, use_reentrant: bool = False) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        self.gradient_checkpointing, self.use_reentrant = True, use_reentrant

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Record which of the trunk's weights are shared with the transformer, and their present values."""
        self.shared: tuple[Tensor, ...] = tuple(tensors)
        shared = {id(tensor) for tensor in self.shared}
        named = (*self.named_parameters(), *self.named_buffers())
        self._probes = Probes({name: tensor for name, tensor in named if id(tensor) in shared})

    def check_shared(self) -> None:
        """Raise ValueError if shared weights require gradients, contain a merged adapter or have changed."""
        owner = self._owner() if self.shared else None
        if owner is not None:
            _check_unmerged(_parts_read(owner, len(self.transformer_blocks)))
        if trained := sum(tensor.requires_grad for tensor in self.shared):
            raise ValueError(
                f"requires_grad: got True for {trained} of {len(self.shared)} tensors shared with the transformer; "
                "expected frozen: call transformer.requires_grad_(False) (and train a LoRA), or use share_weights=False"
            )
        self._probes.check(
            "expected the base weights: undo the change (unfuse a LoRA before unloading it) or load the base model "
            "again, then build the reward anew; or use share_weights=False"
        )

    def forward(self, x_sigma: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Taps:
        """Return the features (`Taps`) of the selected layers, in the trunk's dtype. Arguments are as in `Backbone`."""
        hidden = self.pos_embed(x_sigma.to(self.dtype)).contiguous()
        temb = self.time_text_embed(timestep, pooled_prompt_embeds.to(self.dtype))
        context = self.context_embedder(prompt_embeds.to(self.dtype))
        recompute = False
        if self.gradient_checkpointing and torch.is_grad_enabled():
            trained = any(parameter.requires_grad for parameter in self.parameters())
            if trained and self.use_reentrant and not hidden.requires_grad:
                hidden.requires_grad_()  # reentrant checkpoints need an input with gradient
            recompute = trained or any(tensor.requires_grad for tensor in (hidden, context, temb))
        options = dict(use_reentrant=self.use_reentrant, preserve_rng_state=False)  # nothing in a block is random
        visual, text = [hidden], [context]
        for block in self.transformer_blocks[: self.last_tap]:
            inputs = (hidden, context, temb)
            context, hidden = checkpoint(block, *inputs, **options) if recompute else block(*inputs)
            visual.append(hidden)
            text.append(context)
        return Taps(tuple(visual[tap] for tap in self.visual_taps), tuple(text[tap] for tap in self.text_taps), temb)

    def skip_unread_text(self) -> None:
        """Drop the text layers of the last block that runs, unless the reward head reads the text tokens of that block.

        After full tuning, save the weights first, since the dropped weights are lost.
        """
        block = self.transformer_blocks[self.last_tap - 1] if self.last_tap else None
        if block is not None and self.last_tap not in self.text_taps and not block.context_pre_only:
            block.context_pre_only = block.attn.context_pre_only = True
            block.norm1_context = _NormedTextOnly(block.norm1_context)
            block.norm2_context = block.ff_context = None

    def _add_lora(self, lora: LoraConfig, *, text_read: bool) -> None:
        last = len(self.transformer_blocks) - 1
        adapter = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            init_lora_weights=True if lora.init == "kaiming" else lora.init,
            target_modules=list(LORA_TARGETS),
            exclude_modules=None if text_read else [f"transformer_blocks.{last}.attn.{name}" for name in TEXT_SIDE],
        )
        peft.inject_adapter_in_model(adapter, self, adapter_name=ADAPTER)
        unread = [f"transformer_blocks.{index}." for index in range(self.last_tap, last + 1)]
        if self.last_tap not in self.text_taps:
            unread.append(f"transformer_blocks.{self.last_tap - 1}.attn.to_add_out.")
        for name, weight in self.lora_parameters().items():
            weight.data = weight.data.float()
            weight.requires_grad_(not name.startswith(tuple(unread)))

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """Return LoRA Parameters by name (`transformer_blocks.0.attn.to_q.lora_A.weight`, ...). Empty after a merge."""
        return {
            f"{name}.{matrix}.weight": layer.get_submodule(f"{matrix}.{ADAPTER}").weight
            for name, layer in self.named_modules()
            if isinstance(layer, LoraLayer)
            for matrix in ("lora_A", "lora_B")
        }

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Add the LoRA to the weights, in float32, and remove it. Raise ValueError for shared or quantised weights."""
        if self.shared:
            raise ValueError("merging the reward's LoRA would change the shared transformer; use share_weights=False")
        for name, layer in list(self.named_modules()):
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                if not weight.is_floating_point():
                    raise ValueError(f"{name}: cannot merge LoRA into quantised weights ({weight.dtype}); share them")
                update = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
                weight.copy_(weight.float() + layer.scaling[ADAPTER] * update)
        _remove_adapters(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SD3Trunk":
        """Move or cast the trunk. Raise RuntimeError if this would change tensors shared with the policy."""
        for probe in [tensor.data for tensor in self.shared[:1]]:
            moved = fn(probe)
            if (moved.dtype, moved.device, moved.data_ptr()) != (probe.dtype, probe.device, probe.data_ptr()):
                raise RuntimeError(
                    "this reward shares its weights with a transformer and cannot be moved or cast separately: move "
                    "the transformer first and build the reward after, or use share_weights=False"
                )
        return super()._apply(fn, recurse)


class _NormedTextOnly(nn.Module):
    """Adaptive layer norm that returns only normalised text tokens. It drops the norm's gates, which are unused."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        return self.norm(tokens, emb=temb)[0]


def _check_transformer(transformer: SD3Transformer2DModel, config: RewardConfig) -> None:
    if not isinstance(transformer, SD3Transformer2DModel):
        raise TypeError(
            f"transformer: got {type(transformer).__name__}; expected diffusers' SD3Transformer2DModel itself, not a "
            "compiled, distributed or PeftModel wrapper of it"
        )
    if any("_diffusers_hook" in vars(module) for module in transformer.modules()):
        raise ValueError(
            "the transformer has diffusers' hooks (group offloading, layerwise casting, caching), so no reward can "
            "read its weights: pass transformer=FOLDER, from which the reward loads weights of its own"
        )
    if any(isinstance(p, DTensor) for p in transformer.parameters()):
        raise ValueError("the transformer is sharded over processes (FSDP): build every reward before it is sharded")
    if config.num_layers > (depth := len(transformer.transformer_blocks)):
        raise ValueError(f"num_layers: got {config.num_layers}; expected at most {depth}, the transformer's blocks")
    last = max(config.text_taps, default=0)
    if last > 0 and transformer.transformer_blocks[last - 1].context_pre_only:
        raise ValueError(f"text tap {last}: this transformer's block {last} returns no text; tap {last - 1} at most")
    if any(block.attn.fused_projections for block in transformer.transformer_blocks):
        raise ValueError("the transformer's query, key and value projections are fused; call unfuse_qkv_projections()")
    _check_unmerged(_parts_read(transformer, config.num_layers))


def _parts_read(transformer: SD3Transformer2DModel, num_layers: int) -> tuple[nn.Module, ...]:
    blocks = nn.ModuleList(list(transformer.transformer_blocks)[:num_layers])
    return transformer.pos_embed, transformer.time_text_embed, transformer.context_embedder, blocks


def _packing(part: nn.Module) -> list[object]:
    """Return a list of the bitsandbytes quantisation states (weight scales) of the layers in `part`."""
    states = [vars(module).get(name) for module in part.modules() for name in ("state", "quant_state")]
    return [state for state in states if state is not None]


def _check_unmerged(parts: tuple[nn.Module, ...]) -> None:
    layers = [module for part in parts for module in part.modules() if isinstance(module, BaseTunerLayer)]
    if merged := {adapter for layer in layers for adapter in layer.merged_adapters}:
        expected = "expected none, since the reward needs the base weights: call transformer.unfuse_lora() first"
        raise ValueError(f"merged adapters: got {sorted(merged)}; {expected}")


def _remove_adapters(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())


def _remove_hooks(model: nn.Module) -> None:
    """Remove forward and backward hooks that deepcopy copied from the policy."""
    for module in model.modules():
        for kind in ("forward", "forward_pre", "backward", "backward_pre"):
            getattr(module, f"_{kind}_hooks").clear()
