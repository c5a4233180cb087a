"""Kill recipes at random moments, resume them, and compare the results bit for bit with uninterrupted runs.

    python tests/kill_harness.py --kills 120 --seed 0 --report kill_report.json

Half of the kills come at a random time. The others come at an operation on a file of the run, half of these while a
checkpoint is saved: before the operation, or in the middle of a write, which leaves a torn file. A killed run is
resumed if it has a checkpoint, else started again, until it ends; then its weights, averages, optimiser state, RNG
states, metrics, evaluations and exports must equal those of the uninterrupted run.

Every attempt is a fork of this process, which has imported everything and computed nothing, so that Python is started
once. Figures are replaced by stand-ins, since drawing takes most of the time.

The exit status is 1 if a run was lost (it had a checkpoint and cannot be resumed, or hung for two minutes) or its
result differs.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import collections
import importlib
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

from kill_points import PHASES, Board, watch_files, watch_phases
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from same_run import differences
from tiny_recipes import Recipe, make_world, recipes, stand_in, step_of
from tqdm import tqdm

from dinalrm_align.train.checkpoints import latest_checkpoint

READ_LATER = ("dinalrm_align.align.evaluation", "dinalrm_align.align.refl",
              "dinalrm_align.eval.accuracy", "dinalrm_align.data.source", "dinalrm_align.reward.pixel.clip",
              "dinalrm_align.reward.training", "dinalrm_align.reward.latent",
              "dinalrm_align.shapes.oracle")  # fmt: skip
"""Modules that the recipes import when they run, imported once for all attempts."""
KILLED, HUNG = -signal.SIGKILL, -signal.SIGALRM
PATIENCE = 120
"""Seconds after which an attempt, which takes a second or two, is considered hung."""


@dataclass
class Case:
    """A recipe and its uninterrupted run: folder, seconds, operations on files (all, while saving)."""

    recipe: Recipe
    reference: Path
    seconds: float
    operations: tuple[int, int]


@dataclass
class Report:
    """Counts of kills and results, written as JSON."""

    kills: int = 0
    lost: int = 0
    differing: int = 0
    finished_runs: int = 0
    by_recipe: collections.Counter = field(default_factory=collections.Counter)
    by_cause: collections.Counter = field(default_factory=collections.Counter)
    by_moment: collections.Counter = field(default_factory=collections.Counter)
    by_file_operation: collections.Counter = field(default_factory=collections.Counter)
    problems: list[str] = field(default_factory=list)

    def count(self, recipe: str, board: Board, *, before_first: bool) -> None:
        self.kills += 1
        self.by_recipe[recipe] += 1
        self.by_cause["at a file operation" if board.killed_at else "by the clock"] += 1
        self.by_moment[PHASES[board.phase]] += 1
        self.by_moment["before a first checkpoint"] += before_first
        if board.killed_at:
            self.by_file_operation[board.killed_at] += 1

    def line(self) -> str:
        moments = ", ".join(f"{name} {count}" for name, count in sorted(self.by_moment.items()))
        return (
            f"kills: {self.kills}  lost: {self.lost}  differing: {self.differing}  "
            f"(runs finished: {self.finished_runs}; {moments})"
        )


def fork(call: Callable[[], None], output: Path, *, kill_after: float | None = None) -> int:
    """Run `call` in a fork with output to a file; returns its exit status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            signal.alarm(PATIENCE)
            with open(output, "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            call()
            status = 0
        except SystemExit as ended:
            status = ended.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if kill_after is not None and time.monotonic() - began > kill_after:
            os.kill(child, signal.SIGKILL)
            kill_after = None
        time.sleep(0.002)


def own_bars() -> None:
    """Give each process its own lock on progress bars: a killed fork would hold tqdm's, a shared semaphore, forever."""
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0  # a thread of the parent might hold the lock while it forks


def attempt(recipe: Recipe, run: Path, board: Board, output: Path, kill: dict, kill_after: float | None) -> int:
    """Start the recipe in `run`, or resume what is there; `kill` is for `watch_files`."""
    resume = latest_checkpoint(run) is not None
    arguments = [f"--resume={run}"] if resume else [*recipe.arguments, f"--output_dir={run}"]
    board.clear()

    def call() -> None:
        Figure.savefig = FigureCanvasAgg.print_png = stand_in
        Figure.tight_layout = lambda figure: None
        watch_phases(board)
        watch_files(board, run, **kill)
        recipe.main(arguments)

    return fork(call, output, kill_after=kill_after)


def draw_kill(case: Case, rng: random.Random, number: int) -> tuple[dict, float | None]:
    """Draw kill `number`: arguments of `watch_files`, and seconds. Kills alternate between a time and an operation."""
    if number % 2 == 0:
        return {}, rng.uniform(0, case.seconds)
    saving = number % 4 == 3
    return {"at": rng.randrange(case.operations[saving]), "saving": saving, "torn": rng.random() < 0.5}, None


def live(case: Case, run: Path, board: Board, output: Path, rng: random.Random, report: Report, bar: tqdm) -> str:
    """One run, killed and resumed until it ends or all kills are done; returns why it was lost, or an empty text."""
    reached, status = -1, KILLED
    while status == KILLED:
        more = report.kills < bar.total or case.recipe.name not in report.by_recipe
        kill, seconds = draw_kill(case, rng, report.kills) if more else ({}, None)
        status = attempt(case.recipe, run, board, output, kill, seconds)
        step = step_of(latest_checkpoint(run))
        if step < reached:
            return f"had reached update {reached}, now has {step}; killed {board.killed_at or 'at a random time'}"
        if status == KILLED:
            bar.update()
            report.count(case.recipe.name, board, before_first=step < 0)
        reached = step
    if status == HUNG:
        return f"hung for {PATIENCE} s after update {reached}"
    return f"ended with status {status}: {' | '.join(output.read_text().splitlines()[-3:])}" if status else ""


def uninterrupted(recipe: Recipe, run: Path, board: Board, output: Path) -> Case:
    """Run a recipe to its end without a kill."""
    began = time.monotonic()
    if attempt(recipe, run, board, output, {}, None):
        sys.exit(output.read_text())
    reference = run.with_name(f"{recipe.name}_uninterrupted")
    run.rename(reference)
    return Case(recipe, reference, time.monotonic() - began, board.operations)


def kill_and_compare(work: Path, kills: int, seed: int) -> Report:
    """Run all kills in the folder `work`."""
    board, report, rng = Board(), Report(), random.Random(seed)
    world, output, run = work / "world", work / "output.txt", work / "run"
    if fork(lambda: make_world(world), output):
        sys.exit(output.read_text())
    cases = [uninterrupted(recipe, run, board, output) for recipe in recipes(world)]
    with tqdm(total=kills, desc="kills", unit="") as bar:
        for case in itertools.cycle(cases):
            if report.kills >= kills and len(report.by_recipe) == len(cases):
                return report
            output.write_text("")
            why = live(case, run, board, output, rng, report, bar)
            found = [] if why else differences(case.reference, run)
            report.finished_runs += not why
            report.lost += bool(why)
            report.differing += bool(found)
            report.problems += [f"{case.recipe.name}: {problem}" for problem in ([why] if why else found)]
            shutil.rmtree(run, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="every run is then ended and compared")
    parser.add_argument("--seed", type=int, default=0, help="of when and where")
    parser.add_argument("--report", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    own_bars()
    for name in READ_LATER:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as work:
        report = kill_and_compare(Path(work).resolve(), options.kills, options.seed)
    print(*report.problems, report.line(), sep="\n")
    if options.report:
        command = f"python tests/kill_harness.py --kills {options.kills} --seed {options.seed}"
        options.report.write_text(json.dumps({"command": command, **vars(report)}, indent=1, sort_keys=True) + "\n")
    return 1 if report.lost or report.differing else 0


if __name__ == "__main__":
    sys.exit(main())
