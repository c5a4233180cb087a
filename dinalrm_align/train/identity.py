"""Which settings of a run may change when the run is resumed. Does not import torch.

Every setting is fixed, so that scores before and after the resume can be compared, unless a dataclass lists the field
in its class attribute MAY_CHANGE. A listed section may change as a whole. A setting whose value names a file, such as a
list of prompts, is listed if the checkpoint identifies the file by its content.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinalrm_align.train.settings import field_types

ADDRESS = re.compile(r"https?://[^\s#'\"]+")


def settings_by_name(settings: Any) -> dict[str, Any]:
    """Return the values of a dataclass and its nested dataclasses as JSON values, keyed by dotted name."""
    return by_name(type(settings), json.loads(json.dumps(dataclasses.asdict(settings))))


def by_name(kind: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a nested dict by the dotted names of the fields of the dataclass `kind`."""
    found: dict[str, Any] = {}
    for name, hint in field_types(kind).items():
        if name in values and dataclasses.is_dataclass(hint):
            found |= by_name(hint, values[name], f"{prefix}{name}.")
        elif name in values:
            found[prefix + name] = values[name]
    return found


def may_change(kind: type, prefix: str = "") -> tuple[str, ...]:
    """Return the dotted names of the settings and sections of a dataclass that may change."""
    names = [name for base in kind.__mro__ for name in vars(base).get("MAY_CHANGE", ())]
    found = tuple(prefix + name for name in names)
    for name, hint in field_types(kind).items():
        if dataclasses.is_dataclass(hint) and name not in names:
            found += may_change(hint, f"{prefix}{name}.")
    return found


def check_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...], where: str
) -> dict[str, tuple[Any, Any]]:
    """Compare the settings of a run with those of its resume; return {name: (before, now)} of those that changed.

    Args:
        before: settings of the run, keyed by dotted name.
        now: settings of the resume.
        free: names of settings and sections that may change (`may_change`).
        where: what holds the settings of the run, for the error message.

    Raises ValueError if another setting changed. Two differences are allowed: a folder whose earlier absolute path no
    longer exists (its content is compared when it is loaded), and a server with another address (http://host:port/...)
    that serves a model of the same name.
    """
    changed = {name: (before.get(name), new) for name, new in now.items() if before.get(name) != new}
    for name, (old, new) in changed.items():
        moved = isinstance(old, str) and old.startswith("/") and not Path(old).exists() and str(new).startswith("/")
        moved = moved or (ADDRESS.search(str(old)) and ADDRESS.sub("", str(old)) == ADDRESS.sub("", str(new)))
        if not moved and not any(name == known or name.startswith(f"{known}.") for known in free):
            raise ValueError(
                f"{name}: got {new!r:.120}; expected {old!r:.120}, as in {where}: leave it out, or start a new run in "
                "another folder; scores before and after it could not be compared"
            )
    return changed
