"""The policy: an SD3 transformer with a trainable LoRA. With the LoRA disabled, the policy is the frozen reference.

The LoRA is a peft adapter on the eight attention projections of every transformer block (attn2 included). The LoRA is
always float32, because bfloat16 would round AdamW's updates away. A latent reward may share the base weights.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dinalrm_align.flow.noise import check_latents, timestep_of
from dinalrm_align.flow.sampling import Velocity
from dinalrm_align.models.text import Conditions
from dinalrm_align.models.weights import check_fit
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.train.files import atomically, reading
from dinalrm_align.train.settings import check_integer, check_number

ADAPTER = "policy"
LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "transformer."
PROJECTIONS = [
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
]  # fmt: skip


class Policy:
    """A transformer with frozen base weights and a trainable LoRA, the peft adapter "policy".

    Raises ValueError if the transformer already has an adapter of this name.

    Args:
        transformer: is modified in place: frozen, and extended by the LoRA.
        seed: seed of the LoRA's matrix A. The matrix B starts at zero, so that a new policy equals the reference.
    """

    def __init__(self, transformer: SD3Transformer2DModel, config: LoraConfig, *, seed: int) -> None:
        if not isinstance(transformer, SD3Transformer2DModel) or not isinstance(config, LoraConfig):
            got = f"{type(transformer).__name__} and {type(config).__name__}"
            raise TypeError(f"policy: got {got}; expected diffusers' SD3Transformer2DModel and a LoraConfig")
        check_integer("seed", seed, high=2**63 - 1)
        self.transformer = transformer.requires_grad_(False)
        self.config = config
        init = True if config.init == "kaiming" else config.init
        lora = PeftLoraConfig(
            r=config.rank, lora_alpha=config.alpha, init_lora_weights=init, target_modules=PROJECTIONS
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                transformer.add_adapter(lora, ADAPTER)
            except ValueError as error:
                raise ValueError(f"transformer: got one that has a policy already ({error}); load another") from error
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
        """Return the velocity d latents / d sigma, (B, C, H, W) float32, differentiable in latents and LoRA.

        Args:
            latents: (B, C, H, W), any dtype.
            sigma: a float or (B,), in [0, 1].
            guidance_scale: scale g in v_negative + g (v - v_negative). If at most 1, the result is v (no guidance).
            negative: B conditions that give v_negative; required if guidance_scale is above 1.
            negative_gradient: whether gradients flow through v_negative; if False, it is detached.
        """
        check_latents("latents", latents)
        if latents.shape[1] != (channels := self.transformer.config.in_channels):
            raise ValueError(f"latents: got {latents.shape[1]} channels; expected {channels}")
        check_number("guidance_scale", guidance_scale, low=0)
        guided, batch = guidance_scale > 1, len(latents)
        if len(conditions) != batch:
            raise ValueError(f"conditions: got {len(conditions)} for {batch} latents; expected one each")
        if guided and (negative is None or len(negative) != batch):
            got = "none" if negative is None else len(negative)
            raise ValueError(
                f"negative: got {got} at guidance_scale {guidance_scale}; expected one per latent, {batch}"
            )
        prompt_embeds, pooled = conditions.prompt_embeds, conditions.pooled_prompt_embeds
        timestep = timestep_of(sigma).to(latents.device).expand(batch)
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
        """Return a function (latents, sigma) -> velocity. `negative`: one empty prompt's conditions, for guidance."""
        if guidance_scale > 1 and negative is not None:
            negative = negative.take([0] * len(conditions), self.device)
        return lambda latents, sigma: self.velocity(
            latents, sigma, conditions, guidance_scale, negative, negative_gradient
        )

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Context manager in which `velocity` uses the frozen base model alone, without gradient."""
        flags = [(p, p.requires_grad) for p in self.transformer.parameters()]
        self.transformer.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            self.transformer.enable_adapters()
            for p, flag in flags:  # peft changes requires_grad when it switches an adapter
                p.requires_grad_(flag)

    def weights(self) -> dict[str, Tensor]:
        """Return {name: copy of the LoRA tensor}, on the policy's device. `with_weights` takes this dict."""
        return {name: p.detach().clone() for name, p in self.parameters.items()}

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Context manager in which `velocity` uses LoRA tensors that `weights()` returned earlier, without gradient.

        The storage of the parameters is exchanged, not overwritten, so that existing autograd graphs stay valid.
        """
        self.check_weights(weights)
        trained = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = weights[name]
            with torch.no_grad():
                yield
        finally:
            for name, p in self.parameters.items():
                p.data = trained[name]

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless `weights` have the names, shapes, dtypes and devices of the policy's LoRA tensors."""
        own = self.parameters
        got, expected = ({n: (tuple(t.shape), t.dtype, t.device) for n, t in of.items()} for of in (weights, own))
        if got != expected:
            name = min(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            raise ValueError(f"weights of another LoRA: {name}: got {got.get(name)}; expected {expected.get(name)}")

    def save_lora(self, folder: Path) -> None:
        """Write the LoRA to folder/pytorch_lora_weights.safetensors, which diffusers' `load_lora_weights` reads."""
        try:
            with atomically(folder / LORA_FILE) as temporary:
                StableDiffusion3Pipeline.save_lora_weights(
                    folder,
                    transformer_lora_layers=get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER),
                    transformer_lora_adapter_metadata=self.transformer.peft_config[ADAPTER].to_dict(),  # with alpha
                    weight_name=temporary.name,
                )
        except SafetensorError as error:
            raise OSError(f"{folder / LORA_FILE} cannot be written ({error})") from error

    def load_lora(self, folder: Path) -> None:
        """Load a LoRA that `save_lora` wrote. Raises ValueError if it does not fit or contains NaN or inf."""
        path = folder / LORA_FILE
        with reading("LoRA in safetensors", path), safe_open(path, framework="pt") as file:
            saved = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}
            metadata = dict(json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}")))
        got = metadata.get(f"{PREFIX}r"), metadata.get(f"{PREFIX}lora_alpha")
        if got != (expected := (self.config.rank, self.config.alpha)):
            raise ValueError(f"{path}: got rank and alpha {got}; expected {expected}, those of the policy")
        check_fit(get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER), saved, path)
        if bad := [name for name, tensor in saved.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{path}: {len(bad)} tensors are not finite: {', '.join(bad[:3])}")
        set_peft_model_state_dict(self.transformer, saved, adapter_name=ADAPTER)
