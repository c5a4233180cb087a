"""Rewards by name: one call loads any of them, sums of them, and Python callables.

    reward = load_reward("dinalrm", pipeline=pipeline)
    reward = load_reward("dinalrm + 0.2*pickscore", pipeline=pipeline)
    score = reward(latents, prompts)            # (B,) float32, higher is better: `LatentReward`'s call

The names, their sources and their licences are in `config.rewards`, with how sums and sources are written.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dinalrm_align.models.specs import MODELS, ModelSpec
from dinalrm_align.reward.callables import LatentFunction, as_reward, import_callable
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.combine import Part, RewardSum
from dinalrm_align.reward.latent import DTYPES, LatentReward
from dinalrm_align.reward.names import REWARDS, RewardEntry, Term, parse_reward
from dinalrm_align.reward.pixel.base import PixelReward

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

JUDGE_SEED = 0
"""Of the noise that a latent reward judges pictures with, the same in every call."""


def load_reward(
    reward: str | Callable[..., Any],
    *,
    spec: ModelSpec | None = None,
    pipeline: "StableDiffusion3Pipeline | None" = None,
    vae: "AutoencoderKL | None" = None,
    transformer: "SD3Transformer2DModel | str | Path | None" = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    local_files_only: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Part | RewardSum:
    """The reward of that name: a frozen module with `LatentReward`'s call and `differentiable`.

    Args:
        reward: as `config.rewards` describes: a name, NAME=SOURCE, a weighted sum, "module:function", a latent reward's
            folder or hub id; or a callable (`functions.as_reward`). A reward of this package is given back as it is.
        spec: the model at hand, which says what dinalrm, pixel and oracle are. Default: SD3.5's dinalrm, and the
            embedded world's pixel and oracle.
        pipeline: to borrow the VAE, text encoders and (by default) the transformer from.
        vae: the decoder for rewards over pictures; default: the pipeline's. Without one they can score pictures alone.
        transformer: for dinalrm to share weights with, as in `LatentReward.from_pretrained`.
        device: default: the transformer's for dinalrm, the VAE's for rewards over pictures, else the CPU.
        dtype: of the rewards' weights; default: each one's own.
        local_files_only: never ask the hub.
        options: further arguments of a part's `from_pretrained`, by its name: {"pickscore": {"processor": folder}}.

    Raises ValueError for an unknown name (with the known ones) and a sum that is not written as one, ImportError naming
    what to install, and what loading raises.
    """
    vae = pipeline.vae if vae is None and pipeline is not None else vae
    if not isinstance(reward, str):
        known = isinstance(reward, LatentReward | PixelReward | RewardSum | LatentFunction)
        return reward if known else as_reward(reward, vae=vae)
    terms = parse_reward(reward)
    options = dict(options or {})
    strangers = options.keys() - {term.name for term in terms}
    if strangers:
        raise ValueError(f"options: got some for {sorted(strangers)}; expected the names of parts of {reward!r}")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; known: {', '.join(DTYPES)}")
    place = dict(device=device, dtype=DTYPES.get(dtype, dtype), local_files_only=local_files_only)
    parts: dict[str, Part] = {}
    for term in terms:
        own = options.get(term.name, {})
        if term.name == "dinalrm":
            source = term.source or (spec or MODELS["sd35"]).reward
            shared = dict(transformer=transformer, pipeline=pipeline)
            parts[term.label] = LatentReward.from_pretrained(source, **{**shared, **place, **own})
        elif term.name == "oracle":
            parts[term.label] = _oracle(spec or MODELS["shapes"], vae)
        elif ":" in term.name:
            parts[term.label] = as_reward(import_callable(term.name), vae=vae, name=term.name)
        else:
            parts[term.label] = _load_pixel(term, spec or MODELS["shapes"], vae, {**place, **own})
    if len(terms) == 1 and terms[0].weight == 1:
        return parts[terms[0].label]
    return RewardSum(parts, {term.label: term.weight for term in terms})


def load_judge(
    gold: str | Callable[..., Any],
    *,
    spec: ModelSpec | None = None,
    pipeline: "StableDiffusion3Pipeline | None" = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """A held-out judge `(images (B, 3, H, W) in [0, 1], prompts) -> (B,) float32`, without gradient.

    gold: as `load_reward`'s `reward`; but a plain callable is taken for a judge as it is. pipeline: for dinalrm, to
    encode pictures with; a latent reward judges with the same noise in every call. settings: of `load_reward`. Raises
    as `load_reward`, and ValueError for a reward that reads latents alone.
    """
    if not isinstance(gold, str | nn.Module):
        return gold
    return as_judge(load_reward(gold, spec=spec, pipeline=pipeline, device=device, **settings))


def as_judge(reward: Part | RewardSum) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """The reward's `score_images`, with the same noise in every call where there is any."""
    if isinstance(reward, LatentFunction):
        raise ValueError(f"{reward.name} reads latents and cannot judge pictures; name a reward that reads images")
    if isinstance(reward, PixelReward):
        return reward.score_images

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return reward.score_images(images, prompts, generator=torch.Generator().manual_seed(JUDGE_SEED))

    return judge


def latent_rewards(reward: Part | RewardSum) -> list[LatentReward]:
    """Those of its parts that read latents: the ones whose `encoder` a recipe may fill before text encoders go."""
    parts = reward.parts if isinstance(reward, RewardSum) else [reward]
    return [part for part in parts if isinstance(part, LatentReward)]


def pixel_rewards(reward: Part | RewardSum) -> list[PixelReward]:
    """Those of its parts that decode latents."""
    parts = reward.parts if isinstance(reward, RewardSum) else [reward]
    return [part for part in parts if isinstance(part, PixelReward)]


def text_lengths(reward: str, spec: ModelSpec, *, local_files_only: bool = False) -> set[int]:
    """The text lengths that its latent rewards were trained with, from their checkpoints; no weights are read."""
    sources = [term.source or spec.reward for term in parse_reward(reward) if term.name == "dinalrm"]
    checkpoints = [read_checkpoint(source, local_files_only=local_files_only) for source in sources]
    return {checkpoint.config.text_length for checkpoint in checkpoints}


def score_parts(reward: Part | RewardSum, latents: Tensor, **arguments: Any) -> dict[str, Tensor]:
    """Every part's unweighted score (B,) by name; a reward that is no sum has one part, "reward"."""
    if isinstance(reward, RewardSum):
        return reward.score_parts(latents, **arguments)
    return {"reward": reward(latents, **arguments)}


def part_weights(reward: Part | RewardSum) -> dict[str, float]:
    """The weights that go with `score_parts`."""
    return dict(reward.weights) if isinstance(reward, RewardSum) else {"reward": 1.0}


def _oracle(spec: ModelSpec, vae: "AutoencoderKL | None") -> Part:
    """The embedded world's gold score, which is computed from pixels by rules and has no gradient."""
    gold = import_callable(spec.gold) if isinstance(spec.gold, str) and ":" in spec.gold else spec.gold
    if not callable(gold):
        raise ValueError(
            f"reward oracle: the oracle judges pictures of the embedded world, and {spec.name} has none; take another, "
            "such as pickscore"
        )
    return as_reward(gold, vae=vae, name="oracle", differentiable=False)


def _load_pixel(term: Term, spec: ModelSpec, vae: "AutoencoderKL | None", settings: Mapping[str, Any]) -> PixelReward:
    """A part that reads pictures, from its own class; settings: arguments of `from_pretrained`, over the table's."""
    defaults: dict[str, Any] = {"vae": vae}
    if settings["device"] is None and vae is not None:
        defaults["device"] = vae.device
    given = {name: value for name, value in settings.items() if value is not None or name != "device"}
    if term.name == "pixel":
        from dinalrm_align.reward.pixel.clip import ClipReward

        if term.source is None:
            defaults["processor"] = spec.pixel_processor
        return ClipReward.from_pretrained(term.source or spec.pixel, **{**defaults, **given})
    entry = REWARDS[term.name]
    source = term.source or entry.source
    if source is None:
        raise ValueError(f"reward {term.name} has no weights on the hub; say where they are: {entry.how}")
    defaults |= entry.options
    if "processor" in defaults and (Path(source) / "preprocessor_config.json").is_file():
        defaults["processor"] = str(source)  # what lies beside the weights goes with them
    if entry.served:
        given.pop("local_files_only")
    return _class(term.name, entry).from_pretrained(source, **{**defaults, **given})


def _class(name: str, entry: RewardEntry) -> type[PixelReward]:
    """The class behind a name; ImportError naming what to install."""
    module, _, kind = entry.kind.partition(":")
    try:
        return getattr(importlib.import_module(module), kind)
    except ModuleNotFoundError as error:
        install = f"'dinalrm-align[{entry.extra}]'" if entry.extra else error.name
        raise ImportError(
            f"reward {name} needs the package {error.name}, which is not installed: pip install {install}",
            name=error.name,
        ) from error
