"""Load rewards by name: single rewards, weighted sums and Python callables.

    reward = load_reward("dinalrm", pipeline=pipeline)
    reward = load_reward("dinalrm + 0.2*pickscore", pipeline=pipeline)
    score = reward(latents, prompts)            # (B,) float32, higher is better

The module `reward.names` lists the names, sources and licences, and defines the syntax of sums.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dinalrm_align.models.pipeline import load_vae
from dinalrm_align.models.specs import MODELS, ModelSpec
from dinalrm_align.models.weights import loading
from dinalrm_align.reward.callables import as_reward, call_with_parts, import_callable
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.combine import RewardSum
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.loading import DTYPES
from dinalrm_align.reward.names import REWARDS, RewardEntry, Term, companion_of, parse_reward, source_of
from dinalrm_align.reward.origin import Origin, absolute
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.protocol import Parted, RewardModule, finite_scores
from dinalrm_align.reward.remote import RemoteReward
from dinalrm_align.train.digest import text_digest

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline

EVALUATION_SEED = 0
"""Seed of the noise in `load_image_scorer`, the same for every call."""


_COPIES: ContextVar[dict[Any, RewardModule] | None] = ContextVar("copies", default=None)


@contextmanager
def sharing(copies: dict[Any, RewardModule]) -> Iterator[None]:
    """Context manager in which image rewards that are loaded with equal arguments are one object, kept in `copies`.

    A shared reward decodes with the VAE of the last call that passed one.
    """
    token = _COPIES.set(copies)
    try:
        yield
    finally:
        _COPIES.reset(token)


@dataclass(frozen=True)
class ImageScorer:
    """Maps images (B, 3, H, W) in [0, 1] and B prompts to scores (B,), float32, without gradient.

    with_parts: returns the scores and their parts, as `Reward.score_image_parts`.
    fingerprint: digest of the reward's weights; of its name if it has none.
    """

    with_parts: Callable[[Tensor, Sequence[str]], Parted]
    fingerprint: str

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.with_parts(images, prompts)[0]


@loading()
def load_reward(
    reward: str | Callable[..., Any],
    *,
    spec: ModelSpec | None = None,
    pipeline: "StableDiffusion3Pipeline | str | Path | None" = None,
    vae: "AutoencoderKL | None" = None,
    transformer: "SD3Transformer2DModel | str | Path | None" = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    local_files_only: bool = False,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> RewardModule:
    """Load a reward by name. The result is a frozen module that implements `protocol.Reward`.

    Args:
        reward: a name, NAME=SOURCE, a weighted sum, "module:function", or a latent reward's folder or hub id (see
            `reward.names`); or a callable (see `callables.as_reward`). A reward of this package is returned unchanged.
        spec: base model that the rewards `dinalrm`, `pixel` and `oracle` belong to. Default: SD3.5 for `dinalrm`; the
            small model of synthetic shapes for `pixel` and `oracle`.
        pipeline: provides the VAE, text encoders and (by default) the transformer; also its folder or hub id.
        vae: decodes latents for image rewards; default: the pipeline's. Without a VAE, image rewards score images only.
        transformer: transformer of a latent reward, see `LatentReward.from_pretrained`.
        device: device of the reward. Default: the transformer's for `dinalrm`, the VAE's for image rewards, else CPU.
        dtype: dtype of the weights; default: each reward's own.
        options: extra arguments of `from_pretrained` by reward name, such as {"pickscore": {"processor": folder}} or
            {"dinalrm": {"sigma": 0.3}}.
        functions: callables and rewards by the name, of the form "module:function", that stands for them in `reward`;
            nothing is imported for such a name.

    Raises ValueError for an unknown name or an invalid sum, ImportError if a required package is missing, and any
    error from loading the weights.
    """
    terms = parse_reward(reward) if isinstance(reward, str) else ()
    if isinstance(pipeline, str | Path):
        if vae is None and not {term.name for term in terms} <= {"dinalrm", "remote"}:
            vae = load_vae(pipeline, device=device or "cpu", local_files_only=local_files_only)
    elif vae is None and pipeline is not None:
        vae = pipeline.vae
    if not isinstance(reward, str):
        return _wrapped(reward, vae=vae)
    options = dict(options or {})
    if unknown := options.keys() - {term.name for term in terms}:
        raise ValueError(f"options: got {sorted(unknown)}; expected names of parts of {reward!r}")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    place = dict(device=device, dtype=DTYPES.get(dtype, dtype), local_files_only=local_files_only)
    parts: dict[str, RewardModule] = {}
    for term in terms:
        own = dict(options.get(term.name, {}))
        if "dtype" in own:
            own["dtype"] = DTYPES.get(own["dtype"], own["dtype"])
        if term.name == "dinalrm":
            source = term.source or (spec or MODELS["sd35"]).reward
            shared = dict(transformer=transformer, pipeline=pipeline)
            parts[term.label] = LatentReward.from_pretrained(source, **{**shared, **place, **own})
        elif term.name == "remote":
            parts[term.label] = RemoteReward.from_pretrained(term.source, **own)
        elif term.name in (functions or {}):
            parts[term.label] = _wrapped(functions[term.name], vae=vae, name=term.name)
        else:
            arguments = dict(name=term.name, spec=spec or MODELS["shapes"], vae=vae, settings={**place, **own})
            parts[term.label] = _load_term(absolute(term.source), **arguments)
    if len(terms) == 1 and terms[0].weight == 1:
        return parts[terms[0].label]
    return RewardSum(parts, {term.label: term.weight for term in terms})


def load_image_scorer(reward: str | Callable[..., Any], **settings: Any) -> ImageScorer:
    """Load a reward as a function of images and prompts, for evaluation without gradient.

    Every call uses the same noise. reward, settings: as in `load_reward`; a callable is called with (images, prompts).
    Raises the errors of `load_reward`, and ValueError if the reward cannot score images. The returned function raises
    ValueError if a score is not finite.
    """
    if not isinstance(reward, str | nn.Module):
        name = repr(reward)[:60]

        def score_finite(images: Tensor, prompts: Sequence[str]) -> Parted:
            scores, parts = call_with_parts(reward, images, prompts, name)
            return finite_scores(scores, len(images), name), parts

        return ImageScorer(score_finite, text_digest(name.split(" at 0x")[0]))  # the address differs between processes
    loaded = load_reward(reward, **settings)
    if not loaded.scores_images:
        raise ValueError(f"reward {loaded.name!r} reads latents and cannot score images; name one that reads images")

    def score(images: Tensor, prompts: Sequence[str]) -> Parted:
        return loaded.score_image_parts(images, prompts, generator=torch.Generator().manual_seed(EVALUATION_SEED))

    return ImageScorer(score, loaded.fingerprint())


def check_code(reward: str | Callable[..., Any], spec: ModelSpec, functions: Iterable[str] = ()) -> None:
    """Raise the error of `load_reward` for a callable, package or world that is not there. Loads no weights.

    functions: names in `reward` that stand for objects.
    """
    for term in parse_reward(reward) if isinstance(reward, str) else ():
        entry = REWARDS.get(term.name)
        if term.name == "oracle":
            _oracle(spec, None)
        elif entry is None and term.name not in functions:
            as_reward(import_callable(term.name), name=term.name)
        elif entry and entry.kind:
            _class(term.name, entry)


def text_lengths(reward: str, spec: ModelSpec, *, local_files_only: bool = False) -> set[int]:
    """Return the T5 sequence lengths that the `dinalrm` rewards in `reward` need, read from their checkpoints."""
    sources = [term.source or spec.reward for term in parse_reward(reward) if term.name == "dinalrm"]
    checkpoints = [read_checkpoint(source, local_files_only=local_files_only) for source in sources]
    return {checkpoint.config.text_length for checkpoint in checkpoints}


def _wrapped(
    function: Callable[..., Any],
    *,
    vae: "AutoencoderKL | None",
    name: str | None = None,
    device: torch.device | str | None = None,
) -> RewardModule:
    """Return `as_reward(function, vae=vae, name=name)`. device: ignored; a callable runs where its inputs are."""
    reward = as_reward(function, vae=vae, name=name)
    if reward is not function:
        reward.loaded_by(Origin(_wrapped, function, {"vae": vae, "name": name}))
    return reward


def _load_term(
    source: str | None,
    *,
    name: str,
    spec: ModelSpec,
    vae: "AutoencoderKL | None",
    settings: Mapping[str, Any],
    device: torch.device | str | None = None,
) -> RewardModule:
    """Load a reward other than a latent reward. device: replaces the device in `settings`."""
    if name == "oracle":
        reward = _oracle(spec, vae)
    elif ":" in name:
        reward = as_reward(import_callable(name), vae=vae, name=name)
    else:
        settings = settings if device is None else {**settings, "device": device}
        reward = _load_pixel(Term(name, source=source), spec, vae, settings)
    reward.loaded_by(Origin(_load_term, source, dict(name=name, spec=spec, vae=vae, settings=settings)))
    return reward


def _oracle(spec: ModelSpec, vae: "AutoencoderKL | None") -> RewardModule:
    """Return the ground-truth reward of the synthetic shapes: rules on pixels, not differentiable."""
    gold = import_callable(spec.gold) if isinstance(spec.gold, str) and ":" in spec.gold else spec.gold
    if not callable(gold):
        raise ValueError(
            f"reward oracle: got model {spec.name}; the oracle scores images of the embedded world only: take another "
            "reward, such as pickscore"
        )
    return as_reward(gold, vae=vae, name="oracle", differentiable=False)


def _load_pixel(term: Term, spec: ModelSpec, vae: "AutoencoderKL | None", settings: Mapping[str, Any]) -> PixelReward:
    """Load an image reward. settings: arguments of `from_pretrained`, which override the defaults in `REWARDS`."""
    defaults: dict[str, Any] = {"vae": vae}
    if settings["device"] is None and vae is not None:
        defaults["device"] = vae.device
    given = {name: value for name, value in settings.items() if value is not None or name != "device"}
    if term.name == "pixel":
        from dinalrm_align.reward.pixel.clip import ClipReward

        defaults["processor"] = companion_of(term, spec)
        return _one_copy(ClipReward, source_of(term, spec), **{**defaults, **given})
    entry = REWARDS[term.name]
    source = source_of(term, spec)
    if source is None:
        raise ValueError(f"reward {term.name}: its weights are not on the hub; pass {entry.how}")
    defaults |= entry.options
    if entry.companion:
        defaults[entry.companion.argument] = companion_of(term, spec)
    if entry.served:
        given.pop("local_files_only")
    return _one_copy(_class(term.name, entry), source, **{**defaults, **given})


def _one_copy(kind: type[PixelReward], source: str, *, vae: "AutoencoderKL | None", **arguments: Any) -> PixelReward:
    """Return `kind.from_pretrained(source, ...)`, or within `sharing` the reward that an equal call has loaded."""
    copies = _COPIES.get()
    given = {name: value for name, value in arguments.items() if value not in (None, source)}
    key = (kind, absolute(source), repr(sorted(given.items())))
    if copies is None or key not in copies:
        reward = kind.from_pretrained(source, vae=vae, **arguments)
        if copies is None:
            return reward
        copies[key] = reward
    elif vae is not None:
        copies[key].borrow(vae)
    return copies[key]


def _class(name: str, entry: RewardEntry) -> type[PixelReward]:
    """Import the class `entry.kind`. Raises ImportError if the class needs a package that is not installed."""
    module, _, kind = entry.kind.partition(":")
    try:
        return getattr(importlib.import_module(module), kind)
    except ModuleNotFoundError as error:
        install = f"'dinalrm-align[{entry.extra}]'" if entry.extra else error.name
        raise ImportError(
            f"reward {name} needs the package {error.name}, which is not installed: pip install {install}",
            name=error.name,
        ) from error
