"""Frameworks that hand over one sample at a time: single samples are scored in batches, through a queue."""

import functools
import logging
import threading
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinalrm_align.adapters.shared import SCORING, finite_floats, pointwise, shared_reward
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.batching import MicroBatcher
from dinalrm_align.reward.protocol import Reward, Text

LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()
_QUEUES: "dict[str, MicroBatcher[Sample, float]]" = {}


class Sample(NamedTuple):
    """One sample to score.

    media: scaled clean latents (C, h, w), floating, or an image (3, H, W), uint8 or floating in [0, 1]. is_image: which
    it is. prompt: None if unknown. embeds: prompt_embeds (L, D) and pooled_prompt_embeds (P,), or None.
    """

    media: Tensor
    is_image: bool
    prompt: str | None
    embeds: tuple[Tensor, Tensor] | None = None


def sample_queue(
    reward: str, *, seed: int = 0, max_batch_size: int = 8, max_wait_ms: float = 10.0, **settings: Any
) -> MicroBatcher[Sample, float]:
    """Return the queue that this process keeps for these arguments. `queue.submit(sample)` is the future of a score.

    seed: seed of the noise, the same for all samples. max_batch_size, max_wait_ms: see `MicroBatcher`. settings: as for
    `shared_reward`. The first call loads the reward. Threads may call this function at once.
    """
    settings = plain(settings)
    key = repr((reward, seed, max_batch_size, max_wait_ms, sorted(settings.items())))
    with _LOCK:
        if key not in _QUEUES:
            score = functools.partial(score_samples, pointwise(shared_reward(reward, **settings)), seed)
            limits = dict(max_batch_size=max_batch_size, max_wait_ms=max_wait_ms)
            _QUEUES[key] = MicroBatcher(score, key=_shapes, **limits)
        return _QUEUES[key]


def _shapes(sample: Sample) -> Hashable:
    return sample.is_image, sample.media.shape, sample.media.dtype, sample.embeds and sample.embeds[0].shape


@torch.no_grad()
def score_samples(reward: Reward, seed: int, samples: Sequence[Sample]) -> list[float]:
    """Return the scores of samples of one shape. Raises ValueError if the reward needs a prompt that is None."""
    prompts = [sample.prompt or "" for sample in samples]
    text: Text = prompts
    if samples[0].embeds is not None:
        text = text_for(reward, prompts, *map(torch.stack, zip(*(sample.embeds for sample in samples), strict=True)))
    if text is prompts and any(sample.prompt is None for sample in samples):
        raise ValueError(f"prompt: got none; {reward.name} reads prompts as strings, or embeddings of its own length")
    media = torch.stack([sample.media for sample in samples]).to(reward.device)
    score = reward.score_images if samples[0].is_image else reward
    with SCORING:
        return finite_floats(score(media, text, seeds=[seed] * len(samples)))


def text_for(reward: Reward, prompts: Sequence[str], prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Text:
    """Return what the reward should read: the framework's embeddings if their length is the reward's, else `prompts`.

    prompt_embeds (B, L, D), pooled_prompt_embeds (B, P). Another length changes scores, so the reward then encodes the
    strings with its own text encoders. The log says so once.
    """
    lengths = {part.encoder.clip_tokens + part.config.text_length for part in reward.noise_parts}
    tokens = prompt_embeds.shape[1]
    if lengths == {tokens}:
        return Conditions(prompts, prompt_embeds, pooled_prompt_embeds, *reward.text_lengths)
    if lengths:
        log_once(f"prompt_embeds have {tokens} tokens, {reward.name} reads {sorted(lengths)}: it encodes the prompts")
    return prompts


@functools.cache
def log_once(message: str) -> None:
    LOG.warning(message)


def plain(value: Any) -> Any:
    """Return mappings and sequences of a configuration, such as OmegaConf's, as dicts and lists."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
