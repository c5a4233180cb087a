"""The comparison page that `recipes/compare_runs.py` writes: an HTML file with embedded images, and a Markdown file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from dinalrm_align.eval.config import CompareRun
from dinalrm_align.eval.report import figures
from dinalrm_align.eval.report.entries import Entry, difference, phases_of, read_entries, series
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.report.parts import PREFIX, part_names
from dinalrm_align.train.files import make_folder, write_atomically

LARGEST = 256  # pixels of the longer side of an image in the grid; larger images are downscaled
HEADINGS = {
    "gold": "Gold score", "proxy": "Training reward", "kl": "KL in training", "drift": "Drift",
    "level_spread": "Disagreement of noise levels", "divergence": "Divergence of reward and gold",
    "seconds": "Seconds by phase", "memory_mib": "Peak memory by phase", "costs": "Cost of an update by phase",
}  # fmt: skip
HOW_TO_READ = (
    "Gold gain: the held-out score that no run trains on, over the base model, paired on {samples} samples of "
    "{captions} captions with the same noise in every run. Brackets and bands are 95 % intervals, over captions for "
    "one run, over seeds and captions for several; the interval of one run does not cover other seeds. The best "
    "evaluation was chosen on these same samples, which biases it upwards. Reward gains are in standard deviations "
    "of the base model's samples, because rewards differ in scale; those of gold and of its parts are in their own "
    "units. Each recipe defines KL in training; drift is defined the same way for all. Seconds exclude evaluations "
    "and are medians; FLOPs are means of the profiled updates (two per multiply-accumulate; matrix products, "
    "convolutions and attention, including recomputation); memory is the maximum. A cross marks the first hacking "
    "alarm of a run."
)
ABOUT_IMAGES = (
    "The same prompts and the same noise, before training and after each run's last evaluation; below each image its "
    "gold score."
)
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
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


@dataclass(frozen=True)
class Table:
    """A table of text cells. The first cell of a row is the row's name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        return f"**{self.title}**\n\n{table(self.head, self.rows)}"


def tables_of(entries: Sequence[Entry]) -> list[Table]:
    comparable = [entry for entry in entries if not entry.incomparable]
    found = run_table(entries), seed_table(comparable), part_table(comparable), difference_table(comparable)
    return [one for one in (*found, cost_table(entries)) if one.rows]


def run_table(entries: Sequence[Entry]) -> Table:
    """Return a table of every run's gains (with 95 % confidence intervals over captions), cost and hacking alarm."""
    singles = [single for entry in entries for single in entry.single_runs()]
    drifts = any("drift" in row for single in singles for row in single.runs[0].rows)
    head = ["run", "updates", "gold gain, last [95 %]", "gold gain, best (update)", "reward gain, s.d."]
    head += [*(["drift"] if drifts else []), "s / update", "minutes", "peak MiB", "hacking alarm"]
    rows = []
    for single in singles:
        (run,) = single.runs
        gains = ["not comparable"] * 3
        if not single.incomparable:
            last, best = single.steps[-1], single.best_step
            gains = [single.gain(*at).brief for at in (("gold", last), ("gold", best), ("proxy", last))]
            gains[1] += f" ({best})"
        drift, seconds, peaks = series(run.rows, "drift")[1], run.seconds(), single.cost("memory_mib").values()
        watched = any("hacking" in row for row in run.rows)
        rows.append([
            single.name, str(len(seconds)), *gains, *([f"{drift[-1]:.3g}" if drift else ""] if drifts else []),
            f"{np.median(seconds):.2f}" if len(seconds) else "", f"{seconds.sum() / 60:.1f}",
            f"{max(peaks):.0f}" if peaks else "",
            "not watched" if not watched else "none" if run.alarm is None else f"update {run.alarm}",
        ])  # fmt: skip
    return Table("Final numbers of every run", head, rows)


def seed_table(entries: Sequence[Entry]) -> Table:
    """Return a table of the entries with several runs: gains averaged over seeds, with 95 % confidence intervals."""
    rows = []
    for entry in entries:
        last, best = entry.steps[-1], entry.best_step
        if len(entry.runs) > 1:
            rows.append([
                entry.name, str(len(entry.runs)), str(last), entry.gain("gold", last).brief,
                f"{entry.gain('gold', best).brief} ({best})", entry.gain("proxy", last).brief,
            ])  # fmt: skip
    head = ["runs", "seeds", "update", "gold gain [95 %]", "gold gain, best (update)", "reward gain, s.d. [95 %]"]
    return Table("Means over seeds", head, rows)


def part_table(entries: Sequence[Entry]) -> Table:
    """Return a table of the last gains of gold and of its parts, with 95 % confidence intervals, by entry."""
    parts = part_names(name for entry in entries for name in entry.runs[0].scores[0] if entry.has(name))
    rows = []
    for name in ["gold", *(f"{PREFIX}{part}" for part in parts)] if parts else []:
        gains = [one.gain(name, one.steps[-1]).brief if one.has(name) else "" for one in entries]
        rows.append([name.removeprefix(PREFIX), *gains])
    head = ["", *(f"{entry.legend}, update {entry.steps[-1]}" for entry in entries)]
    return Table("Gains of gold and of its parts [95 %]", head, rows)


def difference_table(entries: Sequence[Entry]) -> Table:
    """Return a table of paired differences in gold gain between every two entries that have a seed in common."""
    rows = []
    for first, second in combinations(entries, 2):
        common = max(set(first.steps) & set(second.steps))
        at_steps = {f"update {common}": (common, common), "best of each": (first.best_step, second.best_step)}
        for at, steps in at_steps.items():
            found = difference(first, second, steps) if max(steps) > 0 else None
            if found is not None:
                rows.append([f"{first.name} less {second.name}", at, str(found.seeds), found.brief])
    return Table("Paired differences of gold gain", ["", "at", "seeds", "mean [95 %]"], rows)


def cost_table(entries: Sequence[Entry]) -> Table:
    """Return a table of the average cost of an update, by entry and phase."""
    rows = []
    for kind, unit in figures.COSTS.items():
        title = unit if kind == "memory_mib" else f"{unit} of an update"
        costs = [entry.cost(kind) for entry in entries]
        phases = phases_of([run for entry in entries for run in entry.runs], kind)
        for phase in phases:
            rows.append([f"{title}: {phase}", *(f"{cost[phase]:.4g}" if phase in cost else "" for cost in costs)])
        if phases and kind == "gflops":
            rows.append([f"{title}: all phases", *(f"{sum(cost.values()):.4g}" if cost else "" for cost in costs)])
    return Table("Cost by phase", ["", *(entry.name for entry in entries)], rows)


def write(config: CompareRun) -> tuple[Path, list[str]]:
    """Write the comparison page (index.html, compare.md and PNG files) to `config.output_dir`. Returns the path of
    index.html, and notes about runs that are skipped or not comparable.
    """
    groups = {name: [Path(folder) for folder in runs] for name, runs in config.group.items()}
    entries, notes = read_entries([Path(folder) for folder in config.runs], groups)
    folder, title, tables = Path(config.output_dir), config.title, tables_of(entries)
    make_folder(folder)
    prompts, columns = figures.images_of(entries, config.shown)
    figures.draw_images(prompts, columns, folder / "images.png")
    evaluated = entries[0].runs[0].terms["prompts"]
    how_to_read = HOW_TO_READ.format(samples=len(evaluated), captions=len(set(evaluated)))
    text = [f"# {title}", *notes, *(one.markdown() for one in tables), how_to_read]
    html = [f"<h1>{escape(title)}</h1>", '<ul class="key">']
    for entry in entries:
        seeds = ", ".join(str(run.seed) for run in entry.runs)
        html.append(f'<li><span style="background:{entry.colour}"></span>{escape(entry.name)}: seed {seeds}</li>')
    html += ["</ul>", *(f'<p class="note">{escape(note)}</p>' for note in notes)]
    html += [*map(_html_table, tables), f"<p>{how_to_read}</p>"]
    for name, files in figures.draw(entries, folder).items():
        heading = HEADINGS.get(name) or f"Second evaluator: {name.removeprefix('gold/')}"
        against = {clock: f"against {figures.CLOCKS[clock]}" if clock else "" for clock in files}
        links = [f"![{against[clock] or 'bars'}]({path.name})" for clock, path in files.items()]
        text += [f"## {heading}", "\n".join(links)]
        html += [f"<h2>{escape(heading)}</h2>", '<div class="figures">']
        for clock, path in files.items():
            alt = escape(f"{heading} {against[clock]}")
            html.append(f'<figure><img src="{_data(path.read_bytes())}" alt="{alt}"></figure>')
        html.append("</div>")
    text += ["## Images", "![same prompts and noise](images.png)"]
    rows = [[prompt] for prompt in prompts]
    for name, strip, gold in columns:
        for row, pixels, score in zip(rows, strip, gold):
            row.append(f"{_image(pixels, f'{row[0]}; {name}')}{score:.2f}")
    grid = Table("", ["prompt", *(name for name, *_ in columns)], rows)
    html += ["<h2>Images</h2>", f"<p>{ABOUT_IMAGES}</p>", _html_table(grid, "grid")]
    write_atomically(folder / "compare.md", "\n\n".join(text) + "\n")
    page = folder / "index.html"
    write_atomically(page, PAGE.format(title=escape(title), style=STYLE, body="\n".join(html)))
    return page, notes


def _html_table(shown: Table, kind: str = "") -> str:
    """Return a table in HTML. All cells are escaped, or only the header and the first column if `kind` is "grid"."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in shown.head)
    body = ""
    for name, *cells in shown.rows:
        body += f'<tr><th scope="row">{escape(name)}</th>'
        body += "".join(f"<td>{cell if kind else escape(cell)}</td>" for cell in cells) + "</tr>"
    caption = f"<caption>{escape(shown.title)}</caption>" if shown.title else ""
    start = f'<div class="scroll"><table class="{kind}">{caption}<thead><tr>{head}</tr></thead>'
    return f"{start}<tbody>{body}</tbody></table></div>"


def _image(pixels: np.ndarray, alt: str) -> str:
    """Return an HTML img element with the image embedded, downscaled until both sides are at most LARGEST pixels."""
    image = Image.fromarray(pixels)
    kind = ' class="small"' if max(image.size) <= 128 else ""
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f'<img{kind} src="{_data(buffer.getvalue())}" alt="{escape(alt)}">'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
