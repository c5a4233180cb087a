"""Folders whose making can be interrupted and resumed with the same settings. Torch-free."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinalrm_align.train.files import make_folder, read_json, write_atomically


def begin_or_resume(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Record settings (JSON values) in folder/name, or compare them with those recorded there.

    Raises ValueError when the folder was begun with other settings; FileExistsError when it holds other files.
    """
    path, settings = folder / name, json.loads(json.dumps(settings))
    if path.is_file():
        before, now = _flat(read_json(path)), _flat(settings)
        changed = next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)
        if changed is not None:
            raise ValueError(
                f"{changed}: got {now.get(changed)!r:.80}; expected {before.get(changed)!r:.80}, as in {path}: "
                "resume with the same settings, or choose another folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files and no {name}; write to a new folder")
    make_folder(folder)
    write_atomically(path, json.dumps(settings, indent=1))


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, those of inner objects under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= {f"{key}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat
