"""Final numbers of runs side by side, as tables of text that a page and a markdown file can hold."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from dinalrm_align.eval.report.entries import Entry
from dinalrm_align.eval.report.groups import Group, difference, series
from dinalrm_align.eval.report.intervals import Interval, seeds_by_captions
from dinalrm_align.eval.report.markdown import table


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        return f"**{self.title}**\n\n{table(self.head, self.rows)}"


def run_table(entries: Sequence[Entry]) -> Table:
    """Final numbers of every run, gains with the 95 % interval over captions."""
    drifts = any("drift" in row for entry in entries for row in entry.run.rows)
    head = ["run", "updates", "gold gain, last [95 %]", "gold gain, best (update)", "reward gain, s.d."]
    head += [*(["drift"] if drifts else []), "s / update", "minutes", "peak MiB", "hacking alarm"]
    rows = []
    for entry in entries:
        last, best = entry.steps[-1], entry.best_step
        gains = ["not comparable"] * 3
        if not entry.apart:
            at_best = f"{brief(entry.gain('gold', best))} ({best})"
            gains = [brief(entry.gain("gold", last)), at_best, brief(entry.gain("proxy", last))]
        drift, peak, seconds = series(entry.run.rows, "drift")[1], entry.peak(), entry.run.seconds()
        alarm = "not watched" if not entry.was_watched else "none" if entry.alarm is None else f"update {entry.alarm}"
        rows.append([
            entry.label, str(len(seconds)), *gains, *([f"{drift[-1]:.3g}" if drift else ""] if drifts else []),
            f"{np.median(seconds):.2f}" if len(seconds) else "", f"{seconds.sum() / 60:.1f}",
            "" if peak is None else f"{peak:.0f}", alarm,
        ])  # fmt: skip
    return Table("Final numbers of every run", head, rows)


def seed_table(groups: Sequence[Group]) -> Table | None:
    """Means over seeds with the 95 % interval over seeds and captions; None where no group has two."""
    found = [group for group in groups if len(group.runs) > 1]
    rows = [
        [group.label, str(len(group.runs)), str(group.steps[-1]), *(
            brief(seeds_by_captions(group.gains(name, group.steps[-1]))) for name in ("gold", "proxy")
        )]
        for group in found
    ]  # fmt: skip
    head = ["runs", "seeds", "update", "gold gain [95 %]", "reward gain, s.d. [95 %]"]
    return Table("Means over seeds", head, rows) if found else None


def difference_table(groups: Sequence[Group]) -> Table | None:
    """Gold gain of one kind of run less another's, paired by seed and caption; None where no two share a seed."""
    rows = []
    for first, second in combinations(groups, 2):
        common = max(set(first.steps) & set(second.steps))
        for at, steps in (
            (f"update {common}", (common, common)),
            ("best of each", (first.best_step, second.best_step)),
        ):
            found = difference(first, second, steps) if max(steps) > 0 else None
            if found is not None:
                rows.append([f"{first.label} less {second.label}", at, str(found.seeds), brief(found)])
    return Table("Paired differences of gold gain", ["", "at", "seeds", "mean [95 %]"], rows) if rows else None


def brief(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
