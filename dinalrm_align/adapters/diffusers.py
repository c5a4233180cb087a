"""Reward-guided sampling in diffusers: each step also moves the latents along the gradient of a reward.

One argument, for SD3 pipelines with a step-end callback (text to image, image to image, inpainting):

    reward = load_reward("dinalrm", pipeline=pipeline)  # shares the transformer's weights, which must be frozen
    image = pipeline(prompt, callback_on_step_end=RewardGuidance(reward)).images[0]

Image-to-image pipelines also need the prompts, `RewardGuidance(reward, prompts=[prompt])`. In a modular pipeline, a
guider takes the place of classifier-free guidance:

    blocks = StableDiffusion3AutoBlocks().init_pipeline()
    blocks.update_components(**parts, guider=RewardGuider(reward, guidance_scale=4.5))

**What reaches the reward.** The noisy latents, (B, C, h, w), scaled, with their noise level, and the pipeline's own
embeddings of the prompts (under classifier-free guidance, the conditional half). No image is decoded. The gradient
passes through the reward only, not through the pipeline's transformer: a guided step costs one forward and one backward
pass of the reward. The reward must score noisy latents (`score_noisy`), as dinalrm and sums of such rewards do. For any
other reward the first guided step raises TypeError; `best_of` takes every reward.

**The step.** Latents move by strength(sigma) * RMS(step) * g / RMS(g), and no value by more than 2 RMS(step). Here g is
the gradient, and RMS is that of one sample's latents (unit-RMS steps of arXiv 2608.03929). The scale of the reward
therefore has no effect. At strength 0 the latents are returned untouched, and images are bit-identical.

**Text.** SD3 pipelines encode 256 T5 tokens by default; the released reward reads 128. Pass
`max_sequence_length=reward.config.text_length` to the pipeline, or the prompts to the guidance.

Errors of the reward end the pipeline's call. Tried with diffusers 0.42.1.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import PipelineCallback
from diffusers.guiders import ClassifierFreeGuidance
from torch import Tensor

from dinalrm_align.flow.noise import NUM_TRAIN_TIMESTEPS
from dinalrm_align.models.text import Conditions, check_prompts
from dinalrm_align.reward.protocol import Reward, Text
from dinalrm_align.train.settings import check_integer, check_number

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from diffusers.guiders.guider_utils import GuiderOutput
    from diffusers.modular_pipelines import BlockState

Strength = float | Callable[[float], float]
"""strength(sigma), in units of the sampler's step. A float holds for sigma in [0.2, 1) and is 0 elsewhere.

At sigma 1 latents hold nothing of the image. At a low sigma, few steps are left to denoise what guidance adds.
"""
LOWEST, CLIP, SMALLEST = 0.2, 2.0, 1e-8
"""Lowest sigma that a float guides; largest change of a value, in RMS of the step; RMS of a gradient taken as zero."""


def early_strength(sigma: float) -> float:
    """Return the strength of arXiv 2608.03929 for SD3: 0.3 for sigma above 0.8, 0.05 above 0.2, 0 at 1 and below 0.2.

    The first levels decide on the layout of an image. On the embedded world they bring most of the gain.
    """
    if not LOWEST < sigma < 1:
        return 0.0
    return 0.3 if sigma > 0.8 else 0.05


class _Guide:
    """The change of latents that a reward asks for, in units of the sampler's step."""

    def __init__(self, reward: Reward, strength: Strength, prompts: Text | None) -> None:
        if not callable(strength):
            check_number("strength", strength, low=0)
        self.reward, self.strength, self.prompts = reward, strength, prompts

    def strength_at(self, sigma: float) -> float:
        if callable(self.strength):
            return self.strength(sigma)
        return self.strength if LOWEST <= sigma < 1 else 0.0

    def __call__(self, latents: Tensor, sigma: float, embeds: Sequence[Tensor]) -> Tensor:
        """Return strength * gradient / RMS(gradient), clipped, (B, C, h, w), float32.

        embeds: prompt_embeds and pooled_prompt_embeds, B rows each, or 2 B rows of which the last B are the prompts'.
        Not read if prompts were given. Raises ValueError if the gradient is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            count, x_sigma = len(latents), latents.detach().float().clone().requires_grad_()
            text = self.prompts
            if text is None:
                text = Conditions([""] * count, *(given[-count:].detach().clone() for given in embeds))
            (gradient,) = torch.autograd.grad(self.reward.score_noisy(x_sigma, sigma, text).sum(), x_sigma)
        size = _rms(gradient)
        if not torch.isfinite(size).all():
            raise ValueError(f"sigma {sigma:.4g}: the gradient is not finite; use a reward in bfloat16 or float32")
        unit = torch.where(size > SMALLEST, gradient / size, 0.0)
        return (self.strength_at(sigma) * unit).clamp(-CLIP, CLIP)


def _rms(values: Tensor) -> Tensor:
    """Return the root mean square of each sample of (B, C, h, w), as (B, 1, 1, 1), float32."""
    return values.float().square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


class RewardGuidance(PipelineCallback):
    """A step-end callback that moves the latents along the gradient of a reward at the noise level just reached.

    The size of a step is its difference to the previous latents. The callback knows the previous latents from the
    second step on, so the first step, from pure noise, is not guided. An object serves one running pipeline at a time.
    It can stand in diffusers' `MultiPipelineCallbacks`.

    Args:
        reward: scores noisy latents (`score_noisy`), on the pipeline's device.
        strength: a float, or a function of sigma (see `Strength`). In the first embedded world, a float
            of 0.8 raised the reward more than 0.2 did, but no longer raised the oracle's score.
        prompts: one string per image, or `Conditions`. Default: the pipeline's embeddings, which only text-to-image
            pipelines hand over. Needed for image to image and inpainting, and if the reward's text length differs.
    """

    tensor_inputs = ["latents", "prompt_embeds", "pooled_prompt_embeds"]

    def __init__(self, reward: Reward, strength: Strength = early_strength, *, prompts: Text | None = None) -> None:
        super().__init__()
        self._guide, self._before = _Guide(reward, strength, prompts), None
        if prompts is not None:
            self.tensor_inputs = ["latents"]

    def callback_fn(
        self, pipeline: "DiffusionPipeline", step_index: int, timesteps: Any, callback_kwargs: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return `callback_kwargs`, with other latents if the step is guided. Raises ValueError without a text."""
        if missing := [name for name in self.tensor_inputs if name not in callback_kwargs]:
            raise ValueError(f"{missing[0]}: got none from the pipeline; pass the prompts, RewardGuidance(prompts=...)")
        latents, scheduler = callback_kwargs["latents"], pipeline.scheduler
        sigma = scheduler.sigmas[scheduler.step_index].item()  # the level reached: the scheduler has made its step
        if step_index > 0 and self._guide.strength_at(sigma):
            push = self._guide(latents, sigma, [callback_kwargs[name] for name in self.tensor_inputs[1:]])
            step = latents.float() - self._before.float()
            guided = latents.float() + _rms(step) * push
            callback_kwargs = {**callback_kwargs, "latents": guided.to(latents.dtype)}
        self._before = callback_kwargs["latents"]
        return callback_kwargs


class RewardGuider(ClassifierFreeGuidance):
    """Classifier-free guidance whose velocity also follows the gradient of a reward, for SD3's modular pipelines.

    The gradient is that at the level before the step, and the change that of `RewardGuidance`: a step of d sigma
    moves the latents by d sigma v, so v changes by -strength RMS(v) g / RMS(g). The first step can be guided too.

    Args:
        reward, strength, prompts: as in `RewardGuidance`.
        options: arguments of `ClassifierFreeGuidance`, such as `guidance_scale`.
    """

    def __init__(
        self, reward: Reward, strength: Strength = early_strength, *, prompts: Text | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self._guide = _Guide(reward, strength, prompts)

    def new(self, **options: Any) -> "RewardGuider":
        """Return a copy with other arguments of `ClassifierFreeGuidance`."""
        own = {name: value for name, value in self.config.items() if not name.startswith("_")}
        guide = self._guide
        return type(self)(guide.reward, guide.strength, prompts=guide.prompts, **{**own, **options})

    def __call__(self, data: "list[BlockState]") -> "GuiderOutput":
        output, given = super().__call__(data), data[0]
        sigma = float(self._timestep) / NUM_TRAIN_TIMESTEPS
        if self._guide.strength_at(sigma):
            push = self._guide(given.hidden_states, sigma, [given.encoder_hidden_states, given.text_embeds])
            velocity = output.pred.float()
            output.pred = (velocity - _rms(velocity) * push).to(output.pred.dtype)
        return output


@torch.no_grad()
def best_of(
    count: int, pipeline: "DiffusionPipeline", reward: Reward, prompts: Sequence[str], **options: Any
) -> tuple[Tensor, Tensor]:
    """Sample `count` latents per prompt and keep the best-scored. Works with every reward.

    Args:
        options: arguments of the pipeline, such as `generator` and `callback_on_step_end`. Not `latents`, which would
            make all samples of a prompt equal.

    Returns the best latents (P, C, h, w), scaled, for `decode_latents(pipeline.vae, latents)` in `models.pipeline`,
    and all scores (P, count), float32. All samples of a prompt are scored in one call, with the same noise.
    """
    check_integer("count", count, low=1)
    prompts = check_prompts(prompts)
    if "latents" in options:
        raise ValueError("latents: got some; expected none, since every sample would start from the same ones")
    drawn = [pipeline(prompts, **{**options, "output_type": "latent"}).images for _ in range(count)]
    groups = torch.stack(drawn, dim=1)  # (P, count, C, h, w)
    scores = torch.stack([reward(group, [prompt] * count) for prompt, group in zip(prompts, groups, strict=True)])
    return groups[torch.arange(len(prompts)), scores.argmax(dim=1)], scores
