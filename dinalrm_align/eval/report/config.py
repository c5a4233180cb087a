"""Settings of putting runs side by side, `recipes/compare_runs.py`. Torch-free."""

from dataclasses import dataclass

from dinalrm_align.train.settings import check_fields, check_integer


@dataclass
class CompareRun:
    """Everything `python recipes/compare_runs.py` can be told.

    Args:
        runs: folders of runs, of any recipes and rewards; the first one's held-out prompts and noise are the terms.
        output_dir: gets index.html, which needs nothing beside it, compare.md and its pictures.
        shown: prompts in the grid of pictures, at most as many as the runs kept.
        title: of the page.
    """

    runs: list[str]
    output_dir: str = "runs/compare"
    shown: int = 8
    title: str = "Runs side by side"

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("shown", self.shown, low=1)
        if not self.runs:
            raise ValueError("runs: got none; give the folders of one run or more")
