"""Look for all that a run needs, and load its gold rewards, which score held-out images and are not trained on."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dinalrm_align.align.resolve import Resolved
from dinalrm_align.reward.names import gold_rewards, parse_reward
from dinalrm_align.reward.needs import check_sources, lora_need
from dinalrm_align.reward.registry import ImageScorer, check_code, load_image_scorer


def check_run(resolved: Resolved[Any]) -> None:
    """Raise FileNotFoundError that names all missing files of a run (`reward.needs`), and as `registry.check_code`."""
    run, spec, given = resolved.run, resolved.spec, resolved.given
    rewards = {"reward": run.reward, "anchor.reward": run.anchor and run.anchor.reward}
    rewards |= gold_rewards(run.gold, spec.gold)
    start = run.policy.init_from if resolved.checkpoint is None else None  # a checkpoint has the weights
    others = [lora_need(start)] if start else []
    place = dict(parts=None if given.pipeline else (), options=run.hpsv3.options(), functions=given.functions)
    check_sources(spec, rewards, others=others, **place)
    for reward in rewards.values():
        check_code(reward, spec, given.functions)


def load_gold(
    resolved: Resolved[Any], samples: Sequence[str], device: torch.device, say: Callable[[str], None]
) -> dict[str, ImageScorer]:
    """Load the gold rewards. Score two black images once, to fail early if one refuses the image size or the prompts.

    The two prompts are the first and the longest of `samples`.
    """
    run, spec, gold = resolved.run, resolved.spec, dict[str, ImageScorer]()
    (height, width), prompts = resolved.image_size, [samples[0], max(samples, key=len)]
    for name, reward in gold_rewards(run.gold, spec.gold).items():
        gold[name] = load_scorer(resolved, reward, device)
        say(f"{name}: loaded; it scores two black images of {height} x {width} pixels, as a check")
        gold[name](torch.zeros(2, 3, height, width), prompts)
    return gold


def load_scorer(resolved: Resolved[Any], reward: str | Callable[..., Any], device: torch.device) -> ImageScorer:
    """Load a reward that scores images, with the options in the run's settings."""
    spec, options, terms = resolved.spec, {}, ()
    if isinstance(reward, str):
        options, terms = resolved.run.reward_options(reward), parse_reward(reward)
    if any(term.name == "dinalrm" and term.source is None for term in terms):
        options["dinalrm"] = {"pipeline": spec.pipeline}  # which may be a folder, where the config has a hub id
    return load_image_scorer(reward, spec=spec, device=device, options=options)
