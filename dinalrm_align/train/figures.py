"""Atomic writing of matplotlib figures."""

from pathlib import Path

from matplotlib.figure import Figure

from dinalrm_align.train.durable import atomically


def save_figure(figure: Figure, path: Path, *, dpi: int = 110) -> None:
    """Write a PNG; parent folders are created."""
    with atomically(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
