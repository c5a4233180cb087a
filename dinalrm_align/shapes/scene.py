"""Scenes and captions of the embedded world (rendered shapes).

A caption names a background and one object, two objects in a relation, or two to six identical objects:
    "a small red circle on white"
    "a large striped red circle left of a small outlined blue square on gray"
    "three small green crosses on black"
A word before the colour names an object's fill; an object without one is solid.
A tenth of all captions, chosen by a hash of the caption, is held out from all training.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dinalrm_align.shapes.config import FILLS, SIZES

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.10, 0.65, 0.18),
    "blue": (0.13, 0.25, 0.92),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.62, 0.15, 0.78),
    "cyan": (0.10, 0.80, 0.88),
}
BACKGROUNDS = {"white": (0.96, 0.96, 0.96), "gray": (0.52, 0.52, 0.52), "black": (0.05, 0.05, 0.05)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Relation -> direction (x, y) from the second object to the first; y grows downwards."""
COUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
MAX_COUNT = max(COUNTS.values())
MOST = {"small": 6, "medium": 3, "large": 2}
"""Size -> how many identical objects fit the image."""
SOLID_SHARE = 0.4
"""Share of solid objects; the other objects have each fill equally often."""
HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Item:
    """One object: its shape (in SHAPES), colour (in COLOURS), size (in SIZES) and fill ("solid" or in FILLS)."""

    shape: str
    colour: str
    size: str
    fill: str = "solid"

    def __str__(self) -> str:
        return f"{self.size} {'' if self.fill == 'solid' else f'{self.fill} '}{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The content of a caption: one to six items, a background, and the relation of the first item to the second."""

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
            return f"{number} {replace(first, shape=_plural(first.shape))} on {self.background}"
        return f"a {first} on {self.background}"


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def caption_words() -> list[str]:
    """Return all words of captions."""
    names = [*COUNTS, *SIZES, *FILLS, *COLOURS, *SHAPES, *map(_plural, SHAPES), *BACKGROUNDS]
    return ["a", "of", "on", *names, "left", "right", "above", "below"]


_LOOK = rf"({'|'.join(SIZES)})(?: ({'|'.join(FILLS)}))? ({'|'.join(COLOURS)})"
_ITEM = rf"a {_LOOK} ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"(?:{_ITEM}(?: ({'|'.join(RELATIONS)}) {_ITEM})?"
    rf"|({'|'.join(COUNTS)}) {_LOOK} ({'|'.join(map(_plural, SHAPES))}))"
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
    *found, background = match.groups()
    first, relation, second, number, many = found[:4], found[4], found[5:9], found[9], found[10:]
    looks = [first] + [second] * bool(relation) if number is None else [many] * COUNTS[number]
    shapes = {written: name for name in SHAPES for written in (name, _plural(name))}
    items = (Item(shapes[shape], colour, size, fill or "solid") for size, fill, colour, shape in looks)
    return Scene(tuple(items), background, relation)


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is held out from training, as determined by a hash of the scene's caption."""
    return hashlib.sha256(scene.caption.encode()).digest()[0] < 256 * HELD_OUT_SHARE


KIND_SHARES = {"one": 0.25, "pair": 0.5, "count": 0.25}
"""Probability of one object, of two with a relation, and of identical objects."""


def draw_scenes(number: int, rng, *, held_out: bool = False) -> list[Scene]:
    """Return random scenes: held-out ones if `held_out`, else training ones. KIND_SHARES: probability of each kind."""
    kinds = rng.choice(list(KIND_SHARES), size=number, p=list(KIND_SHARES.values()))
    return [_draw_scene(kind, rng, held_out) for kind in kinds]


def _draw_scene(kind: str, rng, held_out: bool) -> Scene:
    """Draw scenes of one kind until one is held out as asked. Sizes, counts, ... are equally frequent."""

    def one_of(names: Iterable[str]) -> str:
        return str(rng.choice(list(names)))

    while True:
        number = int(rng.integers(2, MAX_COUNT + 1)) if kind == "count" else 1
        sizes = [size for size in SIZES if number <= MOST[size]]
        fills = ["solid" if rng.random() < SOLID_SHARE else one_of(FILLS) for _ in range(2)]
        first, second = (Item(one_of(SHAPES), one_of(COLOURS), one_of(sizes), fill) for fill in fills)
        scene = Scene((first,) * number, one_of(BACKGROUNDS))
        if kind == "pair":
            scene = replace(scene, items=(first, second), relation=one_of(RELATIONS))
        alike = kind == "pair" and (first.shape, first.colour) == (second.shape, second.colour)
        if not alike and is_held_out(scene) == held_out:
            return scene
