"""What every adapter needs: one copy of each reward per process, and scores of what a framework hands over.

Frameworks create a scorer several times, for training and evaluation or per worker thread. All scorers of a process
share one copy of the weights.
"""

import importlib
import threading
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch

from dinalrm_align.reward.combine import sum_of
from dinalrm_align.reward.names import parse_reward
from dinalrm_align.reward.protocol import RewardModule
from dinalrm_align.reward.registry import load_reward

_LOCK = threading.Lock()
SCORING = threading.Lock()
"""Held while a reward scores: tokenizers and caches of image rewards are not thread-safe."""
_REWARDS: dict[tuple[str, ...], RewardModule] = {}


def shared_reward(reward: str, *, options: Mapping[str, Mapping[str, Any]] | None = None, **place: Any) -> RewardModule:
    """Load a reward by name, or return the one that this process has loaded with equal arguments.

    Each part of a sum is loaded once, so "dinalrm" and "dinalrm + 0.2*pickscore" share the copy of dinalrm. Pass
    sigma and seeds with each call; a sigma in `options` makes a copy of its own.

    Args:
        reward: a name or a weighted sum, as in `load_reward`.
        options: extra arguments by reward name, as in `load_reward`.
        place: `pipeline` (hub id or folder), `device`, `dtype` and `local_files_only`, as in `load_reward`.

    Threads may call this function at once. Raises the errors of `load_reward`.
    """
    terms = parse_reward(reward)
    options = dict(options or {})
    if unknown := options.keys() - {term.name for term in terms}:
        raise ValueError(f"options: got {sorted(unknown)}; expected names of parts of {reward!r}")
    parts = {}
    with _LOCK:
        for term in terms:
            own = {term.name: options[term.name]} if term.name in options else {}
            key = (term.label, repr(sorted(own.items())), repr(sorted(place.items(), key=lambda item: item[0])))
            if key not in _REWARDS:
                _REWARDS[key] = load_reward(term.label, options=own, **place)
            parts[term.label] = _REWARDS[key]
    if len(terms) == 1 and terms[0].weight == 1:
        return parts[terms[0].label]
    return sum_of(parts, {term.label: term.weight for term in terms})


def pointwise(reward: RewardModule) -> RewardModule:
    """Return the reward. Raises ValueError if it must score all samples of a prompt in one call."""
    if reward.wants_groups:
        got = f"{reward.name!r} compares all samples of a prompt in one call, and this framework passes a part of them"
        raise ValueError(f"reward: got {got}; expected one that scores each sample by itself")
    return reward


def framework(module: str, install: str) -> ModuleType:
    """Import a module of another project. Raises ImportError with the command `install` if the project is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this adapter needs {module.split('.')[0]}, and {error.name} is not installed: {install}", name=error.name
        ) from error


def finite_floats(scores: torch.Tensor) -> list[float]:
    """Return scores (B,) as Python floats. They are finite: a reward raises otherwise."""
    return scores.detach().float().cpu().tolist()
