"""An anchor: a second reward of another kind, added to the objective at every n-th update.

Long optimisation against one frozen reward exploits its errors. DiNa-LRM's authors add a pixel reward to the advantages
of their GRPO run, A = A_latent + 0.2 A_PickScore (arXiv 2602.11146). Here the second reward is evaluated at every
`every`-th update only, so that its cost (a decode, a second model) is a fraction. Which updates are anchored depends on
their number alone, so that a resumed run anchors the same ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dinalrm_align.reward.protocol import Reward

ANCHOR = "anchor"
"""Name of the anchor among the terms of an objective, and in the metrics."""


@dataclass(frozen=True)
class Anchor:
    """A second reward, added with `weight` at updates every, 2 every, ... (counted from 1).

    weight includes the factor that brings the anchor to the first reward's unit, where scores are added
    (`matching_scale`); GRPO, which normalises advantages separately, needs none.
    """

    reward: Reward
    every: int
    weight: float

    def is_due(self, update: int) -> bool:
        """Whether update number `update`, from 0, is anchored."""
        return (update + 1) % self.every == 0


def terms(reward: Reward, anchor: Anchor | None, update: int) -> Mapping[str, tuple[float, Reward]]:
    """The objective of update number `update`, from 0: name -> (weight, reward); "reward", and "anchor" when it is due.

    ReFL maximises the sum of weight x score, GRPO that of weight x advantage.
    """
    found = {"reward": (1.0, reward)}
    if anchor is not None and anchor.is_due(update):
        found[ANCHOR] = (anchor.weight, anchor.reward)
    return found


def matching_scale(score: Tensor, anchor_score: Tensor) -> float:
    """Standard deviation of score (N,) over that of anchor_score (N,), of the same samples.

    Raises ValueError unless both have the same N of at least 2, and scores that differ.
    """
    if score.shape != anchor_score.shape or score.dim() != 1 or len(score) < 2:
        got = f"{tuple(score.shape)} and {tuple(anchor_score.shape)}"
        raise ValueError(f"scores: got shapes {got}; expected (N,) twice, one of each per sample, N at least 2")
    spread, anchor_spread = (float(values.double().std()) for values in (score, anchor_score))
    if not anchor_spread > 0 or not spread > 0:
        got = f"standard deviations {spread} and {anchor_spread} over {len(score)} samples"
        raise ValueError(f"scores: got {got}; expected scores that differ")
    return spread / anchor_spread
