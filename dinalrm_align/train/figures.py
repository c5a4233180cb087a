"""Writing a matplotlib figure so that a picture is whole or is not there."""

import os
from pathlib import Path

from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path, *, dpi: int = 110) -> None:
    """Write a PNG under a temporary name and rename it; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing_{path.name}")
    figure.savefig(temporary, dpi=dpi)
    os.replace(temporary, path)
