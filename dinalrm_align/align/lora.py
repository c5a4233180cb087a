"""LoRA files: read those of diffusers and peft, and write one that every program applies at the same strength.

A LoRA adds scale * B A to the weight of a projection; A is (rank, in), B is (out, rank). Programs look for the scale,
alpha / rank, in different places: in the file's metadata (diffusers), in adapter_config.json (peft), in tensors named
alpha (kohya's sd-scripts), or nowhere. `write_lora` therefore multiplies B by the scale and writes alpha = rank, so
that the scale is 1 wherever a program looks for it. It writes no tensors named alpha, which diffusers refuses for SD3.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import StableDiffusion3Pipeline
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinalrm_align.models.weights import fetch, read_tensors
from dinalrm_align.train.files import atomically, read_json, reading

LORA_FILE, PEFT_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
FILES = (LORA_FILE, PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"
PREFIX = re.compile(r"(base_model\.model\.|transformer\.)*")
MATRIX = re.compile(r"(?P<layer>.+)\.(?:lora_(?P<letter>[AB])|lora[._](?P<word>down|up))\.weight")
LETTERS, ALPHA = {"down": "A", "up": "B"}, ".alpha"
PLAIN = {"peft_type": "LORA", "use_dora": False, "lora_bias": False, "bias": "none", "modules_to_save": None}
"""Settings in which a peft LoraConfig must agree with a plain LoRA."""


@dataclass(frozen=True)
class Lora:
    """A LoRA as `read_lora` reads it.

    Args:
        layers: {name of a projection in the transformer: (A, B)}, A (rank, in) and B (out, rank), float32. The update
            of the weight is B A: B includes the scale.
        path: the file.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    path: Path


def write_lora(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a LoRA to folder/pytorch_lora_weights.safetensors, with its scale multiplied into B.

    Args:
        tensors: `X.lora_A.weight` and `X.lora_B.weight` by name, X being the name of a projection in the transformer.
        config: the peft LoraConfig as a dict, with `r` and `lora_alpha`; stored as metadata, with lora_alpha = r.
    """
    scale = config["lora_alpha"] / config["r"]
    folded = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    try:
        with atomically(folder / LORA_FILE) as temporary:
            StableDiffusion3Pipeline.save_lora_weights(
                folder,
                transformer_lora_layers=folded,
                transformer_lora_adapter_metadata={**config, "lora_alpha": config["r"]},
                weight_name=temporary.name,
            )
    except SafetensorError as error:
        raise OSError(f"{folder / LORA_FILE} cannot be written ({error})") from error


def read_lora(source: str | Path) -> Lora:
    """Read the LoRA of a transformer: the file or folder of diffusers or of peft, or the hub id of such a folder.

    The scale comes from the metadata of the file, from adapter_config.json beside it, or from its tensors named alpha.
    If none of them gives a scale, it is 1, as in diffusers. Raises ValueError for anything that is not a plain LoRA:
    tensors of other kinds, DoRA, biases, ranks that differ from those in its config, values that are not finite.
    """
    path = _find(source)
    config, tensors = _config(path), read_tensors(path)
    named = {PREFIX.sub("", name, count=1): tensor for name, tensor in tensors.items()}
    alphas = {name.removesuffix(ALPHA): named.pop(name) for name in [*named] if name.endswith(ALPHA)}
    matches = {name: MATRIX.fullmatch(name) for name in named}
    pairs: dict[str, dict[str, Tensor]] = {match["layer"]: {} for match in matches.values() if match}
    for name, match in matches.items():
        if match:
            pairs[match["layer"]][match["letter"] or LETTERS[match["word"]]] = named[name].float()
    unknown = [name for name, match in matches.items() if not match]
    unknown += [*(alphas.keys() - pairs.keys()), *(layer for layer, pair in pairs.items() if len(pair) < 2)]
    if unknown or not pairs:
        got = f"{len(unknown)} names such as {', '.join(unknown[:3])}" if unknown else "no tensors"
        expected = "lora_A.weight and lora_B.weight of projections of an SD3 transformer in diffusers' names"
        raise ValueError(f"{path}: got {got}; expected {expected}, and nothing else")
    if surplus := len(tensors) - len(alphas) - 2 * len(pairs):
        raise ValueError(f"{path}: got {surplus} tensors more than one A, B and alpha for each of {len(pairs)} layers")
    if kinds := {str(tensor.dtype) for tensor in named.values() if not tensor.is_floating_point()}:
        raise ValueError(f"{path}: got tensors of {', '.join(sorted(kinds))}; expected floating point")
    layers = {}
    for layer, pair in pairs.items():
        a, b = pair["A"], pair["B"]
        if a.dim() != 2 or b.dim() != 2 or not 0 < len(a) == b.shape[1]:
            raise ValueError(f"{path}: {layer}: got A {tuple(a.shape)} and B {tuple(b.shape)}; expected one rank")
        with reading("LoRA", path):
            scale = _scale(layer, len(a), config, alphas.get(layer))
        layers[layer] = (a, b * scale)
        if not all(tensor.isfinite().all() for tensor in layers[layer]):
            raise ValueError(f"{path}: {layer}: got values that are not finite")
    return Lora(layers, path)


def _find(source: str | Path) -> Path:
    if isinstance(source, str | Path) and str(source) and Path(source).is_file():
        return Path(source)
    folder = fetch(source, [*FILES, PEFT_CONFIG], what="LoRA")
    if found := [folder / name for name in FILES if (folder / name).is_file()]:
        return found[0]
    others = sorted(folder.rglob("*.safetensors"), key=lambda path: (path.name not in FILES, path))
    names = ", ".join(str(path.relative_to(folder)) for path in others[:3])
    hint = f"; it holds {names}: give that file or its folder" if others else ""
    raise FileNotFoundError(f"no LoRA in {source}: expected {LORA_FILE} or {PEFT_FILE}{hint}")


def _config(path: Path) -> dict[str, Any]:
    """Return the peft config in a file's metadata or beside a file of peft, or an empty dict."""
    config: dict[str, Any] = {}
    if path.name.startswith("adapter_model"):
        config = read_json(path.parent / PEFT_CONFIG, f"the settings of {path.name}, with r and lora_alpha")
    elif path.suffix == ".safetensors":
        with reading("LoRA in safetensors", path), safe_open(path, framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            config = {name.removeprefix("transformer."): value for name, value in stored.items()}
    if wrong := {name: config[name] for name, plain in PLAIN.items() if (config.get(name) or plain) != plain}:
        raise ValueError(f"{path}: got a LoRA with {wrong}; expected a plain LoRA")
    return config


def _scale(layer: str, rank: int, config: Mapping[str, Any], tensor: Tensor | None) -> float:
    """Return the scale of a layer. config: that of peft, or empty. tensor: the file's tensor named alpha, if any."""

    def setting(name: str, pattern: str) -> Any:
        patterns = config.get(pattern) or {}
        return patterns.get(get_pattern_key(patterns.keys(), layer), config.get(name))

    if (expected := setting("r", "rank_pattern")) not in (None, rank):
        raise ValueError(f"{layer}: got tensors of rank {rank}; expected rank {expected}, as its config says")
    found = [*([] if tensor is None else [tensor.item()]), setting("lora_alpha", "alpha_pattern")]
    alpha, *others = [float(alpha) for alpha in found if alpha is not None] or [float(rank)]
    if others and not math.isclose(alpha, others[0], rel_tol=1e-3):
        raise ValueError(f"{layer}: got alpha {alpha:g} in a tensor and {others[0]:g} in its config; expected one")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
