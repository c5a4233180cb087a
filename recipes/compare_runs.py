"""Compare alignment runs on one page: gains on held-out prompts, cost, and warnings of reward hacking.

    python recipes/compare_runs.py runs/*
    python recipes/compare_runs.py runs/refl_* runs/grpo_* --output_dir runs/compare --shown 6
    python recipes/compare_runs.py --group latent runs/*dinalrm_seed* --group pixel runs/*pixel_seed*

Writes index.html (self-contained), compare.md and PNG figures. Curves over updates, time and FLOPs show
the gold score (the evaluation reward) and the training reward on held-out prompts. The page also shows the KL, the time
and memory of each phase, sample images, and final numbers with 95 % intervals. Unfinished runs can be compared, too.

Runs that differ only in their seed are averaged; --group NAME RUN [RUN ...] averages the given runs under a name. Gains
are shown for runs that were evaluated with the same model, prompts, noise and sampler as the first run. For a run
with a different evaluation, only cost and KL are shown, with a note. Folders without a run are skipped with a note.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from dinalrm_align.eval.config import CompareRun
from dinalrm_align.train.command import parse, refuse, refusing


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--group", nargs="*", action="append", default=[])
    found, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    groups = {}
    for name, *runs in (group or [""] for group in found.group):
        if name in groups or not name:
            refuse(f"--group: got {name!r}; expected a name, each once, and the folders of its runs")
        groups[name] = runs
    words += [f"--group={json.dumps(groups)}"] if groups else []
    config, _ = parse(CompareRun, __doc__, words, positional="runs")  # --help ends here
    from dinalrm_align.eval.report.page import write

    with refusing():
        page, notes = write(config)
    print(*notes, page, page.with_name("compare.md"), sep="\n")


if __name__ == "__main__":
    main()
