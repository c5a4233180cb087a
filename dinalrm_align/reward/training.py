"""Training a reward on preference pairs (arXiv 2602.11146, section 4): one draw of noise levels, one forward, one loss.

Pictures of a group share their noise and their sigma, so that a gap of scores is about the pictures and nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.flow.config import SigmaConfig
from dinalrm_align.flow.noise import sample_sigma
from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.reward.loss_config import LossConfig
from dinalrm_align.reward.losses import preference_loss
from dinalrm_align.reward.model import RewardModel


@dataclass(frozen=True)
class NoisedPairs:
    """A batch with what is drawn for it: noise (M, C, H, W) and sigma (M,), float32, equal within a group."""

    batch: PairBatch
    noise: Tensor
    sigma: Tensor

    @property
    def count(self) -> int:
        """N pairs, what the loss is the mean over."""
        return len(self.batch.chosen)


def draw_levels(batch: PairBatch, density: SigmaConfig, generators: Sequence[torch.Generator]) -> NoisedPairs:
    """Draw noise and sigma of each of the G groups from its own generator, so that they do not depend on what else is
    in the batch; the result is on the batch's device.
    """
    device = batch.latents.device
    noise = seeded_noise(tuple(batch.latents.shape[1:]), generators)
    sigma = torch.cat([sample_sigma(density.density, 1, generator=g, **density.parameters()) for g in generators])
    return NoisedPairs(batch, noise.to(device)[batch.group], sigma.to(device)[batch.group])


def preference_step(model: RewardModel, pairs: NoisedPairs, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss over pairs, with a graph, from one forward over all pictures; and, detached:

    train_accuracy, share of pairs in which the preferred picture scores higher (soft labels: above 1/2); score_gap, the
    mean gap of raw scores in the preferred direction; score_std, of all raw scores.
    """
    batch, text = pairs.batch, pairs.batch.conditions
    raw = model(batch.latents, text.prompt_embeds, text.pooled_prompt_embeds, pairs.sigma, pairs.noise)
    chosen, rejected = raw[batch.chosen], raw[batch.rejected]
    losses = preference_loss(chosen, rejected, pairs.sigma[batch.chosen], batch.label, config=config)
    gap = (chosen - rejected).detach()
    return losses.mean(), {
        "train_accuracy": (gap * (batch.label - 0.5) > 0).float().mean(),
        "score_gap": (gap * (2 * batch.label - 1)).mean(),
        "score_std": raw.detach().std(),
    }


def score_batch(model: RewardModel, batch: PairBatch, level: tuple[float, ...], noise: Tensor) -> Tensor:
    """Raw scores (M,) at one sigma, or of the ensemble of several; batch and noise are moved to the model's device."""
    device = model.trunk.device
    batch, text = batch.to(device), batch.conditions.to(device)
    return model(batch.latents, text.prompt_embeds, text.pooled_prompt_embeds, level, noise.to(device)).to("cpu")
