"""Scenes and captions of the embedded world (rendered shapes).

A caption names a background and one object, two objects in a relation, or two or three identical objects:
    "a small red circle on white"
    "a small red circle left of a large blue square on gray"
    "three small green crosses on black"
A tenth of all captions, chosen by a hash of the caption, is held out from all training.
"""

import functools
import hashlib
import itertools
import re
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.65, 0.18),
    "blue": (0.13, 0.25, 0.92),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.62, 0.15, 0.78),
    "cyan": (0.10, 0.80, 0.88),
}
SIZES = ("small", "large")
BACKGROUNDS = {"white": (0.96, 0.96, 0.96), "gray": (0.52, 0.52, 0.52), "black": (0.05, 0.05, 0.05)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> direction (x, y) from the second object to the first; y grows downwards."""
COUNTS = {"two": 2, "three": 3}
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Item:
    """One object: its shape (in SHAPES), colour (in COLOURS) and size (in SIZES)."""

    shape: str
    colour: str
    size: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The content of a caption: one to three items, a background, and the relation of the first item to the second."""

    items: tuple[Item, ...]
    background: str
    relation: str | None = None

    @property
    def caption(self) -> str:
        first = self.items[0]
        if self.relation:
            return f"a {first} {self.relation} a {self.items[1]} on {self.background}"
        if len(self.items) > 1:
            number = {value: word for word, value in COUNTS.items()}[len(self.items)]
            return f"{number} {first.size} {first.colour} {_plural(first.shape)} on {self.background}"
        return f"a {first} on {self.background}"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


CAPTION_WORDS = [
    "a", "of", "on", *COUNTS, *SIZES, *COLOURS, *SHAPES, *map(_plural, SHAPES), *BACKGROUNDS,
    "left", "right", "above", "below",
]  # fmt: skip

_ITEM = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"(?:{_ITEM}(?: ({'|'.join(RELATIONS)}) {_ITEM})?"
    rf"|({'|'.join(COUNTS)}) ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(map(_plural, SHAPES))}))"
    rf" on ({'|'.join(BACKGROUNDS)})"
)


def parse_caption(caption: str) -> Scene:
    """Return the scene that a caption describes. Raises ValueError for text outside the caption grammar."""
    match = _CAPTION.fullmatch(caption.strip().lower())
    if match is None:
        raise ValueError(
            f"caption of the embedded world: got {caption!r}; expected for instance "
            "'a small red circle left of a large blue square on gray' or 'three small green crosses on black'"
        )
    (size, colour, shape, relation, size2, colour2, shape2, number, *many, background) = match.groups()
    if number:
        shapes = {_plural(name): name for name in SHAPES}
        return Scene((Item(shapes[many[2]], many[1], many[0]),) * COUNTS[number], background)
    items = (Item(shape, colour, size),) + ((Item(shape2, colour2, size2),) if relation else ())
    return Scene(items, background, relation)


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is held out from training, as determined by a hash of the scene's caption."""
    return hashlib.sha256(scene.caption.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def all_scenes() -> dict[str, list[Scene]]:
    """Return all scenes by kind: "one" (one object), "pair" (two with a relation) and "count" (identical objects)."""
    items = [Item(shape, colour, size) for shape, colour, size in itertools.product(SHAPES, COLOURS, SIZES)]
    pairs = [(a, b) for a, b in itertools.permutations(items, 2) if (a.shape, a.colour) != (b.shape, b.colour)]
    counts = itertools.product(items, COUNTS.values(), BACKGROUNDS)
    return {
        "one": [Scene((item,), ground) for item in items for ground in BACKGROUNDS],
        "pair": [Scene(pair, ground, rel) for pair in pairs for rel in RELATIONS for ground in BACKGROUNDS],
        # three large objects do not fit the image
        "count": [Scene((item,) * n, ground) for item, n, ground in counts if item.size == "small" or n < 3],
    }


KIND_SHARES = {"one": 0.25, "pair": 0.5, "count": 0.25}


def draw_scenes(number: int, rng, *, held_out: bool = False) -> list[Scene]:
    """Return random scenes: held-out ones if `held_out`, else training ones. KIND_SHARES: probability of each kind."""
    pools = _pools(held_out)
    kinds = rng.choice(list(KIND_SHARES), size=number, p=list(KIND_SHARES.values()))
    return [pools[kind][rng.integers(len(pools[kind]))] for kind in kinds]


@functools.cache
def _pools(held_out: bool) -> dict[str, list[Scene]]:
    scenes = all_scenes().items()
    return {kind: [scene for scene in found if is_held_out(scene) == held_out] for kind, found in scenes}
