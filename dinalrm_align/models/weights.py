"""Find models in folders and on the Hugging Face Hub, read tensor files, and load weights strictly.

Reading a file never runs code from it. In strict loading, file and model must have tensors of equal names and shapes.
"""

import os
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dinalrm_align.models.layout import find_weights
from dinalrm_align.train.digest import digest
from dinalrm_align.train.files import HUB_ID, reading

_LOADING = threading.RLock()


@contextmanager
def loading() -> Iterator[None]:
    """Context manager and decorator for loading models: one thread at a time, and outside inference mode.

    While transformers and diffusers load a model, they replace methods of torch.nn.Module for all threads. Weights that
    are loaded in inference mode allow no gradients.
    """
    with _LOADING, torch.inference_mode(False):
        yield


class HubOptions(TypedDict, total=False):
    """Download options of `huggingface_hub`. The loading functions take them as `**hub`."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


def check_source(name: str, source: str | Path, **hub: Unpack[HubOptions]) -> None:
    """Raise ValueError unless `source` is an existing folder or has the form of a hub id, owner/name.

    Raises TypeError if `source` is neither a str nor a Path, and for options that `HubOptions` does not list.
    """
    if hub.keys() - HubOptions.__annotations__:
        raise TypeError(f"{name}: unknown options {sorted(hub.keys() - HubOptions.__annotations__)}")
    if not isinstance(source, str | Path):
        raise TypeError(f"{name}: got {type(source).__name__}; expected a folder, or a hub id, owner/name")
    text = str(source)
    on_hub = isinstance(source, str) and HUB_ID.fullmatch(text) and not Path(text).exists()
    if not on_hub and (not text.strip() or "\0" in text or not Path(text).is_dir()):
        raise ValueError(f"no {name} at {text!r:.200}: neither an existing folder nor a hub id, owner/name")


def fetch(
    source: str | Path, files: Sequence[str], *, what: str = "model", subfolder: str = "", **hub: Unpack[HubOptions]
) -> Path:
    """Return the local folder of a model. If `source` is a hub id, download `files` (names or patterns) first.

    subfolder: folder in `source` that holds `files`; is part of the returned path. what: noun for error messages.
    """
    source = os.path.expanduser(source) if isinstance(source, str) else source
    check_source(what, source, **hub)
    if Path(source).is_dir():
        return Path(source) / subfolder
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{file}" if subfolder else file for file in files]
    with reading(what, source):
        return Path(snapshot_download(str(source), allow_patterns=patterns, **hub)) / subfolder


def find_file(source: str | Path, name: str, *, what: str = "weights", **hub: Unpack[HubOptions]) -> Path:
    """Return the path of the file `name` in the folder or hub repository `source`; if `source` is a file, return it."""
    if isinstance(source, str | Path) and str(source) and Path(source).is_file():
        return Path(source)
    check_source(what, source, **hub)
    if Path(source).is_dir():
        path = Path(source) / name
        if not path.is_file():
            raise FileNotFoundError(f"no file {name} in {source}; expected the {what}, or give the file's own path")
        return path
    from huggingface_hub import hf_hub_download

    with reading(name, source):
        return Path(hf_hub_download(str(source), name, **hub))


def beside(source: str | Path, *names: str) -> Path | None:
    """Return the local folder `source`, or the parent folder of the local file `source`.

    Returns None if `source` is not local or the folder holds none of the files `names`.
    """
    if not isinstance(source, str | Path) or not str(source):
        return None
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    return folder if any((folder / name).is_file() for name in names) else None


@loading()
def load_model(kind: Any, source: str | Path, *, allow_unexpected: bool = True, **options: Any) -> Any:
    """Load a model with `kind.from_pretrained(source, **options)`, where `kind` is a diffusers or transformers class.

    Raises ValueError if tensors are missing (from_pretrained would initialise them at random) or have wrong shapes.
    With allow_unexpected=False, also raises ValueError if the files hold tensors that the model lacks.
    """
    options["local_files_only"] = options.get("local_files_only", False) or Path(source).is_dir()
    with reading(kind.__name__, source):
        model, info = kind.from_pretrained(str(source), output_loading_info=True, **options)
    lacking = [*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"]]
    # old CLIP checkpoints store position_ids, which are computed
    surplus = [key for key in info["unexpected_keys"] if not (allow_unexpected or key.endswith("position_ids"))]
    if lacking or surplus:
        got = f"missing {sorted(map(str, lacking))[:3]}, unexpected {sorted(surplus)[:3]}"
        counts = f"({len(lacking)} and {len(surplus)} tensors)"
        raise ValueError(f"{str(source)!r} holds no whole {kind.__name__}: {got} {counts}")
    return model


def read_tensors(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Read a .safetensors, .pt, .pth or .bin file. Returns CPU tensors by name, memory-mapped if possible.

    key: entry of the file's dict that holds the tensors; None: the dict itself. Raises ValueError if the file is
    damaged or holds anything but tensors, or if the tensors do not match a SHA-256 in the file's safetensors metadata.
    """
    content, sha256 = _read(path)
    if sha256 is not None and digest(content) != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not {sha256:.16}...; download or write it again")
    if key is not None:
        if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
            raise ValueError(f"{path}: got {_kind(content)}; expected a dict with the entry {key!r}")
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: got {_kind(content)}; expected names and tensors")
    return dict(content)


def stored_dtype(folder: Path, stem: str) -> torch.dtype:
    """Return the dtype of a model's first tensor, without reading the others. stem: as in `layout.find_weights`."""
    suffix, _, files = find_weights(folder, stem) or (None, None, [f"{stem}.safetensors"])
    if suffix == "bin":
        return next(iter(read_tensors(folder / files[0]).values())).dtype
    with reading("weights", folder), safe_open(folder / files[0], framework="pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def read_entries(path: Path) -> dict[Any, Any]:
    """Read a .pt or .bin file that holds a dict of tensors, numbers and dicts. Raises as `read_tensors`."""
    content, _ = _read(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: got {_kind(content)}; expected a dict")
    return dict(content)


def rename(tensors: Mapping[str, Tensor], rules: Mapping[str, str | None]) -> dict[str, Tensor]:
    """Rename tensors. `rules` maps regular expressions to replacements. The replacement None drops the tensor.

    Only the first expression that matches the beginning of a name is used. Names that match no expression are kept.
    """
    rule_of = {name: next((rule for rule in rules if re.match(rule, name)), "") for name in tensors}
    kept = {name: rule for name, rule in rule_of.items() if rules.get(rule, "") is not None}
    return {re.sub(f"^{rule}", rules.get(rule, ""), name): tensors[name] for name, rule in kept.items()}


def check_fit(expected: Mapping[str, Tensor], got: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise ValueError unless `got` has the names, shapes and kinds of dtype (floating or not) of `expected`."""
    both = [(name, got[name], tensor) for name, tensor in expected.items() if name in got]
    shapes = [(name, tuple(a.shape), tuple(b.shape)) for name, a, b in both if a.shape != b.shape]
    differences = {
        "missing": [name for name in expected if name not in got],
        "unexpected": [name for name in got if name not in expected],
        "of another shape": [f"{name} {shape}, expected {wanted}" for name, shape, wanted in shapes],
        "of another type": [f"{n} {a.dtype}" for n, a, b in both if a.is_floating_point() != b.is_floating_point()],
    }
    if found := [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in differences.items()
        if names
    ]:
        check = "Check that the file belongs to this config and base model"
        raise ValueError(f"{where}: the tensors do not fit the model: {'; '.join(found)}. {check}")


@torch.no_grad()
def load_tensors(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str | Path) -> None:
    """Copy `tensors` by name into `target`, in place. Raises ValueError, before any copy, if names or shapes differ."""
    check_fit(target, tensors, where)
    for name, tensor in target.items():
        tensor.copy_(tensors[name])


def assign_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    keep_in_fp32: str | None = None,
) -> None:
    """Make `tensors` the weights of `module`, which may be on meta. Raises ValueError if names or shapes differ.

    dtype: dtype of the weights. device: device of the whole module, buffers included. keep_in_fp32: name prefix;
    weights whose names begin with this prefix are stored in float32, or in `dtype` if that is wider.
    """
    check_fit(module.state_dict(), tensors, where)
    exact = [name for name in tensors if keep_in_fp32 and name.startswith(keep_in_fp32)]
    types = dict.fromkeys(tensors, dtype) | dict.fromkeys(exact, torch.promote_types(dtype, torch.float32))
    placed = {name: tensor.to(device or "cpu", types[name]) for name, tensor in tensors.items()}
    module.load_state_dict(placed, assign=True)
    module.to(device or "cpu")


class _StandIn:
    """Inert replacement for a class or function that a pickle names: accepts any arguments and stores its state."""

    def __init__(self, *args: Any, **options: Any) -> None: ...


def read_module_tensors(path: Path) -> dict[str, Tensor]:
    """Return parameters and persistent buffers of a pickled `torch.nn.Module` by state_dict name, on the CPU.

    Classes and functions that the file names are never imported or called: inert stand-ins replace them.
    """
    with reading("pickled module", path):
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"builtins.set"}
        splits = (name.rpartition(".") for name in named)
        stand_ins = [type(name, (_StandIn,), {"__module__": module}) for module, _, name in splits]
        with torch.serialization.safe_globals([*stand_ins, set]):
            content = _load(path)
    if isinstance(content, Mapping):
        content = content.get("model", content)  # a training checkpoint
    if not isinstance(content, _StandIn):
        raise ValueError(f"{path}: got {_kind(content)}; expected a pickled torch.nn.Module")
    with reading("pickled module", path):
        return dict(_module_tensors(content, ""))


def _read(path: Path) -> tuple[Any, str | None]:
    """Return the content of a file, and the SHA-256 in its safetensors metadata, if any."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a file of tensors")
    safe = path.suffix == ".safetensors"
    try:
        return _read_safetensors(path) if safe else (_load(path), None)
    except Exception as error:  # damaged files fail in many ways
        kind = "safetensors file" if safe else "file of tensors"
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: not a readable {kind} ({reason}); download or write it again") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("sha256")


def _load(path: Path) -> Any:
    try:
        # a truncated zip file is not recognised as one, so that it is never memory-mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's message recommends weights_only=False
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "GLOBAL" in line or "Unpickler error" in line), lines[-1])
        raise ValueError(f"it asks for more than tensors: {reason.rpartition('error: ')[2][:160]}") from error


def _module_tensors(module: _StandIn, prefix: str) -> Iterator[tuple[str, Tensor]]:
    parameters, buffers, children = (vars(module).get(kind, {}) for kind in ("_parameters", "_buffers", "_modules"))
    transient = vars(module).get("_non_persistent_buffers_set", ())
    for name, tensor in {**parameters, **buffers}.items():
        if isinstance(tensor, Tensor) and name not in transient:
            yield prefix + name, tensor.detach()
    for name, child in children.items():
        if isinstance(child, _StandIn):
            yield from _module_tensors(child, f"{prefix}{name}.")


def _kind(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dict with the entries {sorted(map(str, content))[:4]}"
    return "a pickled object" if isinstance(content, _StandIn) else f"a {type(content).__name__}"
