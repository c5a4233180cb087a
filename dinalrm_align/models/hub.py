"""Where weights come from: a folder, or a hub id."""

from pathlib import Path
from typing import Any

from dinalrm_align.train.files import HUB_ID, reading


def check_source(name: str, source: str | Path) -> None:
    """TypeError unless `source` is text or a path, ValueError unless it is a folder or written as a hub id."""
    if not isinstance(source, str | Path):
        raise TypeError(f"{name}: got {type(source).__name__}; expected a folder, or a hub id, owner/name")
    text = str(source)
    if isinstance(source, str) and HUB_ID.fullmatch(text) and not Path(text).exists():
        return
    if not text.strip() or "\0" in text or not Path(text).is_dir():
        raise ValueError(f"no {name} at {text!r:.200}: neither an existing folder nor a hub id, owner/name")


def load_model(kind: Any, source: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(source, **options)` of diffusers, from safetensors alone. Raises as `reading`, and
    ValueError when a tensor is missing, which would be drawn at random, or of another shape.
    """
    with reading(kind.__name__, source):
        model, info = kind.from_pretrained(str(source), use_safetensors=True, output_loading_info=True, **options)
    lacking = [*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"]]
    if lacking:
        raise ValueError(f"{str(source)!r} holds no whole {kind.__name__}: {len(lacking)} tensors, as {lacking[:3]}")
    return model
