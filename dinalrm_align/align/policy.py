"""The policy: an SD3 transformer with a trainable LoRA; its frozen self, the reference, is the same with the LoRA off.

The adapter is peft's, on the eight attention projections of every block (attn2 included), in float32 whatever the
dtype of the base: in bfloat16 AdamW's updates round away. The base weights stay frozen and may be shared with a reward.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dinalrm_align.flow.noise import check_latents, timestep_of
from dinalrm_align.flow.sampling import Velocity
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.train.durable import atomically
from dinalrm_align.train.files import reading
from dinalrm_align.train.settings import check_integer, check_number

ADAPTER = "policy"
LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
PROJECTIONS = [
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
]  # fmt: skip


class Policy:
    """Wraps a transformer, in place: freezes it and adds the adapter "policy". One policy per transformer."""

    def __init__(self, transformer: SD3Transformer2DModel, config: LoraConfig, *, seed: int) -> None:
        """transformer: on its device and in its dtype. seed: of the initial A; B starts at zero, so that the new policy
        is the reference exactly. Raises ValueError when the transformer has such an adapter already, TypeError for
        another architecture.
        """
        if not isinstance(transformer, SD3Transformer2DModel) or not isinstance(config, LoraConfig):
            got = f"{type(transformer).__name__} and {type(config).__name__}"
            raise TypeError(f"policy: got {got}, expected diffusers' SD3Transformer2DModel and a LoraConfig")
        check_integer("seed", seed, high=2**63 - 1)
        self.transformer = transformer.requires_grad_(False)
        self.config = config
        lora = PeftLoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            init_lora_weights=True if config.init == "kaiming" else config.init,
            target_modules=PROJECTIONS,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                transformer.add_adapter(lora, ADAPTER)
            except ValueError as error:
                raise ValueError(f"the transformer takes no policy's adapter ({error}): one policy each") from error
        cast_training_params(transformer, torch.float32)
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in transformer.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor | float,
        conditions: Conditions,
        guidance_scale: float = 1.0,
        negative: Conditions | None = None,
        negative_gradient: bool = True,
    ) -> Tensor:
        """d latents / d sigma at noise level sigma: (B, C, H, W), float32, differentiable in latents and the LoRA.

        latents (B, C, H, W), any dtype; sigma a float or (B,) in [0, 1]. With a guidance_scale g above 1,
        classifier-free guidance v_negative + g (v - v_negative), both from one forward of 2B with the B `negative`
        conditions first; without negative_gradient v_negative is a constant to the backward pass, as in Flow-GRPO's
        training. Raises ValueError when guidance is asked for without them, or the numbers differ.
        """
        check_latents("latents", latents)
        if latents.shape[1] != self.transformer.config.in_channels:
            expected = self.transformer.config.in_channels
            raise ValueError(f"latents: got {latents.shape[1]} channels, the transformer takes {expected}")
        check_number("guidance_scale", guidance_scale, low=0)
        guided = guidance_scale > 1
        if len(latents) != len(conditions) or (guided and (negative is None or len(negative) != len(latents))):
            raise ValueError(
                f"got {len(latents)} latents, {len(conditions)} conditions and "
                f"{'no' if negative is None else len(negative)} negative conditions at guidance_scale "
                f"{guidance_scale}; expected as many conditions as latents, and as many negative ones when "
                "guidance_scale is above 1"
            )
        prompt_embeds, pooled = conditions.prompt_embeds, conditions.pooled_prompt_embeds
        timestep = timestep_of(sigma).to(latents.device).expand(len(latents))
        if guided:
            latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
            prompt_embeds = torch.cat([negative.prompt_embeds, prompt_embeds])
            pooled = torch.cat([negative.pooled_prompt_embeds, pooled])
        dtype = self.transformer.dtype
        (velocity,) = self.transformer(
            hidden_states=latents.to(dtype),
            timestep=timestep,
            encoder_hidden_states=prompt_embeds.to(dtype),
            pooled_projections=pooled.to(dtype),
            return_dict=False,
        )
        velocity = velocity.float()
        if not guided:
            return velocity
        unconditional, conditional = velocity.chunk(2)
        if not negative_gradient:
            unconditional = unconditional.detach()
        return unconditional + guidance_scale * (conditional - unconditional)

    def velocity_for(
        self,
        conditions: Conditions,
        guidance_scale: float = 1.0,
        negative: Conditions | None = None,
        *,
        negative_gradient: bool = True,
    ) -> Velocity:
        """The velocity under these conditions, as samplers take it. negative: of one empty prompt, for guidance."""
        against = None
        if guidance_scale > 1 and negative is not None:
            against = negative.take([0] * len(conditions), self.device)

        def velocity(latents: Tensor, sigma: float | Tensor) -> Tensor:
            return self.velocity(latents, sigma, conditions, guidance_scale, against, negative_gradient)

        return velocity

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within the block `velocity` is the frozen base model's, without gradient; afterwards all is as it was.

        peft switches `requires_grad` along with an adapter; the flags are put back.
        """
        layers = [module for module in self.transformer.modules() if isinstance(module, BaseTunerLayer)]
        flags = [(p, p.requires_grad) for p in self.transformer.parameters()]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for p, flag in flags:
                p.requires_grad_(flag)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the LoRA as it is now, by name, on its device; what `with_weights` takes."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block `velocity` is that of another LoRA, without gradient; afterwards all is as it was.

        weights: as `weights()` gave them. No number is copied: the parameters look at other storage for a while, so
        that graphs built before are still good. Raises ValueError when names, shapes, dtypes or devices differ.
        """
        self.check_weights(weights)
        held = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = weights[name]
            with torch.no_grad():
                yield
        finally:
            for name, p in self.parameters.items():
                p.data = held[name]

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """ValueError unless names, shapes, dtypes and devices are those of this policy's LoRA."""
        kinds = [{n: (tuple(t.shape), t.dtype, t.device) for n, t in of.items()} for of in (weights, self.parameters)]
        if kinds[0] != kinds[1]:
            got, expected = kinds
            name = min(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            raise ValueError(f"weights of another LoRA: {name}: got {got.get(name)}, expected {expected.get(name)}")

    def enable_gradient_checkpointing(self) -> None:
        """Recompute every block in the backward pass (non-reentrant) instead of keeping its activations."""
        self.transformer.enable_gradient_checkpointing()

    def save_lora(self, folder: Path) -> None:
        """Write folder/pytorch_lora_weights.safetensors, which `StableDiffusion3Pipeline.load_lora_weights` reads
        back to
        identical outputs: alpha travels in the file's metadata, without which it would be taken for the rank.
        """
        try:
            with atomically(folder / LORA_FILE) as temporary:
                StableDiffusion3Pipeline.save_lora_weights(
                    folder,
                    transformer_lora_layers=get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER),
                    transformer_lora_adapter_metadata=self.transformer.peft_config[ADAPTER].to_dict(),
                    weight_name=temporary.name,
                )
        except SafetensorError as error:
            raise OSError(f"{folder / LORA_FILE} cannot be written ({error})") from error

    def load_lora(self, folder: Path) -> None:
        """Take the weights that `save_lora` wrote. Raises ValueError for another rank or alpha, and for missing or
        unexpected tensors."""
        path = folder / LORA_FILE
        with reading("LoRA in safetensors", path), safe_open(path, framework="pt") as file:
            saved = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}
            metadata = dict(json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}")))
        got = metadata.get(f"{PREFIX}r"), metadata.get(f"{PREFIX}lora_alpha")
        if got != (self.config.rank, self.config.alpha):
            raise ValueError(
                f"{path}: got rank and alpha {got}; expected {(self.config.rank, self.config.alpha)}, this policy's"
            )
        expected = get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER)
        differing = sorted(expected.keys() ^ saved.keys())
        differing += [name for name in expected if name in saved and saved[name].shape != expected[name].shape]
        differing += [name for name in saved if not saved[name].isfinite().all()]
        if differing:
            raise ValueError(f"{path} does not fit this transformer: {len(differing)} tensors differ: {differing[:4]}")
        set_peft_model_state_dict(self.transformer, saved, adapter_name=ADAPTER)
