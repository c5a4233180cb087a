"""Pickle a reward as the call that loads it. The process that unpickles the reward loads the weights itself.

The pickle holds no tensors. A model that the caller passed, such as a pipeline, is replaced by the folder or hub id
that the model was loaded from. Access tokens are left out: the loading process takes its own from the environment.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin

from dinalrm_align.models.layout import without_t5
from dinalrm_align.models.pipeline import load_vae
from dinalrm_align.models.weights import find_file, loading
from dinalrm_align.train.files import HUB_ID

SECRETS = ("token", "api_key")
FILES = ("cache_dir", "processor", "tokenizer", "question", "base", "template", "med_config")
"""Arguments of rewards that may be local paths, besides the source and models."""


@dataclass(frozen=True)
class Origin:
    """The call `load(source, **arguments)` that loads a reward.

    fingerprint: digest of the weights as they were loaded; loading in another process must find the same. None: no
    check.
    """

    load: Callable[..., Any]
    source: Any
    arguments: Mapping[str, Any]
    fingerprint: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        return self

    def reduced(self, device: torch.device, **dtypes: torch.dtype) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Return the pair that `__reduce_ex__` returns. dtypes: dtypes to cast modules of `reward.model` to.

        Raises TypeError if a model that the caller passed was not loaded from a folder or the hub.
        """
        arguments = {name: _portable(name, value) for name, value in self.arguments.items() if name not in SECRETS}
        place = {"device": str(device)}
        return load_again, (self.load, self.source, arguments | place, self.fingerprint, dtypes)


@loading()
def load_again(
    load: Callable[..., Any],
    source: Any,
    arguments: dict[str, Any],
    fingerprint: str | None,
    dtypes: Mapping[str, torch.dtype],
) -> Any:
    """Load a pickled reward. Raises ValueError if the weights differ from those of the pickled reward."""
    if isinstance(vae := arguments.get("vae"), tuple):
        arguments = arguments | {"vae": load_vae(vae[0], device=arguments["device"]).to(vae[1])}
    reward = load(source, **arguments)
    if fingerprint is not None and reward.origin.fingerprint != fingerprint:
        where = ", ".join(str(arguments[name]) for name in ("pipeline", "transformer") if arguments.get(name))
        raise ValueError(
            f"weights: got other weights from {where or source} than those of the pickled reward, which were changed "
            "after they were loaded, or quantised; save them with save_pretrained, and load the reward from there"
        )
    for name, dtype in dtypes.items():
        reward.model.get_submodule(name).to(dtype)
    return reward


def absolute(source: Any) -> Any:
    """Return `source` as an absolute path if it is an existing file or folder; anything else unchanged."""
    local = isinstance(source, str | Path) and str(source) and Path(source).exists()
    return str(Path(source).absolute()) if local else source


def _portable(name: str, value: Any) -> Any:
    """Return `value` for another process: paths absolute, models replaced by their location, secrets left out."""
    if isinstance(value, ConfigMixin):  # a diffusers model or pipeline
        where = absolute(value.config.get("_name_or_path") or "")
        if not where or not (Path(where).is_dir() or HUB_ID.fullmatch(where)):
            raise TypeError(
                f"{name}: got a {type(value).__name__} that was not loaded from a folder or the hub, so another "
                f"process cannot load it; save it with save_pretrained, load it from there, and build the reward on it"
            )
        if name == "pipeline" and value.text_encoder_3 is None and not without_t5(find_file(where, "model_index.json")):
            raise TypeError(
                f"pipeline: got one without T5, and another process would load {where}, which has T5; save the "
                "pipeline with save_pretrained, load it from there, and build the reward on it"
            )
        if not isinstance(value, AutoencoderKL):
            return where
        return where.removesuffix("/vae") if Path(where).name == "vae" else where, value.dtype
    if isinstance(value, Mapping):
        return {key: _portable(key, item) for key, item in value.items() if key not in SECRETS}
    return absolute(value) if name in FILES else value
