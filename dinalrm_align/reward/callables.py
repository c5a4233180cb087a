"""Any Python callable as a reward, known by the name of its first argument.

    def my_reward(images, prompts): ...                     images (B, 3, H, W) in [0, 1] -> (B,)
    def my_reward(latents, prompts, sigma, noise): ...      latents (B, C, h, w) -> (B,)

`images`: decoded pictures, as for every pixel reward, and B prompts. `latents`: scaled and clean, and those of
`LatentReward`'s other arguments that the callable names. Both return one number per sample, higher is better.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.train.settings import did_you_mean

PICTURES = ("images", "pixels", "pictures")
"""What the first argument of a callable over pictures may be called."""
ARGUMENTS = ("prompts", "prompt_embeds", "pooled_prompt_embeds", "sigma", "noise", "generator")
"""What a callable over latents may ask for besides them."""


def import_callable(path: str) -> Callable[..., Any]:
    """What "module:function" names. ImportError when there is no such module, or it needs one that is not installed;
    ValueError when the module has no such name; TypeError when that is no callable, or a class.
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


def as_reward(
    function: Callable[..., Any],
    *,
    vae: AutoencoderKL | None = None,
    name: str | None = None,
    differentiable: bool = True,
) -> "PictureFunction | LatentFunction":
    """The callable behind `LatentReward`'s call. A module is known by its `forward`, and is frozen.

    vae: to decode latents for a callable over pictures. name: for messages. differentiable: False when it is known not
    to be; otherwise it is found out in the first call that wants a gradient. TypeError unless its first argument says
    what it reads.
    """
    name = name or f"{type(function).__name__}" * isinstance(function, nn.Module) or repr(function)[:60]
    _check_callable(function, name)
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError as error:
        raise TypeError(f"reward {name!r}: Python cannot tell its arguments; wrap it in a function") from error
    named = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if named and named[0] in PICTURES:
        return PictureFunction(function, vae, name, differentiable)
    if named and named[0] == "latents":
        return LatentFunction(function, [argument for argument in ARGUMENTS if argument in named], name, differentiable)
    raise TypeError(
        f"reward {name!r}: got the arguments ({', '.join(named)}); expected the first to be called images (decoded, "
        "(B, 3, H, W) in [0, 1]) or latents, so that it is known what it reads"
    )


class PictureFunction(PixelReward):
    """A callable `(images (B, 3, H, W) in [0, 1], prompts) -> (B,)` over decoded pictures."""

    def __init__(
        self, function: Callable[..., Any], vae: AutoencoderKL | None, name: str, differentiable: bool = True
    ) -> None:
        super().__init__(vae)
        self.function = _frozen(function)
        self.name = name
        self.differentiable = differentiable

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the callable returns, checked, as float32."""
        return _check_scores(self.function(images, list(prompts)), images, self.name)


class LatentFunction(nn.Module):
    """A callable `(latents (B, C, h, w), ...) -> (B,)`; nothing is decoded."""

    def __init__(
        self, function: Callable[..., Any], arguments: Sequence[str], name: str, differentiable: bool = True
    ) -> None:
        """arguments: those of `ARGUMENTS` that the callable is to be given, by name."""
        super().__init__()
        self.function = _frozen(function)
        self.arguments = tuple(arguments)
        self.name = name
        self.differentiable = differentiable

    def forward(
        self,
        latents: Tensor,
        prompts: Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: Any = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scores (B,), float32; arguments as `LatentReward`'s, those that the callable does not name left out."""
        given = dict(
            prompts=prompts, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, sigma=sigma,
            noise=noise, generator=generator,
        )  # fmt: skip
        scores = self.function(latents, **{argument: given[argument] for argument in self.arguments})
        return _check_scores(scores, latents, self.name)

    def enable_gradient_checkpointing(self, slice_size: int | None = None) -> None:
        """Nothing: a callable keeps what it keeps."""

    def disable_gradient_checkpointing(self) -> None: ...


def _check_callable(found: Any, name: str) -> Callable[..., Any]:
    if inspect.isclass(found) or not callable(found):
        got = f"the class {found.__name__}" if inspect.isclass(found) else f"{type(found).__name__} {found!r:.60}"
        raise TypeError(f"reward {name!r}: got {got}; expected a function, or an object that can be called")
    return found


def _frozen(function: Callable[..., Any]) -> Callable[..., Any]:
    """A module takes no gradient and stays in evaluation mode, as every reward."""
    return function.requires_grad_(False).eval() if isinstance(function, nn.Module) else function


def _check_scores(scores: Any, inputs: Tensor, name: str) -> Tensor:
    """float32 (B,). TypeError unless it is a tensor, ValueError unless it is one finite number per sample, with a
    gradient where one is wanted.
    """
    if not isinstance(scores, Tensor):
        raise TypeError(f"reward {name!r} returned {type(scores).__name__}; expected a tensor ({len(inputs)},)")
    if tuple(scores.shape) != (len(inputs),):
        got = tuple(scores.shape)
        raise ValueError(f"reward {name!r} returned shape {got}; expected ({len(inputs)},), a number per sample")
    if torch.is_grad_enabled() and inputs.requires_grad and not scores.requires_grad:
        raise ValueError(
            f"reward {name!r} is not differentiable: its scores do not depend on its input as autograd sees it (it "
            "detaches, rounds or leaves torch); it can rank and judge, and give no gradient to ReFL"
        )
    if not bool(torch.isfinite(scores.detach()).all()):
        raise ValueError(f"reward {name!r} returned NaN or infinity; expected finite numbers")
    return scores.float()
