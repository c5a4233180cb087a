"""Wrap any Python callable as a reward. The name of the callable's first argument selects what the callable scores:

    def my_reward(images, prompts): ...                     decoded images (B, 3, H, W) in [0, 1] -> scores (B,)
    def my_reward(latents, prompts, sigma, noise): ...      scaled clean latents (B, C, h, w) -> scores (B,)

Higher scores are better. A callable over images may also take `parts`: a dict, which it fills with what its scores
consist of, name -> (B,). A component of the part "a" has the name "a/b". Evaluations report them. A callable over
latents may also take `prompt_embeds`, `pooled_prompt_embeds` and `generator`. A callable receives only the arguments in
its signature.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dinalrm_align.models.text import Conditions, prompts_of
from dinalrm_align.reward.inputs import as_batch
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.reward.protocol import Latents, Noise, Parted, RewardModule, Text, finite_scores, scoring
from dinalrm_align.train.settings import did_you_mean

IMAGES = ("images", "pixels")
"""Names of a first argument that mark a callable over images."""
ARGUMENTS = ("prompts", "prompt_embeds", "pooled_prompt_embeds", "sigma", "noise", "generator", "seeds")
"""Arguments besides `latents` that a callable over latents may name. They are passed by keyword."""


def import_callable(path: str) -> Callable[..., Any]:
    """Import and return the callable at `path`, a string of the form "module:function".

    Raises ImportError if the module, or a package that the module needs, is not installed. Raises ValueError if the
    module has no object called `function`, and TypeError if the object is a class or is not callable.
    """
    module_name, _, name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            how = f"there is no module {error.name!r}; install it, or run with PYTHONPATH set to the folder it lies in"
        else:
            how = f"{module_name} needs the package {error.name!r}, which is not installed"
        raise ImportError(f"reward {path!r}: {how}", name=error.name) from error
    for part in name.split("."):
        if part not in dir(found):
            public = [known for known in dir(found) if not known.startswith("_")]
            raise ValueError(f"reward {path!r}: {module_name} has no {part!r}{did_you_mean(part, public)}")
        found = getattr(found, part)
    return _check_callable(found, path)


def call_with_parts(function: Callable[..., Any], images: Tensor, prompts: Sequence[str], name: str) -> Parted:
    """Return `function(images, prompts)`, unchecked, and the parts that it tells, checked by `finite_scores`."""
    parts: dict[str, Tensor] = {}
    scores = function(images, list(prompts), **({"parts": parts} if "parts" in _arguments(function, name) else {}))
    return scores, {part: finite_scores(values, len(images), f"{name}: {part}") for part, values in parts.items()}


def as_reward(
    function: Callable[..., Any],
    *,
    vae: AutoencoderKL | None = None,
    name: str | None = None,
    differentiable: bool = True,
) -> RewardModule:
    """Return a reward that calls `function`. A `RewardModule` is returned as is. Other nn.Modules are frozen in place.

    Args:
        function: callable over images or latents (see the docstring of `reward.callables`). For an nn.Module, the
            arguments of `forward` are inspected.
        vae: VAE that decodes latents if `function` takes images.
        name: name of the reward in error messages.
        differentiable: whether the scores are differentiable in the input. False: every input that requires a gradient
            raises ValueError. True: if an input requires a gradient but the scores have no graph, ValueError is raised.

    Raises TypeError unless the first argument of `function` is named `latents`, `images` or `pixels`.
    """
    if isinstance(function, RewardModule):
        return function
    name = name or f"{type(function).__name__}" * isinstance(function, nn.Module) or repr(function)[:60]
    named = _arguments(_check_callable(function, name), name)
    if named and named[0] in IMAGES:
        return ImageFunction(function, vae, name, differentiable)
    if named and named[0] == "latents":
        return LatentFunction(function, [argument for argument in ARGUMENTS if argument in named], name, differentiable)
    raise TypeError(
        f"reward {name!r}: got the arguments ({', '.join(named)}); expected the first to be named images (decoded, "
        "(B, 3, H, W) in [0, 1]) or latents"
    )


class ImageFunction(PixelReward):
    """Reward that decodes latents and returns `function(images, prompts)`, with images (B, 3, H, W) in [0, 1]."""

    def __init__(
        self, function: Callable[..., Any], vae: AutoencoderKL | None, name: str, differentiable: bool = True
    ) -> None:
        super().__init__(vae)
        self.function = _frozen(function)
        self.name = name
        self.differentiable = differentiable

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return _checked(self.function(images, list(prompts)), images, self.name)

    def score_pixel_parts(self, images: Tensor, prompts: Sequence[str]) -> Parted:
        scores, parts = call_with_parts(self.function, images, prompts, self.name)
        return _checked(scores, images, self.name), parts


class LatentFunction(RewardModule):
    """Reward that returns `function(latents, ...)`, with scaled latents (B, C, h, w) that are not decoded."""

    scores_images = False

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[str], name: str, differentiable: bool = True
    ) -> None:
        """Wrap `function`. arguments: names of the arguments to pass by keyword, a subset of `ARGUMENTS`."""
        super().__init__()
        self.function = _frozen(function)
        self.arguments = tuple(arguments)
        self.reads_noise = bool({*Noise.__annotations__} & {*arguments})
        self.name = name
        self.differentiable = differentiable

    @scoring
    def forward(self, latents: Latents, prompts: Text | None = None, **noise: Unpack[Noise]) -> Tensor:
        """Return scores (B,), float32. If `prompts` are strings, `function` receives None as prompt embeddings."""
        self.check_onloaded()
        latents = as_batch("latents", latents, self.device)
        self.check_gradient(latents)
        encoded = prompts if isinstance(prompts, Conditions) else None
        given = {
            "prompts": prompts_of(prompts, len(latents)) if "prompts" in self.arguments else None,
            "prompt_embeds": encoded and encoded.prompt_embeds,
            "pooled_prompt_embeds": encoded and encoded.pooled_prompt_embeds,
            **dict.fromkeys(Noise.__annotations__),
            **noise,
        }
        scores = self.function(latents, **{argument: given[argument] for argument in self.arguments})
        return _checked(scores, latents, self.name)

    def score_images(self, images: Any, prompts: Text, **options: Any) -> Tensor:
        raise ValueError(f"reward {self.name!r} reads latents and cannot score images; name one that reads images")


def _arguments(function: Callable[..., Any], name: str) -> list[str]:
    """Return the names of a callable's arguments, in order, without *args and **kwargs."""
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError as error:
        raise TypeError(f"reward {name!r}: Python cannot tell its arguments; wrap it in a function") from error
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in signature.parameters.values() if each.kind not in various]


def _check_callable(found: Any, name: str) -> Callable[..., Any]:
    if inspect.isclass(found) or not callable(found):
        got = f"the class {found.__name__}" if inspect.isclass(found) else f"{type(found).__name__} {found!r:.60}"
        raise TypeError(f"reward {name!r}: got {got}; expected a function, or an object that can be called")
    return found


def _frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    return function.requires_grad_(False).eval() if isinstance(function, nn.Module) else function


def _checked(scores: Any, inputs: Tensor, name: str) -> Tensor:
    """Return `scores` as float32. Raise if they are not finite, or have no gradient although `inputs` requires one."""
    scores = finite_scores(scores, len(inputs), name)
    if torch.is_grad_enabled() and inputs.requires_grad and not scores.requires_grad:
        raise ValueError(
            f"reward {name!r} is not differentiable: its scores have no graph to its input (it detaches, rounds or "
            "leaves torch); it can rank and evaluate, but gives no gradient to ReFL"
        )
    return scores
