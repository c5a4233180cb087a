"""Settings of `recipes/compare_runs.py`. Torch-free."""

from dataclasses import dataclass, field

from dinalrm_align.train.settings import PositiveInt, check_fields


@dataclass
class CompareRun:
    """Settings of `python recipes/compare_runs.py`.

    Args:
        runs: folders of runs, of any recipes and rewards; runs that differ only in their seed form one entry. The
            first run's evaluation settings are the reference.
        group: name -> folders of runs with different seeds, compared as one entry. On the command line:
            --group NAME RUN [RUN ...], once per name.
        output_dir: receives index.html (self-contained), compare.md and the figures.
        shown: prompts in the grid of images, at most as many as the runs stored.
        title: of the page.
    """

    runs: list[str] = field(default_factory=list)
    group: dict[str, list[str]] = field(default_factory=dict)
    output_dir: str = "runs/compare"
    shown: PositiveInt = 8
    title: str = "Runs side by side"

    def __post_init__(self) -> None:
        check_fields(self)
        for name, runs in self.group.items():
            if not runs:
                raise ValueError(f"group.{name}: got no run; expected the folder of at least one run")
        if not self.runs and not self.group:
            raise ValueError("runs: got none; expected the folder of at least one run")
