"""Any number of runs on one page: which reward aligned faster, at what cost, and whether it was hacked.

    python recipes/compare_runs.py runs/*
    python recipes/compare_runs.py runs/refl_* runs/grpo_* --output_dir runs/compare --shown 6

Writes index.html, one file that needs nothing beside it, compare.md, and the PNGs of both: held-out gold score and
reward, KL, seconds and peak memory by phase, each against updates and against time; the same prompts from the same
noise side by side; final numbers with 95 % intervals. Runs may be of any recipe, reward and seed, and still going on.

Gains are compared between runs that were judged on the same model, prompts and noise as the first one. Of others only
cost and KL are shown, and a sentence says why; folders without a run are left out with a sentence as well.
"""

from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.eval.report.config import CompareRun
from dinalrm_align.train.command import parse, refusing


def main(argv: Sequence[str] | None = None) -> None:
    config, _ = parse(CompareRun, __doc__, argv, positional="runs")  # --help ends here
    from dinalrm_align.eval.report.page import write

    with refusing():
        page, notes = write(
            [Path(folder) for folder in config.runs], Path(config.output_dir), shown=config.shown, title=config.title
        )
    for note in notes:
        print(note)
    print(f"{page}\n{page.with_name('compare.md')}")


if __name__ == "__main__":
    main()
