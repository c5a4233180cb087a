"""A light anchor: a reward, and at every n-th update a second one of another kind beside it.

Long optimisation against one frozen reward drifts into what fools it. DiNa-LRM's authors mix a pixel reward into the
advantages of their GRPO run, A = A_latent + 0.2 A_PickScore, and name light regularisation in pixel space as future
work (arXiv 2602.11146). Here the second reward is asked at every `every`-th update alone, so that its cost (a decode, a
second model) is a share of what it would be.

Which updates are anchored follows from the micro-step and from nothing else, so that a resumed run anchors the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dinalrm_align.align.config import AnchorConfig

Reward = Callable[..., Tensor]
"""reward(latents (B, C, H, W), prompts=..., sigma=..., noise=...) -> (B,), differentiable: a LatentReward, a
ClipReward."""
Terms = dict[str, tuple[float, Reward]]
"""name -> (weight, reward)"""


def matching_scale(score: Tensor, anchor_score: Tensor) -> float:
    """s.d. of score (N,) over that of anchor_score (N,), both of the same samples: what brings the anchor to the
    reward's unit. ValueError unless the numbers agree, are two at least, and the anchor's scores differ.
    """
    if score.shape != anchor_score.shape or score.dim() != 1 or len(score) < 2:
        raise ValueError(
            f"one score of each per sample: got {tuple(score.shape)} and {tuple(anchor_score.shape)}; expected (N,) "
            "twice, at least two samples"
        )
    spread, anchor_spread = (float(values.double().std()) for values in (score, anchor_score))
    if not anchor_spread > 0 or not spread > 0:
        raise ValueError(f"scores of {len(score)} samples do not differ: got s.d. {spread} and {anchor_spread}")
    return spread / anchor_spread


@dataclass(frozen=True)
class AnchoredReward:
    """Called as it is, the reward alone: what is judged held out stays what an unanchored run is judged by. Training
    asks for `terms`.

    accumulate: micro-steps of an update; 1 where rollouts are counted. scale: brings the anchor to the reward's
    unit (`matching_scale`); 1 where every term is normalised by itself, as GRPO's advantages are.
    """

    reward: Reward
    anchor: Reward
    config: AnchorConfig
    accumulate: int = 1
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.accumulate < 1 or not self.scale > 0:
            raise ValueError(f"got accumulate {self.accumulate}, scale {self.scale}; expected at least 1, more than 0")

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The reward's own score, without the anchor: (B,)."""
        return self.reward(*args, **kwargs)

    def enable_gradient_checkpointing(self) -> None:
        """Of both."""
        self.reward.enable_gradient_checkpointing()
        self.anchor.enable_gradient_checkpointing()

    def is_anchored(self, micro_step: int) -> bool:
        """Whether this micro-step, from 0, belongs to an anchored update: number every, 2 every, ... from 1."""
        return (micro_step // self.accumulate + 1) % self.config.every == 0


def terms(reward: Reward, micro_step: int) -> Terms:
    """What is climbed in this micro-step, name -> (weight, reward): the "reward", weight 1, and in an anchored update
    of an AnchoredReward the "anchor". A loss takes the sum of weight times score, GRPO that of weight times advantage.
    """
    if not isinstance(reward, AnchoredReward):
        return {"reward": (1.0, reward)}
    found = {"reward": (1.0, reward.reward)}
    if reward.is_anchored(micro_step):
        found["anchor"] = (reward.config.weight * reward.scale, reward.anchor)
    return found
