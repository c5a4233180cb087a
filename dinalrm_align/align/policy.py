"""The policy: an SD3 transformer with a trainable LoRA. With the LoRA disabled, the policy is the frozen reference.

The LoRA is a peft adapter on the eight attention projections of every transformer block (attn2 included). The LoRA is
always float32, because bfloat16 would round AdamW's updates away. On a half-precision base, the forward casts it to the
base's dtype (see `shadow`). A latent reward may share the base weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from dinalrm_align.align.lora import Lora, read_lora, write_lora
from dinalrm_align.align.shadow import Shadows
from dinalrm_align.flow.noise import check_latents, timestep_of
from dinalrm_align.flow.sampling import Velocity
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.train.device import to_device
from dinalrm_align.train.settings import check_integer, check_number

ADAPTER = "policy"
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
        with torch.random.fork_rng(devices=[]):  # peft draws on the CPU: leave the GPUs' generators alone
            torch.default_generator.manual_seed(seed)
            try:
                transformer.add_adapter(lora, ADAPTER)
            except ValueError as error:
                raise ValueError(f"transformer: got one that has a policy already ({error}); load another") from error
        cast_training_params(transformer, torch.float32)
        if transformer.dtype != torch.float32:
            Shadows(transformer, ADAPTER)
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in transformer.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model, in which `velocity` is computed."""
        return self.transformer.dtype

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
        timestep = to_device(timestep_of(sigma), latents.device).expand(batch)
        if guided:
            latents, timestep = torch.cat([latents, latents]), torch.cat([timestep, timestep])
            prompt_embeds = torch.cat([negative.prompt_embeds, prompt_embeds])
            pooled = torch.cat([negative.pooled_prompt_embeds, pooled])
        dtype = self.dtype
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
        """Write the LoRA to folder/pytorch_lora_weights.safetensors (see `write_lora`)."""
        write_lora(folder, self._layers(), self.transformer.peft_config[ADAPTER].to_dict())

    def load_lora(self, source: str | Path) -> None:
        """Read a LoRA from a file, folder or hub id (`read_lora`), and set the policy's LoRA to it (`set_lora`)."""
        self.set_lora(read_lora(source))

    def set_lora(self, lora: Lora) -> None:
        """Set the policy's LoRA to `lora`, at the strength that it has there.

        A smaller rank than the policy's is padded: the further rows of A keep their initial values, the further columns
        of B are zero. Projections that the file lacks keep A and get B = 0. Neither changes what the LoRA adds. Raises
        ValueError for a larger rank, and for projections and widths that the policy does not have.
        """
        own, scale = self._layers(), self.config.alpha / self.config.rank
        if unknown := [layer for layer in lora.layers if f"{layer}.lora_A.weight" not in own]:
            got = f"a LoRA on {len(unknown)} layers that the policy does not train, such as {unknown[0]}"
            raise ValueError(f"{lora.path}: got {got}; expected the attention projections {', '.join(PROJECTIONS)}")
        loaded = {name: torch.zeros_like(t) if ".lora_B." in name else t.clone() for name, t in own.items()}
        for layer, (a, b) in lora.layers.items():
            to_a, to_b = (loaded[f"{layer}.{matrix}.weight"] for matrix in ("lora_A", "lora_B"))
            if (rank := len(a)) > len(to_a):
                raise ValueError(
                    f"{lora.path}: {layer}: got rank {rank}; expected at most the policy's, {len(to_a)}: set "
                    f"policy.rank to {rank} or more"
                )
            if (a.shape[1], len(b)) != (to_a.shape[1], len(to_b)):
                raise ValueError(
                    f"{lora.path}: {layer}: got {a.shape[1]} -> {len(b)} channels; expected {to_a.shape[1]} -> "
                    f"{len(to_b)}, the base model's"
                )
            to_a[:rank], to_b[:, :rank] = a, b / scale
        set_peft_model_state_dict(self.transformer, loaded, adapter_name=ADAPTER)

    def _layers(self) -> dict[str, Tensor]:
        """Return the LoRA's tensors by name, such as transformer_blocks.0.attn.to_q.lora_A.weight."""
        return get_peft_model_state_dict(self.transformer, adapter_name=ADAPTER)
