"""Oracle of the embedded world (rendered shapes): scores an image for its caption from the image's pixels.

    score = F (2.5 + 0.5 A),   where F is faithfulness and A is aesthetics, both in [0, 1]

A perfect image scores 3, and an image that does not match its caption (F = 0) scores 0. F is a score of the objects
(shape, colour, size and fill), multiplied by factors for relation, background and number of objects. A is the mean of
sharpness, contrast and centring. All are means over several thresholds of visibility: faint noise must not decide if
two objects touch. Training uses only preference labels derived from the score, not the score itself.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from dinalrm_align.shapes.config import FILLS, SIZES
from dinalrm_align.shapes.render import AREA_PER_RADIUS2, PERIODS, SIZE, Mark, coverage, texture
from dinalrm_align.shapes.scene import BACKGROUNDS, COLOURS, MAX_COUNT, RELATIONS, SHAPES, Item, Scene, parse_caption

COMPONENTS = {
    "faithfulness": ("objects", "relation", "background", "count"),
    "aesthetics": ("sharpness", "contrast", "centring"),
}
PARTS = (*COMPONENTS, *itertools.chain(*COMPONENTS.values()))
MIN_AREA = 30  # pixels; smaller regions are ignored
WHOLE_AREA = 60  # pixels; a smaller region is a fragment, which counts as less than one object
THRESHOLDS = (0.14, 0.18, 0.22)  # contrast of an object's pixels with the background, as shares of the image's highest
SIZE_BOUNDARIES = (7.8, 10.5)
"""Radii in pixels that separate each size from the next."""
_COLOUR_NAMES = tuple(COLOURS)
_COLOUR_VALUES = np.array(list(COLOURS.values()))


@dataclass(frozen=True)
class SeenObject:
    """An object detected in an image.

    Args:
        x, y, area: centroid and area of the object, in pixels.
        box: bounding box (left, top, right, bottom), in pixels.
        overlap: for each shape name, the IoU of the object and that shape drawn with equal centroid and area.
        strength: contrast with the background; 1 for an object in its full colour.
        edge: width in pixels of the soft transition from object to background.
        fills: for "solid" and each possible fill, how clearly the object has it.
    """

    colour: str
    x: float
    y: float
    area: float
    overlap: dict[str, float]
    box: tuple[float, float, float, float]
    strength: float
    edge: float
    fills: dict[str, float]


def oracle_score(
    images: torch.Tensor, prompts: list[str], parts: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Return scores (B,) in [0, 3] of images (B, 3, S, S) in [0, 1] for B captions. S must be a multiple of 64.

    parts: is filled with what the scores consist of, each (B,) in [0, 1]: "faithfulness", "faithfulness/objects", ...
    """
    found = oracle_parts(images, prompts)
    for main, components in COMPONENTS.items() if parts is not None else ():
        parts |= {main: found[main], **{f"{main}/{name}": found[name] for name in components}}
    return found["faithfulness"] * (2.5 + 0.5 * found["aesthetics"])


def oracle_parts(images: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Return the score's components as a dict: name in PARTS -> (B,) in [0, 1]. Raises ValueError for invalid input."""
    side = images.shape[-1]
    if images.ndim != 4 or images.shape[1:] != (3, side, side) or side % SIZE:
        raise ValueError(f"images: got {tuple(images.shape)}; expected (B, 3, S, S), S a multiple of {SIZE}")
    if len(prompts) != len(images):
        raise ValueError(f"one caption per image: got {len(images)} images, {len(prompts)} captions")
    pixels = F.avg_pool2d(images.detach().float().clamp(0, 1), side // SIZE).permute(0, 2, 3, 1).cpu().numpy()
    seen = [(image, parse_caption(prompt)) for image, prompt in zip(pixels, prompts)]
    rows = [_parts_of_image(*each, threshold) for each in seen for threshold in THRESHOLDS]
    found = {part: torch.tensor([row[part] for row in rows], dtype=torch.float64) for part in PARTS}
    return {part: values.view(-1, len(THRESHOLDS)).mean(1).float() for part, values in found.items()}


def _parts_of_image(image: np.ndarray, scene: Scene, threshold: float) -> dict[str, float]:
    border = np.concatenate([edge.reshape(-1, 3) for edge in (image[:2], image[-2:], image[:, :2], image[:, -2:])])
    ground = np.median(border, axis=0)
    background = min(BACKGROUNDS, key=lambda name: np.abs(ground - np.array(BACKGROUNDS[name])).sum())
    found = find_objects(image, ground, background, threshold)
    wanted, fit, matched = list(scene.items), np.zeros(0), []
    if found:
        table = np.array([[_match(item, seen) for seen in found] for item in wanted])
        rows, columns = linear_sum_assignment(table, maximize=True)
        fit, matched = table[rows, columns], [found[column] for column in columns]
    objects = float(fit.sum() / len(wanted))
    relation = 0.0 if scene.relation else 1.0
    if scene.relation and len(matched) == 2:
        offset = np.array([matched[0].x - matched[1].x, matched[0].y - matched[1].y])
        direction = np.array(RELATIONS[scene.relation])
        relation = float(np.clip(0.5 + (offset @ direction - np.abs(offset @ direction[::-1])) / 6.0, 0, 1))
    on_ground = 0.0
    if background == scene.background:
        on_ground = float(np.clip(1.5 - np.abs(ground - np.array(BACKGROUNDS[background])).max() / 0.15, 0, 1))
    number = sum(np.clip(0.25 + 0.75 * (seen.area - MIN_AREA) / (WHOLE_AREA - MIN_AREA), 0, 1) for seen in found)
    count = max(0.0, float(1 - abs(number - len(wanted)) / min(len(wanted), 3)))
    faithfulness = objects * (0.5 + 0.5 * relation) * (0.5 + 0.5 * on_ground) * (0.5 + 0.5 * count)
    sharpness = contrast = centring = 0.0
    if found:
        sharpness = float(np.mean([np.clip((7.0 - seen.edge) / 5.5, 0, 1) for seen in found]))
        contrast = float(np.mean([np.clip((seen.strength - 0.3) / 0.65, 0, 1) for seen in found]))
        boxes = np.array([seen.box for seen in found])
        middle = (boxes[:, :2].min(0) + boxes[:, 2:].max(0)) / 2
        centring = float(np.clip(1 - (np.hypot(*(middle - SIZE / 2)) - 0.7) / 12, 0, 1))
    aesthetics = (sharpness + contrast + centring) / 3
    values = faithfulness, aesthetics, objects, relation, on_ground, count, sharpness, contrast, centring
    return dict(zip(PARTS, values, strict=True))


def find_objects(image: np.ndarray, ground: np.ndarray, background: str, threshold: float) -> list[SeenObject]:
    """Detect objects (connected regions of one colour) in an image (64, 64, 3), at most twice as many as a caption
    can ask for. The largest come first. The gaps and holes of a textured or outlined object count as filled.

    A pixel gets the colour in COLOURS for which (colour - background) has the largest cosine similarity with (pixel -
    background). Low contrast and soft edges have no effect, as neither changes the direction of that difference.

    `ground`: RGB value of the background, (3,). `background`: name of the background in BACKGROUNDS. `threshold`: share
    of the highest contrast with the background above which a pixel belongs to an object.
    """
    difference = image - ground
    distance = np.linalg.norm(difference, axis=-1)
    directions = _COLOUR_VALUES - np.array(BACKGROUNDS[background])
    lengths = np.linalg.norm(directions, axis=-1)
    nearest = (difference @ (directions / lengths[:, None]).T).argmax(-1)
    visible = distance > max(0.07, threshold * distance.max())
    found = []
    for index in np.unique(nearest[visible]):
        labels, _ = ndimage.label(visible & (nearest == index))
        for label in np.flatnonzero(np.bincount(labels.flat)[1:] >= MIN_AREA) + 1:
            region = labels == label
            peak = np.quantile(distance[region], 0.9)
            alpha = np.where(ndimage.binary_dilation(region, iterations=4), distance / peak, 0)
            closed = ndimage.grey_closing(np.where(region, alpha, 0), 5)
            mask = ndimage.binary_fill_holes(region & (closed > 0.5))
            if mask.sum() < MIN_AREA:
                continue
            found.append(_measure(mask, alpha, _COLOUR_NAMES[index], peak / lengths[index]))
    return sorted(found, key=lambda seen: -seen.area)[: 2 * MAX_COUNT]


def _measure(mask: np.ndarray, alpha: np.ndarray, colour: str, strength: float) -> SeenObject:
    rows, columns = np.nonzero(mask)
    x, y, area = columns.mean() + 0.5, rows.mean() + 0.5, float(mask.sum())
    overlap = {}
    for shape in SHAPES:
        template = coverage(Mark(shape, colour, x, y, float(np.sqrt(area / AREA_PER_RADIUS2[shape])))) > 0.5
        overlap[shape] = float((template & mask).sum() / max(1, (template | mask).sum()))
    outline = (mask & ~ndimage.binary_erosion(mask)).sum()
    ramp = 2 * ((alpha > 0.15) & (alpha < 0.5) & ~mask).sum()  # twice the outer half, as textures are soft inside
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return SeenObject(
        colour, x, y, area, overlap, box, float(strength), float(ramp / (0.7 * outline)), _fills(mask, alpha)
    )


def _fills(mask: np.ndarray, alpha: np.ndarray) -> dict[str, float]:
    """Return how clearly an object has each fill: a hollow middle, or a correlation with the texture at some shift."""
    depth = ndimage.distance_transform_edt(mask)
    inside = depth > 1.5 if depth.max() > 1.5 else mask
    sums, weights = (ndimage.gaussian_filter(values, 2.5) for values in (alpha * mask, mask.astype(float)))
    fine = alpha[inside] - sums[inside] / weights[inside]
    fine = fine - fine.mean()
    spread = min(1.0, float(fine.std() / max(alpha[inside].mean(), 1e-6)) / 0.2)
    found = {"solid": 0.42, "outlined": 1 - float(alpha[depth > 0.65 * depth.max()].mean())}
    for name in PERIODS:
        patterns = _patterns(name)[:, inside]
        patterns = patterns - patterns.mean(1, keepdims=True)
        lengths = np.linalg.norm(patterns, axis=1) * np.linalg.norm(fine)
        found[name] = float((patterns @ fine / np.maximum(lengths, 1e-6)).max()) * spread
    return {name: found[name] for name in ("solid", *FILLS)}


@functools.cache
def _patterns(fill: str) -> np.ndarray:
    """Return a texture at all distinct shifts, in steps of about a pixel: (shifts, 64, 64)."""
    pixels, period = np.arange(SIZE), PERIODS[fill]
    steps = np.arange(round(period)) * period / round(period)
    shifts = [(dx, dy) for dx in steps for dy in (steps if fill != "striped" else (0,))]
    return np.stack([texture(fill, pixels[None, :] - dx, pixels[:, None] - dy) for dx, dy in shifts])


def _match(item: Item, seen: SeenObject) -> float:
    """Return how well a detected object matches a caption's object in shape, colour, size and fill, in [0, 1]."""
    other = max(overlap for shape, overlap in seen.overlap.items() if shape != item.shape)
    own = seen.overlap[item.shape]
    shape = float(np.clip(0.5 + (own - other) / 0.08, 0, 1) * np.clip((own - 0.5) / 0.3, 0, 1))
    radius = np.sqrt(seen.area / AREA_PER_RADIUS2[item.shape])
    boundaries, rank = SIZE_BOUNDARIES, SIZES.index(item.size)
    above = [1.0, *(np.clip(0.5 + (radius - bound) * len(boundaries) / 2.0, 0, 1) for bound in boundaries), 0.0]
    size = float(above[rank] - above[rank + 1])
    match = 0.4 * shape + 0.4 * float(seen.colour == item.colour) + 0.2 * size
    clearest = max(value for name, value in seen.fills.items() if name != item.fill)
    return 0.75 * match + 0.25 * float(np.clip(0.5 + (seen.fills[item.fill] - clearest) / 0.2, 0, 1))
