"""Tables of a comparison, for a page and for Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dinalrm_align.eval.report.entries import Entry, difference
from dinalrm_align.eval.report.intervals import Interval
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.report.runs import phases_of, series

COSTS = {
    "seconds": "seconds of an update", "gflops": "GFLOPs of an update", "memory_mib": "peak MiB above the weights",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        return f"**{self.title}**\n\n{table(self.head, self.rows)}"


def tables_of(entries: Sequence[Entry]) -> list[Table]:
    """All tables that have rows."""
    comparable = [entry for entry in entries if not entry.incomparable]
    found = run_table(entries), seed_table(comparable), difference_table(comparable), cost_table(entries)
    return [one for one in found if one.rows]


def run_table(entries: Sequence[Entry]) -> Table:
    """Final numbers of every run, gains with the 95 % interval over captions."""
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
            gains = [brief(single.gain(*at)) for at in (("gold", last), ("gold", best), ("proxy", last))]
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
    """Means over seeds with the 95 % interval over seeds and captions, for entries of several runs."""
    rows = []
    for entry in entries:
        last, best = entry.steps[-1], entry.best_step
        if len(entry.runs) > 1:
            rows.append([
                entry.name, str(len(entry.runs)), str(last), brief(entry.gain("gold", last)),
                f"{brief(entry.gain('gold', best))} ({best})", brief(entry.gain("proxy", last)),
            ])  # fmt: skip
    head = ["runs", "seeds", "update", "gold gain [95 %]", "gold gain, best (update)", "reward gain, s.d. [95 %]"]
    return Table("Means over seeds", head, rows)


def difference_table(entries: Sequence[Entry]) -> Table:
    """Differences of gold gain between entries, paired by seed and caption, for entries that share a seed."""
    rows = []
    for first, second in combinations(entries, 2):
        common = max(set(first.steps) & set(second.steps))
        for at, steps in (
            (f"update {common}", (common, common)),
            ("best of each", (first.best_step, second.best_step)),
        ):
            found = difference(first, second, steps) if max(steps) > 0 else None
            if found is not None:
                rows.append([f"{first.name} less {second.name}", at, str(found.seeds), brief(found)])
    return Table("Paired differences of gold gain", ["", "at", "seeds", "mean [95 %]"], rows)


def cost_table(entries: Sequence[Entry]) -> Table:
    """Cost of an update by phase: see `Entry.cost`."""
    rows = []
    for kind, title in COSTS.items():
        costs = [entry.cost(kind) for entry in entries]
        phases = phases_of([run for entry in entries for run in entry.runs], kind)
        for phase in phases:
            rows.append([f"{title}: {phase}", *(f"{cost[phase]:.4g}" if phase in cost else "" for cost in costs)])
        if phases and kind == "gflops":
            rows.append([f"{title}: all phases", *(f"{sum(cost.values()):.4g}" if cost else "" for cost in costs)])
    return Table("Cost by phase", ["", *(entry.name for entry in entries)], rows)


def brief(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
