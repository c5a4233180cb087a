"""Rewards for verl-omni, in its reward workers: no server, latents without decoding, samples scored in batches.

    reward.custom_reward_function.path=pkg://verl_omni.reward_loop.reward_manager.multi \\
    reward.custom_reward_function.name=_multi_reward_placeholder \\
    reward.reward_manager.name=MultiVisualRewardManager reward.reward_model.enable=False reward.num_workers=1 \\
    +reward.reward_functions.dinalrm.path=pkg://dinalrm_align.adapters.verl_omni \\
    +reward.reward_functions.dinalrm.name=compute_score +reward.reward_functions.dinalrm.required=true \\
    +reward.reward_functions.dinalrm.reward=dinalrm +reward.reward_functions.dinalrm.device=cuda \\
    +actor_rollout_ref.rollout.pipeline.output_type=latent \\
    +actor_rollout_ref.rollout.val_kwargs.pipeline.output_type=both

- **required=true.** Without it, MultiVisualRewardManager counts a failure of any reward as 0 and goes on. With it, or
  with this function as `custom_reward_function` of VisualRewardManager, a failure stops the run.
- **What is scored.** output_type `latent` and `both` (SD3): the clean latents; `image`: the image. Their scores do
  not compare: validate with `both`. A sum, "+...reward='dinalrm + 0.2*pickscore'", decodes: set `pipeline`, too.
- **Text.** The reward reads the rollout's embeddings if `max_sequence_length` equals its text length (128 for the
  released reward). Otherwise it encodes the prompt in `extra_info["raw_prompt"]`, which verl-omni's data preparation
  for SD3 writes.
- **Workers.** Each of `reward.num_workers` workers holds a copy of the reward and scores its waiting samples together;
  with `compute_score_sync`, at most one per thread of its executor.
- No gradient. Tried with verl-omni a1139ba, verl 0.9.1 and ray 2.60.0.
"""

import asyncio
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from dinalrm_align.adapters.samples import Sample, sample_queue

UNUSED = ("reward_router_address", "reward_model_tokenizer", "model_name")  # added by managers for generative models


async def compute_score(
    data_source: str, solution_image: Tensor, ground_truth: Any, extra_info: dict[str, Any], **settings: Any
) -> dict[str, float]:
    """Return {"score": score} of one sample, without blocking the event loop.

    solution_image: latents (C, h, w), floating, or an image (3, H, W), uint8. extra_info: may hold latents_clean
    (1, C, h, w), prompt_embeds, pooled_prompt_embeds. settings: `reward`; `prompt_key`, the prompt's place in
    extra_info, or "ground_truth"; and arguments of `samples.sample_queue`. Raises what scoring raises.
    """
    future = await asyncio.to_thread(_submit, solution_image, ground_truth, extra_info, **settings)
    return {"score": await asyncio.wrap_future(future)}


def compute_score_sync(
    data_source: str, solution_image: Tensor, ground_truth: Any, extra_info: dict[str, Any], **settings: Any
) -> dict[str, float]:
    """Do the same as `compute_score`, and block the calling thread meanwhile."""
    return {"score": _submit(solution_image, ground_truth, extra_info, **settings).result()}


def _submit(
    solution_image: Tensor,
    ground_truth: Any,
    extra_info: dict[str, Any],
    *,
    reward: str = "dinalrm",
    prompt_key: str = "raw_prompt",
    **settings: Any,
) -> "Future[float]":
    media = extra_info.get("latents_clean")
    media = _single("solution_image", solution_image, 3) if media is None else _single("latents_clean", media, 3)
    prompt = ground_truth if prompt_key == "ground_truth" else extra_info.get(prompt_key)
    embeds = None
    if extra_info.get("prompt_embeds") is not None:
        pooled = _single("pooled_prompt_embeds", extra_info.get("pooled_prompt_embeds"), 1)
        embeds = _single("prompt_embeds", extra_info["prompt_embeds"], 2), pooled
    settings = {name: value for name, value in settings.items() if name not in UNUSED}
    return sample_queue(reward, **settings).submit(Sample(media, media.dtype == torch.uint8, prompt, embeds))


def _single(name: str, value: Any, dims: int) -> Tensor:
    """Return one sample's tensor without a batch axis of size 1."""
    if isinstance(value, Tensor) and value.dim() == dims + 1 and len(value) == 1:
        value = value[0]
    if not isinstance(value, Tensor) or value.dim() != dims:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}; expected a tensor of one sample, with {dims} axes")
    return value.detach()
