"""Settings of a light anchor to a second reward (`align.anchor`). Torch-free."""

from dataclasses import dataclass

from dinalrm_align.train.settings import check_fields


@dataclass
class AnchorConfig:
    """A second reward, of another kind, mixed in at every n-th update: what fools the one seldom fools the other.

    Args:
        reward: name of the second reward; none given, there is no anchor.
        every: updates (of GRPO, rollouts) between two that are anchored; 1 anchors all.
        weight: of the anchor beside the reward. Both are brought to one scale first, so that 1 means as much say.
    """

    reward: str | None = None
    every: int = 4
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "anchor")
        if self.every < 1 or self.weight <= 0:
            raise ValueError(
                f"anchor: got every {self.every}, weight {self.weight}; expected at least 1 and more than 0 (for no "
                "anchor leave out anchor.reward)"
            )
