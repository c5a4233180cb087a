"""Draw the figure of the method: a latent reward and a pixel reward side by side, with the sizes of SD3.5-Medium.

python examples/evidence/method_figure.py                                  # writes runs/method.png
python examples/evidence/method_figure.py examples/results/method.png      # or another file
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from dinalrm_align.train.files import save_figure

GREEN, ORANGE, GREY = "#1f7a5c", "#b4552d", "#5a646b"
FILL = {GREEN: "#e2f2eb", ORANGE: "#fbe8de", GREY: "#eef0f2"}
BLOCKS, USED, TAPS = 24, 12, (4, 8, 12)  # SD3.5-Medium


def box(axis: Axes, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    """A rounded box centred at (x, y) with its text."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, "round,pad=0,rounding_size=0.15", fc=FILL[colour], ec=colour
    )
    axis.add_patch(shape)
    axis.text(x, y, text, ha="center", va="center", fontsize=10, linespacing=1.4)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, shrinkA=0, shrinkB=0))


def note(axis: Axes, x: float, y: float, text: str, colour: str = GREY, size: float = 9, **options) -> None:
    axis.text(x, y, text, color=colour, fontsize=size, va="center", linespacing=1.35, **{"ha": "center", **options})


def latent_lane(axis: Axes, y: float) -> None:
    """Noise, the first blocks of the policy's backbone, taps, head, score."""
    note(axis, 4.15, y + 2.75, "Latent reward (DiNa-LRM)", GREEN, 13, weight="bold", ha="left")
    note(axis, 22.3, y + 2.75, "gradient to $x_0$: through the head and 12 blocks", ha="right")
    box(axis, 5.6, y, 2.9, 1.5, "add noise\n$x_\\sigma = (1-\\sigma)\\,x_0 + \\sigma\\,\\epsilon$", GREEN)
    arrow(axis, (7.05, y), (7.85, y), GREEN)
    left, width, pitch, height = 7.9, 0.24, 0.31, 1.5
    arrow(axis, (left + width / 2, y + 1.3), (left + width / 2, y + height / 2), GREY)
    note(axis, left + 0.55, y + 1.68, "prompt embeddings,\ntimestep 1000 $\\sigma$", ha="right")
    right = left + (BLOCKS - 1) * pitch + width
    for number in range(1, BLOCKS + 1):
        x = left + (number - 1) * pitch
        used = number <= USED
        fill = GREEN if number in TAPS else FILL[GREEN] if used else "white"
        edge = {"ec": GREEN} if used else {"ec": "#c3c9cd", "ls": ":"}
        axis.add_patch(Rectangle((x, y - height / 2), width, height, fc=fill, **edge))
        if number in TAPS:
            centre = x + width / 2
            axis.plot([centre, centre], [y + height / 2, y + 1.5], color=GREEN, lw=1.4)
            note(axis, centre, y - height / 2 - 0.25, str(number), GREEN)
    tap = left + (TAPS[0] - 1) * pitch + width / 2
    axis.plot([tap, 17.9], [y + 1.5, y + 1.5], color=GREEN, lw=1.4)
    arrow(axis, (17.9, y + 1.5), (17.9, y + 0.8), GREEN)
    note(axis, 13.8, y + 1.8, "taps: image and text tokens after blocks 4, 8, 12", GREEN)
    middle = left + USED * pitch
    note(
        axis,
        (left + middle) / 2,
        y - 1.5,
        "first 12 blocks of the policy's own backbone,\nshared frozen weights + the reward's LoRA",
        GREEN,
    )
    note(axis, (middle + right) / 2, y - 1.5, "blocks 13 to 24:\nnot run")
    box(axis, 17.9, y, 3.4, 1.6, "timestep-conditioned\nhead: FiLM, attention\nby 4 learned queries", GREEN)
    arrow(axis, (17.9, y - 1.35), (17.9, y - 0.8), GREY)
    note(axis, 17.9, y - 1.6, "timestep 1000 $\\sigma$")
    arrow(axis, (19.6, y), (20.5, y), GREEN)
    box(axis, 21.4, y, 1.8, 1.1, "score\n(scalar)", GREEN)


def pixel_lane(axis: Axes, y: float) -> None:
    """Decoder, image, vision model, score."""
    note(axis, 4.15, y - 1.5, "Pixel reward (PickScore, HPSv3, ...)", ORANGE, 13, weight="bold", ha="left")
    note(axis, 22.3, y - 1.5, "gradient to $x_0$: through the vision model and the decoder", ha="right")
    box(axis, 5.9, y, 3.5, 1.5, "VAE decoder\n49.5 M parameters", ORANGE)
    arrow(axis, (7.65, y), (9.2, y), ORANGE)
    box(axis, 10.7, y, 3.0, 1.5, "image\n(3, H, W)", ORANGE)
    arrow(axis, (12.2, y), (13.6, y), ORANGE)
    box(axis, 16.6, y, 6.0, 1.5, "CLIP or a vision-language model\nPickScore 1.0 B, HPSv3 8.3 B parameters", ORANGE)
    arrow(axis, (16.65, y + 1.25), (16.65, y + 0.75), GREY)
    note(axis, 16.65, y + 1.5, "prompt")
    arrow(axis, (19.6, y), (20.5, y), ORANGE)
    box(axis, 21.4, y, 1.8, 1.1, "score\n(scalar)", ORANGE)


def draw() -> Figure:
    figure = Figure(figsize=(12.4, 4.95))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 22.8), ylim=(0, 9.1))
    axis.axis("off")
    latent, middle, pixel = 5.95, 4.0, 2.0
    box(axis, 1.8, middle, 2.7, 1.5, "clean latent $x_0$\n(16, H/8, W/8)", GREY)
    note(axis, 1.8, middle - 1.3, "sampled by the policy,\nor an encoded image")
    arrow(axis, (3.15, middle + 0.4), (4.15, latent), GREEN)
    arrow(axis, (3.15, middle - 0.4), (4.15, pixel), ORANGE)
    latent_lane(axis, latent)
    pixel_lane(axis, pixel)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=Path("runs/method.png"), help="image file to write")
    path = parser.parse_args().path
    save_figure(draw(), path, dpi=130)
    print(path)
