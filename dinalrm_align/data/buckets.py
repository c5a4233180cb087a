"""Aspect-ratio buckets: the image sizes that latents are encoded at. Torch-free.

Sizes are (height, width) in pixels. Among the buckets whose log aspect ratio is within a tolerance, an image gets the
one with the nearest log area, and is resized to it without cropping. The published training data of DiNa-LRM used the
thirteen sizes of PUBLISHED and a tolerance of 0.03.
"""

import math
import re
from collections.abc import Sequence

Size = tuple[int, int]

PUBLISHED: tuple[Size, ...] = (
    (256, 256), (512, 512), (1024, 1024), (1248, 832), (1344, 896), (832, 1248), (896, 1344), (1024, 768), (768, 1024),
    (1472, 832), (832, 1472), (1152, 832), (832, 1152),
)  # fmt: skip
MULTIPLE = 16
"""Divides every side: the VAE's factor of 8 times the transformer's patches of 2."""
STEP, MAX_ASPECT = 64, 2.0
"""For `by_area`: sides are multiples of STEP, and none is longer than MAX_ASPECT times the other."""
SAME_ASPECT = 0.05
"""Relative difference of aspect ratios below which images of two buckets share one."""


def parse_buckets(text: str) -> tuple[Size, ...]:
    """Parse `published`, `area:SIDE` (see `by_area`) or sizes, `HEIGHTxWIDTH,HEIGHTxWIDTH`. Raises ValueError."""
    if text == "published":
        return PUBLISHED
    if match := re.fullmatch(r"area:(\d{1,5})", text):
        return by_area(int(match[1]))
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})x(\d{1,5})\s*", word)
        if not match:
            raise ValueError(f"buckets: got {text!r:.80}; expected published, area:1024, or sizes as 1024x768,768x1024")
        size = int(match[1]), int(match[2])
        if min(size) < MULTIPLE or size[0] % MULTIPLE or size[1] % MULTIPLE:
            raise ValueError(f"buckets: got {word.strip()}; expected sides that are positive multiples of {MULTIPLE}")
        sizes.append(size)
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"buckets: got {text!r:.80}; expected each size once")
    return tuple(sizes)


def by_area(side: int) -> tuple[Size, ...]:
    """The square of `side` and, for each shorter height or width, the longest other side within the square's area."""
    if side < STEP or side % STEP:
        raise ValueError(f"buckets: got area:{side}; expected a positive multiple of {STEP}")
    sizes = {(side, side)}
    for short in range(STEP, side, STEP):
        long = side * side // short // STEP * STEP
        if long <= MAX_ASPECT * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: Sequence[Size], tolerance: float) -> Size | None:
    """The bucket of an image; None when no bucket has its aspect ratio."""
    fitting = [b for b in buckets if abs(_log_aspect(b) - _log_aspect(size)) <= tolerance]
    return min(fitting, key=lambda b: (abs(_log_area(b) - _log_area(size)), b), default=None)


def bucket_of_pair(one: Size, other: Size, buckets: Sequence[Size], tolerance: float) -> Size | None:
    """The common bucket of two images. If their buckets differ but their aspect ratios do not (up to SAME_ASPECT), it
    is that of the image with the smaller area; else None.
    """
    chosen, rejected = (nearest_bucket(size, buckets, tolerance) for size in (one, other))
    if chosen is None or rejected is None or chosen == rejected:
        return None if chosen is None or rejected is None else chosen
    if abs(math.exp(_log_aspect(one) - _log_aspect(other)) - 1) >= SAME_ASPECT:
        return None
    return min((_log_area(one), chosen), (_log_area(other), rejected))[1]


def _log_aspect(size: Size) -> float:
    return math.log(size[1] / size[0])


def _log_area(size: Size) -> float:
    return math.log(size[0] * size[1])
