"""Images of the embedded world: scenes of shapes, laid out with random imperfections and rendered with anti-aliasing.

All lengths are in pixels of a 64 x 64 image. Larger images are scaled up. Three imperfections ("nuisances") lower
an image's aesthetics:

- `edge`: width of the soft transition at every outline; 1 is crisp.
- `contrast`: contrast between objects and background; 1 is full colour.
- `offset`: distance of the objects from the image's centre.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from dinalrm_align.shapes.config import AESTHETICS, CONCEPTS, FAITHFULNESS, FILLS, SIZES
from dinalrm_align.shapes.scene import BACKGROUNDS, COLOURS, MAX_COUNT, RELATIONS, SHAPES, Scene

SIZE = 64
RADII = {"small": (5.75, 7.0), "medium": (8.5, 9.75), "large": (11.75, 13.0)}
AREA_PER_RADIUS2 = {"circle": math.pi, "square": 3.24, "triangle": 2.3673, "cross": 3.04}
"""Area of each shape divided by the square of the shape's radius."""
HALF_EXTENT = {"circle": 1.0, "square": 0.9, "triangle": 1.17, "cross": 1.15}
"""Half the larger side of each shape's bounding box, divided by the shape's radius."""
HALF_WIDTH = {"circle": 1.0, "square": 0.9, "triangle": 0.675, "cross": 0.4}
"""Distance from each shape's centroid to its outline, divided by the shape's radius."""
MARGIN = 2.0
GAP = (2.5, 6.0)
FAINT = {"striped": 0.4, "dotted": 0.25, "checked": 0.4}
"""Strength of the fainter parts of each texture; 1 is the object's full colour."""
PERIODS = {"striped": 5.0 * math.sqrt(2), "dotted": 5.0, "checked": 6.0}
"""Period of each texture along the x axis. All textures stay the same if both axes are shifted by one period."""


@dataclass(frozen=True)
class Mark:
    """One object of a drawing: shape, colour, centroid (x, y), radius and fill."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    fill: str = "solid"


@dataclass(frozen=True)
class Drawing:
    """Everything that determines the pixels of one image: objects, background, edge width and contrast."""

    marks: tuple[Mark, ...]
    background: str
    edge: float = 1.0
    contrast: float = 1.0


@dataclass(frozen=True)
class Nuisance:
    """Imperfections of a 64 x 64 image: edge width (1 to 7 pixels), contrast (0.3 to 1), offset (0 to 14 pixels)."""

    edge: float = 1.0
    contrast: float = 1.0
    offset: float = 0.0


def draw_nuisance(rng: np.random.Generator) -> Nuisance:
    """Return random imperfections: edge width 1 to 6, contrast 0.4 to 1, offset 0 to 12, all beta-distributed."""
    return Nuisance(
        edge=1.0 + 5.0 * rng.beta(1.2, 1.8), contrast=0.4 + 0.6 * rng.beta(1.6, 1.2), offset=12.0 * rng.beta(1.1, 1.6)
    )


def lay_out(scene: Scene, nuisance: Nuisance, rng: np.random.Generator) -> Drawing:
    """Place a scene's objects at random. Radii fit the sizes, and positions fit the relation. The group
    of objects is shrunk if it does not fit the image, and shifted from the centre by up to `nuisance.offset`.
    """
    marks = [Mark(i.shape, i.colour, 0.0, 0.0, rng.uniform(*RADII[i.size]), i.fill) for i in scene.items]
    extents = [mark.radius * HALF_EXTENT[mark.shape] for mark in marks]
    gap = rng.uniform(*GAP)
    if scene.relation:
        along = np.array(RELATIONS[scene.relation], float)
        across = np.array([along[1], along[0]]) * rng.uniform(-5, 5)
        centres = [along * (sum(extents[:2]) + gap) + across, np.zeros(2)]
    elif len(marks) == 1:
        centres = [np.zeros(2)]
    else:
        reach = 2.9 if marks[0].shape == "square" else 2.2  # squares meet at their corners
        side = gap + reach * max(extents)
        ring = side / (2 * math.sin(math.pi / len(marks)))
        angles = rng.uniform(0, 2 * math.pi) + 2 * math.pi * np.arange(len(marks)) / len(marks)
        centres = [ring * np.array([math.cos(angle), math.sin(angle)]) for angle in angles]
    centres, extents = np.array(centres), np.array(extents)
    low, high = (centres - extents[:, None]).min(0), (centres + extents[:, None]).max(0)
    shrink = min(1.0, (SIZE - 2 * MARGIN) / (high - low).max())
    direction = rng.uniform(0, 2 * math.pi)
    room = (SIZE - 2 * MARGIN - shrink * (high - low)) / 2
    shift = np.clip(nuisance.offset * np.array([math.cos(direction), math.sin(direction)]), -room, room)
    centres = SIZE / 2 + shift + shrink * (centres - (low + high) / 2)
    radii = [mark.radius * shrink for mark in marks]
    placed = [replace(mark, x=float(x), y=float(y), radius=r) for mark, (x, y), r in zip(marks, centres, radii)]
    return Drawing(tuple(placed), scene.background, nuisance.edge, nuisance.contrast)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance (negative inside) from points (x, y) to the outline of a shape centred at (0, 0)."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    if shape == "triangle":  # equilateral, apex up: circumradius 1.35, inradius 0.675
        return np.maximum(y, np.abs(x) * (math.sqrt(3) / 2) - y / 2) - 0.675 * radius
    if shape == "cross":
        ax, ay = np.abs(x), np.abs(y)
        arm, half = 1.15 * radius, 0.4 * radius
        return np.minimum(np.maximum(ax - arm, ay - half), np.maximum(ax - half, ay - arm))
    raise ValueError(f"shape: got {shape!r}; expected one of {SHAPES}")


def coverage(mark: Mark, edge: float = 1.0, size: int = SIZE) -> np.ndarray:
    """Return the fraction of each pixel that an object covers: (size, size). `edge`: width of the soft outline."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (SIZE / size)
    distance = signed_distance(mark.shape, grid[None, :] - mark.x, grid[:, None] - mark.y, mark.radius)
    return np.clip(0.5 - distance / edge, 0.0, 1.0)


def texture(fill: str, x: np.ndarray, y: np.ndarray, edge: float = 1.0) -> np.ndarray:
    """Return the strength of a striped, dotted or checked object at points (x, y) from its centroid, in [0, 1]."""
    half = PERIODS[fill] / 2
    dx, dy, along = (np.abs((axis + half) % (2 * half) - half) for axis in (x, y, x + y))  # from the nearest centre
    if fill == "striped":
        outside = (along - half / 2) / math.sqrt(2)
    elif fill == "dotted":
        outside = 1.6 - np.hypot(dx, dy)
    else:  # in a full square, both or neither of x and y are near a centre
        outside = np.minimum(np.maximum(dx, dy) - half / 2, half / 2 - np.minimum(dx, dy))
    return FAINT[fill] + (1 - FAINT[fill]) * np.clip(0.5 - outside / edge, 0.0, 1.0)


def strength(mark: Mark, edge: float = 1.0, size: int = SIZE) -> np.ndarray:
    """Return how strongly an object colours each pixel, in [0, 1]: (size, size). Its fill modulates its coverage.

    The fine edges of a fill are at most 1.5 pixels wide, however soft the outline is: else they would vanish.
    """
    cover = coverage(mark, edge, size)
    if mark.fill == "solid":
        return cover
    grid = (np.arange(size, dtype=np.float32) + 0.5) * (SIZE / size)
    x, y = grid[None, :] - mark.x, grid[:, None] - mark.y
    soft, inside = min(edge, 1.5), -signed_distance(mark.shape, x, y, mark.radius)
    if mark.fill == "outlined":
        ring = min(2.5, 0.5 * HALF_WIDTH[mark.shape] * mark.radius)
        return cover * np.clip(0.5 - (inside - ring) / soft, 0.0, 1.0)
    pattern = texture(mark.fill, x, y, soft)
    return cover * (np.where(inside < 1, 1, pattern) if mark.fill == "dotted" else pattern)  # dots cut no outline


def render(drawings: list[Drawing], size: int = SIZE) -> torch.Tensor:
    """Render drawings to images (B, 3, size, size), float32 in [0, 1]."""
    images = np.empty((len(drawings), 3, size, size), np.float32)
    for image, drawing in zip(images, drawings):
        ground = np.array(BACKGROUNDS[drawing.background], np.float32)
        image[:] = ground[:, None, None]
        for mark in drawing.marks:
            colour = ground + drawing.contrast * (np.array(COLOURS[mark.colour], np.float32) - ground)
            image += strength(mark, drawing.edge, size) * (colour[:, None, None] - image)
    return torch.from_numpy(images)


def concepts_of(scene: Scene) -> tuple[str, ...]:
    """Return the concepts that an image can get wrong: all, but "relation" only if the scene has one."""
    return tuple(concept for concept in CONCEPTS if concept != "relation" or scene.relation)


def spoil_scene(scene: Scene, concept: str, rng: np.random.Generator) -> Scene:
    """Return a copy of the scene with `concept` changed at random. `concept`: one of FAITHFULNESS."""
    if concept not in FAITHFULNESS:
        raise ValueError(f"concept: got {concept!r}; expected one of {FAITHFULNESS}")
    items = scene.items
    which = int(rng.integers(len(items)))
    before, item, after = items[:which], items[which], items[which + 1 :]
    if concept == "count":
        if len(items) > 1 and (len(items) == MAX_COUNT or rng.random() < 0.5):
            return replace(scene, items=before + after, relation=None)
        return replace(scene, items=(*items, replace(item, size="small")), relation=None)
    values = dict(shape=SHAPES, colour=COLOURS, size=SIZES, relation=RELATIONS, background=BACKGROUNDS,
                  fill=("solid", *FILLS))[concept]  # fmt: skip
    owner = item if hasattr(item, concept) else scene
    other = str(rng.choice([name for name in values if name != getattr(owner, concept)]))
    changed = replace(owner, **{concept: other})
    return replace(scene, items=(*before, changed, *after)) if owner is item else changed


def spoil_nuisance(nuisance: Nuisance, concept: str, rng: np.random.Generator) -> Nuisance:
    """Return a copy of `nuisance` with one value made worse. `concept`: one of AESTHETICS, for instance "blur"."""
    if concept == "blur":
        return replace(nuisance, edge=min(7.0, nuisance.edge + rng.uniform(1.5, 4.5)))
    if concept == "contrast":
        return replace(nuisance, contrast=max(0.3, nuisance.contrast - rng.uniform(0.2, 0.5)))
    if concept == "placement":
        return replace(nuisance, offset=min(14.0, nuisance.offset + rng.uniform(5.0, 12.0)))
    raise ValueError(f"concept: got {concept!r}; expected one of {AESTHETICS}")


def lay_out_spoiled(scene: Scene, nuisance: Nuisance, concepts: list[str], rng: np.random.Generator) -> Drawing:
    """Return a drawing that gets `concepts`, some of CONCEPTS, wrong: for instance ["colour", "blur"]."""
    for concept in sorted(concepts, key=lambda concept: concept == "count"):  # another number has no relation
        if concept in AESTHETICS:
            nuisance = spoil_nuisance(nuisance, concept, rng)
        else:
            scene = spoil_scene(scene, concept, rng)
    return lay_out(scene, nuisance, rng)
