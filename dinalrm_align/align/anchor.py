"""An anchor is a second reward that is added to the training objective at every n-th update.

Long optimisation against one frozen reward exploits the errors of that reward. A second reward of another kind makes
the exploitation harder. DiNa-LRM's authors add a pixel reward's advantages in every update of GRPO: A = A_latent +
0.2 A_PickScore (arXiv 2602.11146). Here the anchor is evaluated only at every n-th update, which saves most of the cost
of image decoding and of the second model. A resumed run uses the anchor at the same updates as an uninterrupted run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dinalrm_align.reward.protocol import Reward

ANCHOR = "anchor"
"""Key of the second reward (anchor) in the result of `terms` and in metrics."""


@dataclass(frozen=True)
class Anchor:
    """A second reward that is added to the training objective, with a weight, at every n-th update.

    Args:
        every: n. With updates counted from 1, the anchor is used at updates n, 2n, 3n, ...
        weight: weight of the anchor's scores (ReFL) or advantages (GRPO); the first reward's have weight 1.
            ReFL scales the anchor's scores to the spread of the first reward's before it applies the weight.
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
