"""Frameworks that hand over batches of samples with their decoded images, and perhaps with latents."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dinalrm_align.adapters.samples import text_for
from dinalrm_align.adapters.shared import SCORING
from dinalrm_align.models.text import Embeds
from dinalrm_align.reward.inputs import as_batch
from dinalrm_align.reward.protocol import Latents, Reward, Seeds, Sigma, finite_scores


def score_batch(
    reward: Reward,
    prompts: Sequence[str],
    *,
    latents: Latents | None,
    images: Any,
    embeds: Embeds | None = None,
    sigma: Sigma | None = None,
    seeds: Seeds | None = None,
) -> Tensor:
    """Return scores (B,), float32, on the CPU and without gradient. Image rewards score the images; nothing is decoded.

    Args:
        prompts: B strings.
        latents: (B, C, h, w) or B of (C, h, w), scaled and clean; None: latent rewards encode the images.
        images: as in `Reward.score_images`.
        embeds: prompt_embeds and pooled_prompt_embeds of the framework, see `text_for`.
        sigma: noise level. Default: the checkpoint's level for latents, also for images, so that the scores of a run
            compare whether or not it kept the latents of a sample.
        seeds: as in `Reward`.

    One thread scores at a time: tokenizers and caches are not thread-safe. Raises the errors of the reward.
    """
    prompts, scores = list(prompts), {}
    with SCORING, torch.no_grad():
        for name, part in reward.named_parts.items():
            text = prompts if embeds is None else text_for(part, prompts, *embeds)
            if latents is not None and not part.reads_images:
                batch = as_batch("latents", latents, part.device).to(part.device)
                score = part(batch, text, sigma=sigma, seeds=seeds)
            else:
                level = sigma if sigma is not None or part.sigmas is None else part.sigmas[0]
                if part.reads_noise and part.scores_images and level is None:
                    how = "pass sigma, or name the served parts one by one: A + 0.2*B"
                    raise ValueError(f"sigma: got none for {part.name!r}, which has no level of its own; {how}")
                score = part.score_images(images, text, seeds=seeds, **({"sigma": level} if part.reads_noise else {}))
            scores[name] = finite_scores(score, len(prompts), name).cpu()
    return finite_scores(sum(reward.weights[name] * scores[name] for name in scores), len(prompts), reward.name)
