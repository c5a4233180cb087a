"""The page of `recipes/compare_runs.py`: one HTML file that needs nothing beside it, and the same as markdown.

No script and no outside resource; pictures are PNG data inside the file. Figures stand beside each other where there is
room and below each other where there is not; wide tables scroll in themselves.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from dinalrm_align.eval.report import figures
from dinalrm_align.eval.report.entries import Entry, groups_of, read_entries
from dinalrm_align.eval.report.tables import Table, difference_table, run_table, seed_table
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.files import make_folder

LARGEST = 256
"""Pixels of the longer side of a picture in the grid; larger ones are made smaller."""
HEADINGS = {
    "gold": "Gold score", "proxy": "The reward that is climbed", "kl": "KL in training", "drift": "Drift",
    "level_spread": "Disagreement of noise levels", "divergence": "Divergence of reward and gold",
    "seconds": "Seconds by phase", "memory_mib": "Peak memory by phase",
}  # fmt: skip
HOW_TO_READ = (
    "Gold gain: of the held-out score that no run trains on, over the base model, paired on the same captions and "
    "noise in every run. In brackets and as bands: 95 % intervals, over captions for one run, over seeds and captions "
    "for several; of one run they say nothing of other seeds. The best evaluation was chosen on these same samples, "
    "which flatters it. Reward gains are in standard deviations of the base model's samples, since rewards have "
    "scales of their own. KL in training means what each recipe takes it to mean; drift is the same for all. Seconds "
    "of training leave evaluations out. A cross marks the first alarm of the hacking watch."
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


def write(folders: Sequence[Path], output_dir: Path, *, shown: int, title: str) -> tuple[Path, list[str]]:
    """index.html, compare.md and their PNGs in `output_dir`; returns the page and what is not compared, in sentences.

    ValueError when no folder holds a run.
    """
    entries, notes = read_entries(folders)
    make_folder(output_dir)
    groups = groups_of(entries)
    found = run_table(entries), seed_table(groups), difference_table(groups)
    tables = [table for table in found if table is not None]
    drawn = figures.draw(entries, output_dir)
    prompts, columns = figures.pictures(entries, shown)
    figures.draw_pictures(prompts, columns, output_dir / "pictures.png")
    write_atomically(output_dir / "compare.md", _markdown(title, notes, tables, drawn))
    page = output_dir / "index.html"
    write_atomically(page, _html(title, entries, notes, tables, drawn, _grid(prompts, columns)))
    return page, notes


def _markdown(title: str, notes: Sequence[str], tables: Sequence[Table], drawn: dict[str, dict[str, Path]]) -> str:
    parts = [f"# {title}", *notes, *(table.markdown() for table in tables), HOW_TO_READ]
    for name, files in drawn.items():
        parts += [
            f"## {_heading(name)}",
            "\n".join(f"![against {clock}]({path.name})" for clock, path in files.items()),
        ]
    return "\n\n".join([*parts, "## Pictures", "![same prompts and noise](pictures.png)"]) + "\n"


def _html(
    title: str, entries: Sequence[Entry], notes: Sequence[str], tables: Sequence[Table],
    drawn: dict[str, dict[str, Path]], grid: str,
) -> str:  # fmt: skip
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.group, []).append(entry)
    key = "".join(
        f'<li><span style="background:{members[0].colour}"></span>{escape(group)}: seed '
        f"{', '.join(str(entry.run.seed) for entry in members)}</li>"
        for group, members in groups.items()
    )
    sections = []
    for name, files in drawn.items():
        heading = escape(_heading(name))
        images = "".join(
            f'<figure><img src="{_data(path.read_bytes())}" alt="{heading} against {figures.CLOCKS[clock]}"></figure>'
            for clock, path in files.items()
        )
        sections.append(f'<h2>{heading}</h2>\n<div class="figures">{images}</div>')
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<ul class="key">{key}</ul>',
        *(f'<p class="note">{escape(note)}</p>' for note in notes),
        *(_table(table) for table in tables),
        f"<p>{HOW_TO_READ}</p>",
        *sections,
        "<h2>Pictures</h2>",
        "<p>The same prompts and the same noise, before training and after each run's last update; below each picture "
        "its gold score.</p>",
        grid,
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _heading(name: str) -> str:
    return HEADINGS.get(name) or f"Another judge: {name.removeprefix('gold/')}"


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
            f"<td>{_picture(strip[index], f'{prompt}; {title}')}{gold[index]:.2f}</td>"
            for title, strip, gold in columns
        )
        rows.append(f'<tr><th scope="row">{escape(prompt)}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="grid"><thead><tr><th scope="col">prompt</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _picture(pixels: np.ndarray, alt: str) -> str:
    """(H, W, 3) uint8 -> an img with the picture in it, no larger than LARGEST."""
    image = Image.fromarray(pixels)
    kind = ' class="small"' if max(image.size) <= 128 else ""
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f'<img{kind} src="{_data(buffer.getvalue())}" alt="{escape(alt)}">'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
