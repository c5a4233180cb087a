"""An anchor: a second reward of another kind, added to the objective at every n-th update.

Long optimisation against one frozen reward exploits its errors. DiNa-LRM's authors add a pixel reward to the advantages
of their GRPO run, A = A_latent + 0.2 A_PickScore (arXiv 2602.11146). Here the second reward is evaluated only at every
`every`-th update, which saves most of its cost (a decode, a second model). A resumed run uses it at the same updates,
because these depend on the update number alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dinalrm_align.reward.protocol import Reward

ANCHOR = "anchor"
"""Name of the anchor in `terms` and in the metrics."""


@dataclass(frozen=True)
class Anchor:
    """A second reward, added with `weight` at updates every, 2 every, ... (counted from 1).

    Where scores are added, weight includes the factor of `matching_scale`, which brings both rewards to the same unit.
    GRPO normalises the advantages of each reward and does not need this factor.
    """

    reward: Reward
    every: int
    weight: float

    def is_due(self, update: int) -> bool:
        """Return whether update number `update`, counted from 0, uses the anchor."""
        return (update + 1) % self.every == 0


def terms(reward: Reward, anchor: Anchor | None, update: int) -> Mapping[str, tuple[float, Reward]]:
    """Return the rewards of update number `update`, from 0: "reward" and, when due, "anchor" -> (weight, reward).

    ReFL maximises the sum of weight x score, GRPO the sum of weight x advantage.
    """
    found = {"reward": (1.0, reward)}
    if anchor is not None and anchor.is_due(update):
        found[ANCHOR] = (anchor.weight, anchor.reward)
    return found


def matching_scale(score: Tensor, anchor_score: Tensor) -> float:
    """Return the standard deviation of score (N,) divided by that of anchor_score (N,), for the same N samples.

    Raises ValueError if shapes differ, N is below 2, or all scores of one reward are equal.
    """
    if score.shape != anchor_score.shape or score.dim() != 1 or len(score) < 2:
        got = f"{tuple(score.shape)} and {tuple(anchor_score.shape)}"
        raise ValueError(f"scores: got shapes {got}; expected (N,) twice, one of each per sample, N at least 2")
    spread, anchor_spread = (float(values.double().std()) for values in (score, anchor_score))
    if not anchor_spread > 0 or not spread > 0:
        got = f"standard deviations {spread} and {anchor_spread} over {len(score)} samples"
        raise ValueError(f"scores: got {got}; expected scores that differ")
    return spread / anchor_spread
