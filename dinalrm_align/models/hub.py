"""Access to models: a local folder or file, or a repository of the Hugging Face Hub."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from dinalrm_align.train.files import HUB_ID, reading


class HubOptions(TypedDict, total=False):
    """The options of `huggingface_hub` that every loader takes as `**hub`."""

    revision: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


def check_source(name: str, source: str | Path, **hub: Unpack[HubOptions]) -> None:
    """Raise ValueError unless `source` is an existing folder or a hub id, TypeError for another type or option."""
    if hub.keys() - HubOptions.__annotations__:
        raise TypeError(f"{name}: unknown options {sorted(hub.keys() - HubOptions.__annotations__)}")
    if not isinstance(source, str | Path):
        raise TypeError(f"{name}: got {type(source).__name__}; expected a folder, or a hub id, owner/name")
    text = str(source)
    if isinstance(source, str) and HUB_ID.fullmatch(text) and not Path(text).exists():
        return
    if not text.strip() or "\0" in text or not Path(text).is_dir():
        raise ValueError(f"no {name} at {text!r:.200}: neither an existing folder nor a hub id, owner/name")


def fetch(
    source: str | Path, files: Sequence[str], *, what: str = "model", subfolder: str = "", **hub: Unpack[HubOptions]
) -> Path:
    """The `subfolder` of a local folder, or of a snapshot of a repository.

    files: names and patterns to download, relative to the subfolder.
    """
    check_source(what, source, **hub)
    if Path(source).is_dir():
        return Path(source) / subfolder
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{file}" if subfolder else file for file in files]
    with reading(what, source):
        return Path(snapshot_download(str(source), allow_patterns=patterns, **hub)) / subfolder


def find_file(source: str | Path, name: str, *, what: str = "weights", **hub: Unpack[HubOptions]) -> Path:
    """The file `name` of a folder or repository, or `source` itself where that is a file; FileNotFoundError without."""
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
    """The folder of a local `source` (a folder, or a file in it) if it holds one of the files `names`, else None."""
    if not isinstance(source, str | Path) or not str(source):
        return None
    folder = Path(source).parent if Path(source).is_file() else Path(source)
    return folder if any((folder / name).is_file() for name in names) else None


def load_model(kind: Any, source: str | Path, *, allow_unexpected: bool = True, **options: Any) -> Any:
    """`kind.from_pretrained(source, **options)` of diffusers or transformers, strictly: ValueError for missing tensors
    (the libraries would draw them at random), other shapes and, unless `allow_unexpected`, surplus tensors.
    """
    options["local_files_only"] = options.get("local_files_only", False) or Path(source).is_dir()
    with reading(kind.__name__, source):
        model, info = kind.from_pretrained(str(source), output_loading_info=True, **options)
    lacking = [*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"]]
    # old CLIP checkpoints store position_ids, which are computed
    surplus = [key for key in info["unexpected_keys"] if not (allow_unexpected or key.endswith("position_ids"))]
    if lacking or surplus:
        raise ValueError(
            f"{str(source)!r} holds no whole {kind.__name__}: missing {sorted(map(str, lacking))[:3]}, "
            f"unexpected {sorted(surplus)[:3]} ({len(lacking)} and {len(surplus)} tensors)"
        )
    return model
