"""The page of `recipes/compare_runs.py`: one self-contained HTML file, and the same as Markdown.

The page has no script and loads no resource; images are embedded PNGs. Figures stand side by side where there is room,
wide tables scroll.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from dinalrm_align.eval.report import figures
from dinalrm_align.eval.report.entries import Entry, read_entries
from dinalrm_align.eval.report.tables import Table, tables_of
from dinalrm_align.train.files import make_folder, write_atomically

LARGEST = 256
"""Pixels of the longer side of an image in the grid; larger images are downscaled."""
HEADINGS = {
    "gold": "Gold score", "proxy": "Training reward", "kl": "KL in training", "drift": "Drift",
    "level_spread": "Disagreement of noise levels", "divergence": "Divergence of reward and gold",
    "seconds": "Seconds by phase", "memory_mib": "Peak memory by phase", "costs": "Cost of an update by phase",
}  # fmt: skip
HOW_TO_READ = (
    "Gold gain: the held-out score that no run trains on, over the base model, paired on {samples} samples of "
    "{captions} captions with the same noise in every run. Brackets and bands are 95 % intervals, over captions for "
    "one run, over seeds and captions for several; the interval of one run does not cover other seeds. The best "
    "evaluation was chosen on these same samples, which biases it upwards. Reward gains are in standard deviations of "
    "the base model's samples, because rewards differ in scale. Each recipe defines KL in training; drift is defined "
    "the same way for all. Seconds exclude evaluations and are medians; FLOPs are means of the profiled updates (two "
    "per multiply-accumulate; matrix products, convolutions and attention, including recomputation); memory is the "
    "maximum. A cross marks the first hacking alarm of a run."
)
STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem clamp(.75rem, 3vw, 2.5rem) 3rem; background: #fff;
  color: #1b1b1b; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
p { max-width: 80ch; }
.note { border-left: 4px solid #d55e00; padding: .25rem .75rem; background: #fdf3ec; overflow-wrap: anywhere; }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; list-style: none; padding: 0; margin: 0 0 1rem; }
.key span { display: inline-block; width: 1.6em; height: .3em; margin-right: .5em; vertical-align: middle; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; border: 1px solid #eee; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .875rem; }
caption { text-align: left; font-weight: 600; padding: .5rem 0 .25rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff; white-space: normal; min-width: 8rem; }
tbody th { font-weight: 500; }
.grid td, .grid thead th { text-align: center; padding: .2rem; }
.grid img { display: block; width: clamp(72px, 11vw, 160px); height: auto; margin: 0 auto; }
.grid img.small { image-rendering: pixelated; }
.grid tbody th { width: 12rem; font-size: .8rem; }
"""


def write(
    folders: Sequence[Path], groups: Mapping[str, Sequence[Path]], output_dir: Path, *, shown: int, title: str
) -> tuple[Path, list[str]]:
    """Write index.html, compare.md and their PNGs to `output_dir`; see `read_entries` for `folders` and `groups`.

    Returns the page and notes about runs that are skipped or not comparable.
    """
    entries, notes = read_entries(folders, groups)
    make_folder(output_dir)
    tables = tables_of(entries)
    drawn = figures.draw(entries, output_dir)
    prompts, columns = figures.images_of(entries, shown)
    figures.draw_images(prompts, columns, output_dir / "pictures.png")
    evaluated = entries[0].runs[0].terms["prompts"]
    how_to_read = HOW_TO_READ.format(samples=len(evaluated), captions=len(set(evaluated)))
    write_atomically(output_dir / "compare.md", _markdown(title, notes, tables, how_to_read, drawn))
    page, grid = output_dir / "index.html", _grid(prompts, columns)
    write_atomically(page, _html(title, entries, notes, tables, how_to_read, drawn, grid))
    return page, notes


def _markdown(title: str, notes: Sequence[str], tables: Sequence[Table], how_to_read: str, drawn: figures.Drawn) -> str:
    parts = [f"# {title}", *notes, *(table.markdown() for table in tables), how_to_read]
    for name, files in drawn.items():
        images = [f"![{_against(clock) or 'bars'}]({path.name})" for clock, path in files.items()]
        parts += [f"## {_heading(name)}", "\n".join(images)]
    return "\n\n".join([*parts, "## Images", "![same prompts and noise](pictures.png)"]) + "\n"


def _html(
    title: str, entries: Sequence[Entry], notes: Sequence[str], tables: Sequence[Table], how_to_read: str,
    drawn: figures.Drawn, grid: str,
) -> str:  # fmt: skip
    key = "".join(
        f'<li><span style="background:{entry.colour}"></span>{escape(entry.name)}: seed '
        f"{', '.join(str(run.seed) for run in entry.runs)}</li>"
        for entry in entries
    )
    sections = []
    for name, files in drawn.items():
        heading = escape(_heading(name))
        images = "".join(
            f'<figure><img src="{_data(path.read_bytes())}" alt="{heading} {_against(clock)}"></figure>'
            for clock, path in files.items()
        )
        sections.append(f'<h2>{heading}</h2>\n<div class="figures">{images}</div>')
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<ul class="key">{key}</ul>',
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        *(_table(table) for table in tables),
        f"<p>{how_to_read}</p>",
        *sections,
        "<h2>Images</h2>",
        "<p>The same prompts and the same noise, before training and after each run's last evaluation; below each "
        "image its gold score.</p>",
        grid,
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _against(clock: str) -> str:
    return f"against {figures.CLOCKS[clock]}" if clock else ""


def _heading(name: str) -> str:
    return HEADINGS.get(name) or f"Second evaluator: {name.removeprefix('gold/')}"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.head)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in table.rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(table.title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _grid(prompts: Sequence[str], columns: Sequence[tuple[str, np.ndarray, list[float]]]) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title, _, _ in columns)
    rows = []
    for index, prompt in enumerate(prompts):
        cells = "".join(
            f"<td>{_image(strip[index], f'{prompt}; {title}')}{gold[index]:.2f}</td>" for title, strip, gold in columns
        )
        rows.append(f'<tr><th scope="row">{escape(prompt)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="grid"><thead><tr><th scope="col">prompt</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _image(pixels: np.ndarray, alt: str) -> str:
    """(H, W, 3) uint8 -> an img element with embedded pixels, at most LARGEST on a side."""
    image = Image.fromarray(pixels)
    kind = ' class="small"' if max(image.size) <= 128 else ""
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f'<img{kind} src="{_data(buffer.getvalue())}" alt="{escape(alt)}">'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
