"""Names of the parts of a run's first gold reward, in evaluations, metrics, summary and figures.

What gold consists of (`Reward.score_image_parts`) is recorded as "gold_parts/PART", a component of a part as
"gold_parts/PART/COMPONENT". "gold/NAME" is the score of a further gold reward.
"""

from collections.abc import Iterable

PREFIX = "gold_parts/"


def part_names(names: Iterable[str]) -> list[str]:
    """Return the names of parts in `names`, each once, without PREFIX."""
    return list(dict.fromkeys(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)))


def by_main_part(parts: Iterable[str]) -> dict[str, list[str]]:
    """Return the components of every main part: the names after it in `parts` that start with its name and a slash."""
    found: dict[str, list[str]] = {}
    for name in parts:
        main = next((main for main in found if name.startswith(f"{main}/")), None)
        found.setdefault(main or name, []).extend([name] if main else [])
    return found
