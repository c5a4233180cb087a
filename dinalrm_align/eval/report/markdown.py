"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(
    header: Sequence[object], rows: Iterable[Sequence[object]], align: str | None = None, *, padded: bool = False
) -> str:
    """Return a Markdown table. Raises ValueError if a row or `align` differs from the header in length.

    `align`: one letter per column, "l" or "r". By default, the first column is left-aligned and all others
    right-aligned. `padded`: whether to pad cells to the width of their column, for reading in a terminal.
    """
    align = "l" + "r" * (len(header) - 1) if align is None else align
    lines = [[str(cell).replace("|", r"\|") for cell in row] for row in (header, *rows)]
    widths = [max(4, *map(len, column)) if padded else 4 for column in zip(*lines, align, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" * (side == "r") for width, side in zip(widths, align)])
    if padded:
        justify = {"l": str.ljust, "r": str.rjust}
        lines = [[justify[side](cell, width) for cell, width, side in zip(row, widths, align)] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)
