"""An anchor is a second reward that is added to the training objective at every n-th update.

Long optimisation against one frozen reward exploits the errors of that reward. A second reward of another kind makes
the exploitation harder. DiNa-LRM's authors add a pixel reward's advantages in every update of GRPO: A = A_latent +
0.2 A_PickScore (arXiv 2602.11146). Here the anchor is evaluated only at every n-th update, which saves most of the cost
of image decoding and of the second model. A resumed run uses the anchor at the same updates as an uninterrupted run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dinalrm_align.reward.protocol import Reward

ANCHOR = "anchor"
"""Key of the second reward (anchor) in the result of `terms` and in metrics."""


@dataclass(frozen=True)
class Anchor:
    """A second reward that is added to the training objective, with a weight, at every n-th update.

    Args:
        every: n. With updates counted from 1, the anchor is used at updates n, 2n, 3n, ...
        weight: factor of the anchor's scores (ReFL) or advantages (GRPO); the factor of the first reward is 1.
            For ReFL, pass the weight times the result of `matching_scale`, because the rewards differ in scale.
    """

    reward: Reward
    every: int
    weight: float

    def is_due(self, update: int) -> bool:
        """Return whether the anchor is used at update number `update`, counted from 0."""
        return (update + 1) % self.every == 0


def terms(reward: Reward, anchor: Anchor | None, update: int) -> Mapping[str, tuple[float, Reward]]:
    """Return the rewards that an update maximises, with their weights, as a dict: name -> (weight, reward).

    The key "reward" holds the first reward, with weight 1. The key "anchor" holds the second reward, and is present
    only at updates that use it. ReFL maximises the sum of weight x score, GRPO the sum of weight x advantage.
    """
    found = {"reward": (1.0, reward)}
    if anchor is not None and anchor.is_due(update):
        found[ANCHOR] = (anchor.weight, anchor.reward)
    return found


def matching_scale(score: Tensor, anchor_score: Tensor) -> float:
    """Return std(score) / std(anchor_score), the factor that brings anchor scores to the scale of `score`.

    The arguments are (N,), scores of the same samples. Raises ValueError if shapes differ, N < 2, or one std is 0.
    """
    if score.shape != anchor_score.shape or score.dim() != 1 or len(score) < 2:
        got = f"{tuple(score.shape)} and {tuple(anchor_score.shape)}"
        raise ValueError(f"scores: got shapes {got}; expected (N,) twice, one of each per sample, N at least 2")
    spread, anchor_spread = (float(values.double().std()) for values in (score, anchor_score))
    if not anchor_spread > 0 or not spread > 0:
        got = f"standard deviations {spread} and {anchor_spread} over {len(score)} samples"
        raise ValueError(f"scores: got {got}; expected scores that differ")
    return spread / anchor_spread
