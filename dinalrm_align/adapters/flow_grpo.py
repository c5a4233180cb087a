"""Rewards in flow_grpo (https://github.com/yifan123/flow_grpo, ac4c86e) and NVlabs/DiffusionNFT (24af555).

Two lines before their script, in a file that ends with `runpy.run_path("scripts/train_sd3.py", run_name="__main__")`:

    import dinalrm_align.adapters.flow_grpo as plug
    plug.install(latents=True, pipeline="stabilityai/stable-diffusion-3.5-medium")

and `config.reward_fn = {"dinalrm": 1.0, "pickscore": 0.2}`. Names that `install` does not list are their own rewards;
install({"dinalrm": "dinalrm + 0.2*pickscore"}) takes pickscore from this package.

- **What is scored.** Images (B, 3, H, W) in [0, 1]. With `latents=True`: the last latents of their SD3 sampler, with
  its embeddings if they have the reward's length (theirs: 128 T5 tokens). Their sampler decodes all the same, for its
  logs. The fast and FLUX variants return no clean SD3 latents: leave `latents` False.
- **Memory.** Training and evaluation share one copy. Eight threads may score. No gradient.
- **Failures** end the run, in their loop's call of `result()`.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dinalrm_align.adapters.batches import score_batch
from dinalrm_align.adapters.shared import finite_floats, framework, pointwise, shared_reward

_CLONE = "clone https://github.com/yifan123/flow_grpo or NVlabs/DiffusionNFT and put it on PYTHONPATH"
_SAMPLERS = ("sd3_pipeline_with_logprob", "pipeline_with_logprob")
"""Modules of flow_grpo.diffusers_patch with the SD3 sampler: flow_grpo's and DiffusionNFT's."""


def install(
    rewards: Mapping[str, str] | None = None, *, latents: bool = False, sigma: float | None = None, **place: Any
) -> None:
    """Make `flow_grpo.rewards.multi_score` know rewards of this package. Call it once, before their script.

    Args:
        rewards: name in `config.reward_fn` -> text of `load_reward`; default: {"dinalrm": "dinalrm"}.
        latents: whether latent rewards read the sampler's latents. False: they encode the images.
        sigma: noise level; default: the checkpoint's level for latents, also for images.
        place: `pipeline`, `dtype`, `options` and `local_files_only`, as in `load_reward`.

    Raises ImportError without flow_grpo, or, with `latents`, without one of the two SD3 samplers.
    """
    module, texts = framework("flow_grpo.rewards", _CLONE), dict(rewards or {"dinalrm": "dinalrm"})
    theirs = module.multi_score
    if latents:
        _keep_latents()

    def multi_score(device: Any, score_dict: Mapping[str, float]) -> Callable[..., Any]:
        own = {name: shared_reward(texts[name], device=device, **place) for name in score_dict if name in texts}
        others = {name: weight for name, weight in score_dict.items() if name not in texts}
        score_others = theirs(device, others) if others else None
        for reward in own.values():
            pointwise(reward)

        def score(images: Any, prompts: Sequence[str], *metadata: Any, **named: Any) -> tuple[dict[str, Any], dict]:
            kept = getattr(images, "dinalrm", None) if latents else {"latents": None}
            if kept is None:
                raise ValueError("images: got no latents with them; install before the script imports its sampler")
            details, more = score_others(images, prompts, *metadata, **named) if score_others else ({}, {})
            total = details.get("avg", [0.0] * len(prompts))
            for name, reward in own.items():
                details[name] = finite_floats(score_batch(reward, prompts, images=images, sigma=sigma, **kept))
                total = [old + score_dict[name] * new for old, new in zip(total, details[name], strict=True)]
            return {**details, "avg": total}, more

        return score

    module.multi_score = multi_score


def _keep_latents() -> None:
    """Make their SD3 sampler attach its last latents and its prompt embeddings to the images that it returns."""
    for name in _SAMPLERS:
        try:
            module = importlib.import_module(f"flow_grpo.diffusers_patch.{name}")
            break
        except ModuleNotFoundError as error:
            if not (error.name or "").endswith(f"diffusers_patch.{name}"):
                raise
    else:
        raise ImportError(f"flow_grpo.diffusers_patch: got none of {_SAMPLERS}; install(latents=False) scores images")
    sample = module.pipeline_with_logprob

    @functools.wraps(sample)
    def pipeline_with_logprob(*arguments: Any, **named: Any) -> Any:
        images, steps, *rest = sample(*arguments, **named)
        embeds = named.get("prompt_embeds"), named.get("pooled_prompt_embeds")
        images.dinalrm = {"latents": steps[-1], "embeds": None if None in embeds else embeds}
        return images, steps, *rest

    module.pipeline_with_logprob = pipeline_with_logprob
