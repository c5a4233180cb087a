"""Notices that a run prints before it starts, about settings that are allowed but probably not meant."""

from collections.abc import Sequence

from dinalrm_align.models.specs import ModelSpec
from dinalrm_align.reward.names import reward_sources

MANY_PASSES = 10


def passes_notice(prompts: int, samples: int, updates: int) -> str | None:
    """Return a notice if a run uses its training prompts more than 10 times, else None.

    samples: prompts per rollout, summed over ranks. updates: number of rollouts.
    """
    passes = samples * updates / prompts
    if passes <= MANY_PASSES:
        return None
    return (
        f"prompts: {updates} rollouts of {samples} prompts are {passes:.0f} passes over {prompts} training prompts; "
        "for more prompts, see --prompts in recipes/README.md"
    )


def gold_notice(gold: object, trained: Sequence[str], spec: ModelSpec) -> str | None:
    """Return a notice if the gold reward is, or contains, a reward that the run is trained on, else None."""
    common = reward_sources(gold, spec) & frozenset().union(*(reward_sources(name, spec) for name in trained))
    if not common:
        return None
    return (
        f"warning: gold {gold if isinstance(gold, str) else spec.gold} is also trained on ({', '.join(trained)}): its "
        "rise does not show that images improve, and it detects no reward hacking; name another reward with --gold"
    )
