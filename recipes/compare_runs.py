"""Compare alignment runs on one page: held-out gains with intervals, cost, and hacking alarms.

    python recipes/compare_runs.py runs/*
    python recipes/compare_runs.py runs/refl_* runs/grpo_* --output_dir runs/compare --shown 6
    python recipes/compare_runs.py --group latent runs/*dinalrm_seed* --group pixel runs/*pixel_seed*

Writes index.html (self-contained), compare.md and the PNGs of both: held-out gold score and reward against updates,
time and FLOPs; KL, seconds and peak memory by phase; images on the same prompts and noise; final numbers with 95 %
intervals. Runs may come from any recipe, reward and seed, and may still be training.

Runs that differ only in their seed form one entry; --group NAME RUN [RUN ...] names an entry and its runs. Gains are
compared between runs evaluated with the same model, prompts and noise as the first run. Of other runs only cost and KL
are shown, with a note; folders without a run are skipped with a note.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.eval.report.config import CompareRun
from dinalrm_align.train.command import parse, refuse, refusing


def read_groups(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Split `--group NAME RUN [RUN ...]` from the other words of the command line."""
    rest, groups, current = [], {}, None
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if word == "--group":
            name = pending.pop(0) if pending else ""
            if name in groups or not name or name.startswith("--"):
                refuse(f"--group: got {name!r}; expected a name, each once, and the folders of its runs")
            current = groups.setdefault(name, [])
        elif current is None or word.startswith("--"):
            rest.append(word)
            current = None
        else:
            current.append(word)
    return rest, groups


def main(argv: Sequence[str] | None = None) -> None:
    words, groups = read_groups(sys.argv[1:] if argv is None else argv)
    words += [f"--group={json.dumps(groups)}"] if groups else []
    config, _ = parse(CompareRun, __doc__, words, positional="runs")  # --help ends here
    from dinalrm_align.eval.report.page import write

    with refusing():
        page, notes = write(
            [Path(folder) for folder in config.runs],
            {name: [Path(folder) for folder in runs] for name, runs in config.group.items()},
            Path(config.output_dir),
            shown=config.shown,
            title=config.title,
        )
    for note in notes:
        print(note)
    print(f"{page}\n{page.with_name('compare.md')}")


if __name__ == "__main__":
    main()
