"""Weight files of pixel rewards: where they are, their tensors alone (no pickled code), and a strict fit to a model."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from dinalrm_align.models.hub import check_source
from dinalrm_align.train.files import reading


def find_file(
    source: str | Path, name: str, *, revision: str | None = None, local_files_only: bool = False, what: str = "weights"
) -> Path:
    """The file `name` of a folder or hub id; `source` itself where it is a file. FileNotFoundError when there is none,
    ValueError when `source` is neither file, folder nor hub id.
    """
    if isinstance(source, str | Path) and str(source) and Path(source).is_file():
        return Path(source)
    check_source(what, source)
    if Path(source).is_dir():
        path = Path(source) / name
        if not path.is_file():
            raise FileNotFoundError(f"no file {name} in {source}; expected the {what}, or give the file's own path")
        return path
    with reading(name, source):
        return Path(hf_hub_download(str(source), name, revision=revision, local_files_only=local_files_only))


def beside(source: str | Path, *names: str) -> Path | None:
    """The folder of a local source, where it holds one of `names`: what lies beside the weights goes with them."""
    if not isinstance(source, str | Path) or not str(source):
        return None
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    return folder if any((folder / name).is_file() for name in names) else None


def check_fit(expected: Mapping[str, Iterable[int]], got: Mapping[str, Iterable[int]], where: str | Path) -> None:
    """ValueError unless both name the same tensors with the same shapes: how many do not, and the first names."""
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    found = {name: tuple(shape) for name, shape in got.items()}
    shapes = [
        f"{name} {found[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in (
            ("missing", [name for name in wanted if name not in found]),
            ("unexpected", [name for name in found if name not in wanted]),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise ValueError(f"{where}: not the tensors of this reward: {'; '.join(problems)}")


def shapes_of(module: nn.Module, prefix: str = "") -> dict[str, torch.Size]:
    """The shape of each tensor in a module's state dict, its name behind `prefix`."""
    return {prefix + name: tensor.shape for name, tensor in module.state_dict().items()}


def recompute_layers(model: nn.Module, recompute: bool) -> None:
    """Recompute a transformers model's layers in the backward pass, or keep their activations.

    transformers does so in training mode alone; here the layers are told that they train, and everything inside them
    (dropout) stays in evaluation mode. `model.eval()` undoes it: call this again afterwards.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = layer.training = recompute
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
