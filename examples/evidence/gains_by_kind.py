"""Gains of runs in the embedded world by the kind of caption: one object, a pair, or several identical objects.

    python examples/evidence/gains_by_kind.py runs/refl_shapes_dinalrm_seed0 [RUN ...]
    python examples/evidence/gains_by_kind.py --group latent RUN [RUN ...] --group pixel RUN [RUN ...]

Prints the base model's gold, and at the last update the gains in gold and all its parts, and gold of the first entry
less that of every other. Runs that differ only in their seed are one entry, as in recipes/compare_runs.py, and so is a
group. Intervals are 95 %, over seeds and captions of the kind.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from _curves import KINDS, by_kind, kind_of, kind_table, names_of, paired, smallest_effect

from dinalrm_align.eval.report.entries import Entry, read_entries
from dinalrm_align.eval.report.intervals import seeds_by_captions
from dinalrm_align.eval.report.markdown import table


def base_line(entry: Entry) -> str:
    """Return the base model's gold by kind, in a sentence."""
    run = entry.runs[0]
    kinds = [kind_of(caption) for caption in run.terms["prompts"]]
    levels = [(kind, run.scores[0]["gold"][[one == kind for one in kinds]]) for kind in KINDS if kind in kinds]
    return "Gold of the base model: " + ", ".join(f"{kind} {gold.mean():.3f}" for kind, gold in levels) + "."


def difference_table(first: Entry, others: Sequence[Entry]) -> str:
    """Return a table of gold of the first entry less that of each other, paired by seed and caption, by kind."""
    rows = []
    for other in others:
        last = min(first.steps[-1], other.steps[-1])
        tables = paired(first, other, lambda run, last=last: run.gain("gold", last))
        for kind, own in by_kind(first).items():
            found = seeds_by_captions((tables[0] - tables[1])[:, own])
            rows.append([f"{first.name} less {other.name}", kind, found.brief, smallest_effect(found)])
    return table(["gold", "kind", "difference [95 %]", "smallest effect"], rows) if rows else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--group", nargs="+", action="append", default=[], metavar=("NAME", "RUN"))
    given = parser.parse_args(argv)
    groups = {name: [Path(folder) for folder in folders] for name, *folders in given.group}
    entries, notes = read_entries(given.runs, groups)
    if any(entry.incomparable for entry in entries):
        parser.error(f"expected runs with the same evaluation: {' '.join(notes)}")
    text = [base_line(entries[0]), kind_table(entries, names_of(entries)), difference_table(entries[0], entries[1:])]
    print("\n\n".join(filter(None, [*notes, *text])))


if __name__ == "__main__":
    main()
