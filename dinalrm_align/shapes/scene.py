"""Scenes and captions of the embedded world (rendered shapes).

A caption names a background and one object, two objects in a relation, or two or three identical objects:
    "a small red circle on white"
    "a small red circle left of a large blue square on gray"
    "three small green crosses on black"
`SceneConfig` adds counts up to six, a medium size, and fills, whose words stand before the colour:
    "a large striped red circle left of a small outlined blue square on gray"
A tenth of all captions, chosen by a hash of the caption, is held out from all training.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dinalrm_align.shapes.config import FILLS, SCENES, SIZES, SceneConfig

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
MOST = {"small": 6, "medium": 3, "large": 2}
"""Size -> how many identical objects fit the image."""
SOLID_SHARE = 0.4
"""Share of solid objects in scenes with fills; the other objects have each fill equally often."""
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


def caption_words(scenes: SceneConfig) -> list[str]:
    """Return all words of the captions of `scenes`."""
    counts = [word for word, number in COUNTS.items() if number <= scenes.max_count]
    names = [*counts, *scenes.sizes, *scenes.fills, *COLOURS, *SHAPES, *map(_plural, SHAPES), *BACKGROUNDS]
    return ["a", "of", "on", *names, "left", "right", "above", "below"]


_LOOK = rf"({'|'.join(SIZES)})(?: ({'|'.join(FILLS)}))? ({'|'.join(COLOURS)})"
_ITEM = rf"a {_LOOK} ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"(?:{_ITEM}(?: ({'|'.join(RELATIONS)}) {_ITEM})?"
    rf"|({'|'.join(COUNTS)}) {_LOOK} ({'|'.join(map(_plural, SHAPES))}))"
    rf" on ({'|'.join(BACKGROUNDS)})"
)


def parse_caption(caption: str, scenes: SceneConfig | None = None) -> Scene:
    """Return the scene that a caption describes. Raises ValueError for text outside the caption grammar, and for a
    caption with a word that `scenes` do not have. None: accepts the captions of every `SceneConfig`.
    """
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
    if scenes and (unknown := {*caption.lower().split()} - {*caption_words(scenes)}):
        raise ValueError(f"caption {caption!r}: got {', '.join(sorted(unknown))}; expected only words of {scenes}")
    return Scene(tuple(items), background, relation)


def is_held_out(scene: Scene) -> bool:
    """Return whether a scene is held out from training, as determined by a hash of the scene's caption."""
    return hashlib.sha256(scene.caption.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def all_scenes(max_count: int = 3, medium: bool = False) -> dict[str, list[Scene]]:
    """Return all scenes by kind: "one" (one object), "pair" (two with a relation) and "count" (identical objects).

    The arguments are fields of `SceneConfig`. With fills, the scenes are too many to list.
    """
    sizes = SceneConfig(max_count, medium).sizes
    items = [Item(shape, colour, size) for shape, colour, size in itertools.product(SHAPES, COLOURS, sizes)]
    pairs = [(a, b) for a, b in itertools.permutations(items, 2) if (a.shape, a.colour) != (b.shape, b.colour)]
    counts = itertools.product(items, range(2, max_count + 1), BACKGROUNDS)
    return {
        "one": [Scene((item,), ground) for item in items for ground in BACKGROUNDS],
        "pair": [Scene(pair, ground, rel) for pair in pairs for rel in RELATIONS for ground in BACKGROUNDS],
        "count": [Scene((item,) * n, ground) for item, n, ground in counts if n <= MOST[item.size]],
    }


KIND_SHARES = {"one": 0.25, "pair": 0.5, "count": 0.25}


def draw_scenes(number: int, rng, *, held_out: bool = False, scenes: SceneConfig = SCENES) -> list[Scene]:
    """Return random scenes: held-out ones if `held_out`, else training ones. KIND_SHARES: probability of each kind."""
    kinds = rng.choice(list(KIND_SHARES), size=number, p=list(KIND_SHARES.values()))
    if scenes.fills:
        return [_draw_scene(kind, rng, held_out, scenes) for kind in kinds]
    pools = _pools(held_out, scenes.max_count, scenes.medium)
    return [pools[kind][rng.integers(len(pools[kind]))] for kind in kinds]


def _draw_scene(kind: str, rng, held_out: bool, scenes: SceneConfig) -> Scene:
    """Draw scenes with fills, of one kind, until one is held out as asked. Sizes, counts, ... are equally frequent."""

    def one_of(names: Iterable[str]) -> str:
        return str(rng.choice(list(names)))

    while True:
        number = int(rng.integers(2, scenes.max_count + 1)) if kind == "count" else 1
        sizes = [size for size in scenes.sizes if number <= MOST[size]]
        fills = ["solid" if rng.random() < SOLID_SHARE else one_of(scenes.fills) for _ in range(2)]
        first, second = (Item(one_of(SHAPES), one_of(COLOURS), one_of(sizes), fill) for fill in fills)
        scene = Scene((first,) * number, one_of(BACKGROUNDS))
        if kind == "pair":
            scene = replace(scene, items=(first, second), relation=one_of(RELATIONS))
        alike = kind == "pair" and (first.shape, first.colour) == (second.shape, second.colour)
        if not alike and is_held_out(scene) == held_out:
            return scene


@functools.cache
def _pools(held_out: bool, max_count: int, medium: bool) -> dict[str, list[Scene]]:
    scenes = all_scenes(max_count, medium).items()
    return {kind: [scene for scene in found if is_held_out(scene) == held_out] for kind, found in scenes}
