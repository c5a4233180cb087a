"""What every adapter needs: one copy of each reward per process, and scores of what a framework hands over.

Frameworks create a scorer several times, for training and evaluation or per worker thread. All scorers of a process
share one copy of the weights.
"""

import functools
import importlib
import logging
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.combine import RewardSum
from dinalrm_align.reward.names import parse_reward
from dinalrm_align.reward.protocol import Reward, RewardModule, Text
from dinalrm_align.reward.registry import load_reward

LOG = logging.getLogger(__name__)
_LOCK = threading.Lock()
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
    return RewardSum(parts, {term.label: term.weight for term in terms})


def framework(module: str, install: str) -> ModuleType:
    """Import a module of another project. Raises ImportError with the command `install` if the project is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this adapter needs {module.split('.')[0]}, and {error.name} is not installed: {install}", name=error.name
        ) from error


def finite_floats(scores: Tensor) -> list[float]:
    """Return scores (B,) as Python floats. They are finite: a reward raises otherwise."""
    return scores.detach().float().cpu().tolist()


def text_for(reward: Reward, prompts: Sequence[str], prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Text:
    """Return what the reward should read: the framework's embeddings if their length is the reward's, else `prompts`.

    prompt_embeds (B, L, D), pooled_prompt_embeds (B, P). Another length changes scores, so the reward then encodes the
    strings with its own text encoders. The log says so once.
    """
    lengths = {part.encoder.clip_tokens + part.config.text_length for part in reward.noise_parts}
    tokens = prompt_embeds.shape[1]
    if lengths == {tokens}:
        return Conditions(prompts, prompt_embeds, pooled_prompt_embeds, *reward.text_lengths)
    if lengths:
        log_once(f"prompt_embeds have {tokens} tokens, {reward.name} reads {sorted(lengths)}: it encodes the prompts")
    return prompts


@functools.cache
def log_once(message: str) -> None:
    LOG.warning(message)


def plain(value: Any) -> Any:
    """Return mappings and sequences of a configuration, as OmegaConf's, as dicts and lists."""
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
