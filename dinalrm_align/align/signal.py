"""Rollouts without a learning signal: how they are recognised, the warning in the run, and the count in its summary.

A run whose reward gives equal scores to all samples of a prompt, or has no gradient, looks healthy and learns nothing.
Every method therefore reports the metric `signal`, the share of groups, states or samples of a rollout from which the
policy can learn. A method that reuses a rollout for several updates also reports `rollout`, the rollout's number.
A rollout also counts as one without signal if the gradient of each of its updates is exactly zero, for example because
all ratios are clipped.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinalrm_align.train.metrics import read_metrics

ROUNDING = 16 * torch.finfo(torch.float32).eps
"""Scores count as equal up to this difference relative to their size, because rounding in float32 can produce it."""
PATIENCE = 3
"""Number of consecutive rollouts without a signal after which a run warns."""
ZERO_GRADIENT = (
    "the gradient of every update is zero although scores differ. If the metric `clipped` is 1, raise clip_range, or "
    "start from a LoRA nearer to the base model"
)


def has_spread(scores: Tensor) -> Tensor:
    """Return whether the scores (..., K) of each group differ by more than rounding, as (...,) bool."""
    low, high = scores.double().aminmax(dim=-1)
    return high - low > ROUNDING * torch.maximum(low.abs(), high.abs())


def equal_scores(section: str, group_size: int) -> str:
    """Return the reason and advice for methods that compare the samples of a prompt. `section`: name of the method."""
    return (
        f"all {group_size} samples of a prompt have equal scores. Check the reward on samples of these prompts, take a "
        f"reward with finer scores, or raise {section}.group_size"
    )


def silent_rollouts(rows: Sequence[Mapping[str, float]]) -> list[bool]:
    """Return for each rollout in rows of metrics, in order, whether it gave no signal; empty if none is measured."""
    found: dict[float, bool] = {}
    for row in rows:
        if "signal" in row:
            number = row.get("rollout", row["step"])
            found[number] = found.get(number, True) and 0 in (row["signal"], row.get("grad_norm"))
    return list(found.values())


@dataclass
class SignalCheck:
    """Warns once when `PATIENCE` consecutive rollouts gave no learning signal. Call it after every update.

    Args:
        reward: name of the reward.
        reason: why a rollout of this method gives no signal, and what to try.
        metrics: path of metrics.jsonl, which holds the earlier rollouts of a resumed run too.
        say: prints the warning.
        is_main_process: whether to warn. Only the main process has all rows of metrics.jsonl.
    """

    reward: str
    reason: str
    metrics: Path
    say: Callable[[str], object] = print
    is_main_process: bool = True
    warned: bool = False

    def __call__(self, row: Mapping[str, float]) -> None:
        if self.warned or not self.is_main_process or 0 not in (row.get("signal"), row.get("grad_norm")):
            return
        latest = silent_rollouts(read_metrics(self.metrics))[-PATIENCE:]
        if len(latest) == PATIENCE and all(latest):
            self.warned = True
            score = f"reward {self.reward}, mean score {row.get('reward', float('nan')):.6g}"
            self.say(f"\nwarning: the last {PATIENCE} rollouts gave no learning signal ({score}): {self._why(row)}")

    def counts(self) -> dict[str, int]:
        """Return the counts for summary.json; empty if the method has no metric `signal`."""
        silent = silent_rollouts(read_metrics(self.metrics))
        return {"rollouts": len(silent), "rollouts_without_signal": sum(silent)} if silent else {}

    def conclude(self) -> None:
        """Print how many rollouts gave no signal, if any did."""
        rows = read_metrics(self.metrics)
        silent = silent_rollouts(rows)
        line = f"{sum(silent)} of {len(silent)} rollouts gave no learning signal"
        if silent and all(silent):
            line = f"warning: the policy learned nothing from reward {self.reward}: {line}: {self._why(rows[-1])}"
        if any(silent):
            self.say(line)

    def _why(self, row: Mapping[str, float]) -> str:
        return ZERO_GRADIENT if row.get("signal") else self.reason
