"""What identifies an alignment run, besides its settings: digests of models and prompts. A resume needs equal ones."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from dinalrm_align.align.resolve import Resolved
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.digest import fingerprint, text_digest


def prompts_identity(prompts: Sequence[str], samples: Sequence[str]) -> dict[str, str]:
    """Return digests of the training prompts and of the held-out prompts, the part of `Setup.identity` without models.

    A checkpoint with other prompts is refused before models are loaded.
    """
    return {"list of prompts": text_digest("\n".join(prompts)), "evaluation prompts": text_digest("\n".join(samples))}


def run_identity(resolved: Resolved[Any], base: nn.Module, rewards: Sequence[Reward]) -> dict[str, str]:
    """Return the training's part of `Setup.identity`. base: the transformer. rewards: the reward, then the anchor."""
    run, (reward, *second) = resolved.run, rewards
    return {
        "recipe": resolved.recipe,
        "seed": str(run.seed),
        "base model": fingerprint(base),
        "reward": reward.fingerprint(),
        **({"quantised base": run.memory.base_quant} if run.memory.base_quant != "none" else {}),
        **({"anchor": f"{second[0].fingerprint()} {run.anchor.every} {run.anchor.weight}"} if second else {}),
    }
