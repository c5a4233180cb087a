"""Lists of alignment runs for the scripts beside this module: commands, resuming, captions and results.

A `Job` is one run of an alignment recipe with a name and settings. `Runner` starts the jobs of a list as processes, in
OUT/runs/NAME. It skips finished runs, resumes interrupted ones, and reports failed ones and goes on with the list.
OUT/jobs/NAME.json keeps the settings that a run was started with, OUT/logs/NAME.log what it printed.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.eval.report.entries import Entry, read_entries
from dinalrm_align.models.specs import MODELS, resolve_model
from dinalrm_align.shapes.scene import draw_scenes
from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.files import read_json, write_atomically

RECIPES = Path(__file__).parents[2] / "recipes"
PLAIN = MODELS["shapes"].train_prompts.parent
USED = [PLAIN / name for name in ("train.txt", "heldout.txt", "test.txt")]
"""Captions that rewards, base model or settings may have been chosen on, besides those given on the command line."""
TUNING_SEED = 100
"""Training seed of the runs that settings are chosen on."""
REFUSED, INTERRUPTED = 2, 130  # exit statuses: of a recipe for invalid settings, and of a program that is stopped
RESERVED = {"model", "reward", "seed", "output_dir", "resume", "prompts", "eval_prompts"}
"""Settings that the scripts choose; their own options set them."""
ATTEMPTS, ROUND = 1000, 400  # rounds of draws of fresh captions; a round without a new one is the last


@dataclass(frozen=True)
class Job:
    """A run of recipes/METHOD_sd35.py. `name`: of its folder. `options`: its settings by dotted name."""

    name: str
    method: str
    options: Mapping[str, object]

    @property
    def arguments(self) -> list[str]:
        return [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in self.options.items()
        ]

    def command(self, out: Path) -> list[str]:
        """Return the command that starts the run in out/runs/NAME or, if it has a checkpoint, resumes it."""
        folder = out / "runs" / self.name
        resumed = latest_checkpoint(folder) is not None
        options = ["--resume", str(folder)] if resumed else [*self.arguments, f"--output_dir={folder}"]
        return [sys.executable, str(RECIPES / f"{self.method}_sd35.py"), *options]

    def folder(self, out: Path) -> Path:
        return out / "runs" / self.name

    def finished(self, out: Path) -> bool:
        return (self.folder(out) / "summary.json").is_file()

    def check(self, out: Path) -> None:
        """Raise ValueError if OUT holds a run of this name with other settings; else note the settings."""
        path = out / "jobs" / f"{self.name}.json"
        noted = read_json(path) if path.is_file() else {"arguments": self.arguments}
        if noted["arguments"] != self.arguments:
            differ = sorted({*noted["arguments"]} ^ {*self.arguments})
            raise ValueError(
                f"{self.folder(out)}: was started with other settings ({', '.join(differ)[:300]}); expected the same: "
                f"write to another folder, or delete {self.folder(out)} and {path}"
            )
        write_atomically(path, json.dumps(noted))

    def seconds(self, out: Path) -> float | None:
        """Return how long the finished run took, the last process only; None if it is not finished."""
        path = out / "jobs" / f"{self.name}.json"
        return read_json(path).get("seconds") if path.is_file() else None


@dataclass
class Runner:
    """Runs jobs in OUT, `workers` at a time. `total`: jobs of the whole program, for the progress line."""

    out: Path
    total: int
    workers: int = 1
    dry_run: bool = False
    number: int = 0
    failed: list[str] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    processes: set[subprocess.Popen] = field(default_factory=set)
    stopping: bool = False

    def run(self, jobs: Iterable[Job]) -> None:
        """Run the jobs that are not finished. Ctrl-C, SIGTERM and SIGHUP stop all, each with a checkpoint, and exit."""
        jobs = list(jobs)
        if len({job.name for job in jobs}) < len(jobs):
            raise ValueError(f"names of runs: got {[job.name for job in jobs]}; expected each once")
        todo = [job for job in jobs if not job.finished(self.out)]
        if self.dry_run:
            for job in jobs:
                state = "finished" if job not in todo else "to run"
                print(f"# {job.name}: {state}\n{shlex.join(job.command(self.out))}")
            return
        for job in jobs:
            job.check(self.out)
        self.took += [seconds for job in jobs if job not in todo and (seconds := job.seconds(self.out))]
        self.number += len(jobs) - len(todo)
        asked = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]  # nohup
        previous = {one: signal.signal(one, signal.default_int_handler) for one in asked}
        pool = ThreadPoolExecutor(self.workers)
        try:
            list(pool.map(self._run, todo))
        except BaseException as error:
            self.stopping = True
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(self.processes):
                process.send_signal(signal.SIGTERM)
            if isinstance(error, KeyboardInterrupt):
                print("stopping after the updates in progress; the same command goes on from there", flush=True)
                raise SystemExit(INTERRUPTED) from error
            raise
        finally:
            pool.shutdown()
            for one, handler in previous.items():
                signal.signal(one, handler)

    def _run(self, job: Job) -> None:
        if self.stopping:
            return
        self.number += 1
        print(f"{progress_line(self.number, self.total, self.took, self.workers)}: {job.name}", flush=True)
        log, began = self.out / "logs" / f"{job.name}.log", time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            # a session of its own: Ctrl-C reaches it as one SIGTERM of `run`, after which it saves
            process = subprocess.Popen(
                job.command(self.out), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            self.processes.add(process)
            status = process.wait()
        self.processes.discard(process)
        if self.stopping:
            return
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        if status == REFUSED:
            self.stopping = True
            raise ValueError(f"{job.name}: its settings were refused ({last:.300}); see {log}")
        if status or not job.finished(self.out):
            self.failed.append(job.name)
            print(f"{job.name} failed with status {status} ({last:.200}); see {log}", flush=True)
            return
        self.took.append(time.monotonic() - began)
        write_atomically(
            self.out / "jobs" / f"{job.name}.json", json.dumps({"arguments": job.arguments, "seconds": self.took[-1]})
        )
        gold = read_json(job.folder(self.out) / "summary.json")["gold"]
        print(f"  gold {gold['gain']:+.4f}, standard error {gold['standard_error']:.4f}", flush=True)


def progress_line(number: int, total: int, took: Sequence[float], workers: int) -> str:
    """Return "run 7 of 40, about 63 min left", from the mean of the seconds that earlier runs took."""
    left = f", about {(total - number + 1) * np.mean(took) / 60 / workers:.0f} min left" if len(took) else ""
    return f"run {number} of {total}{left}"


def arguments(description: str, default: str, seeds: Sequence[int]) -> ArgumentParser:
    """Return a parser with the options that the scripts share. Unknown options are those of the recipes."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path(default), help=f"folder to write to ({default})")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), help="training seeds")
    parser.add_argument("--model", default="shapes", help="shapes, or the folder of such a model")
    parser.add_argument("--train_prompts", type=Path, help="training captions; by default the model's")
    parser.add_argument(
        "--tuning_prompts", type=Path, help="captions to choose settings on; default: its held-out ones"
    )
    parser.add_argument("--fresh_prompts", type=Path, help="captions of the report; by default drawn anew, held out")
    parser.add_argument("--samples", type=int, default=192, help="samples of an evaluation; one per fresh caption")
    parser.add_argument("--every", type=int, default=10, help="updates between evaluations")
    parser.add_argument("--caption_seed", type=int, default=0, help="seed of the fresh captions and their noise")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--dry_run", action="store_true", help="print the commands and end")
    parser.add_argument("--report", action="store_true", help="write the report of the finished runs and end")
    return parser


def parse(
    parser: ArgumentParser, argv: Sequence[str] | None = None, *, reserved: Iterable[str] = ()
) -> tuple[Namespace, dict[str, str]]:
    """Return the options, and the recipes' settings by name. Those must be written --NAME=VALUE.

    reserved: settings that the script chooses, besides RESERVED; they are refused.
    """
    options, others = parser.parse_known_args(argv)
    if wrong := [word for word in others if not word.startswith("--") or "=" not in word]:
        parser.error(f"got {wrong[0]!r}; expected the options of --help, or a recipe's setting as --NAME=VALUE")
    if len({*options.seeds, TUNING_SEED}) <= len(options.seeds):
        parser.error(f"--seeds: got {options.seeds}; expected each once, and not {TUNING_SEED}, that of the sweep")
    settings = dict(word[2:].split("=", 1) for word in others)
    if taken := sorted({*RESERVED, *reserved} & settings.keys()):
        parser.error(f"got --{taken[0]}; expected the options of --help, from which every run gets it")
    return options, settings


@dataclass(frozen=True)
class Prompts:
    """Files of captions: to train on, to choose settings on, and to report on. No caption stands in two of them."""

    train: Path
    tuning: Path
    fresh: Path

    @classmethod
    def prepare(cls, options: Namespace) -> "Prompts":
        """Find the files, and draw the fresh captions if they are not given. Raises ValueError if the files overlap."""
        spec = resolve_model(options.model)[0]
        train, tuning = options.train_prompts or spec.train_prompts, options.tuning_prompts or spec.heldout_prompts
        fresh = options.fresh_prompts
        if fresh is None:
            fresh = options.out / "captions" / f"fresh_{options.caption_seed}_{options.samples}.txt"
            used = {caption for path in (*USED, train, tuning) for caption in read_prompts(path)}
            captions = fresh_captions(options.samples, options.caption_seed, used)
            write_atomically(fresh, "".join(f"{caption}\n" for caption in captions))
        found = cls(train.absolute(), tuning.absolute(), fresh.absolute())
        check_disjoint({f"{role} ({path.name})": read_prompts(path) for role, path in vars(found).items()})
        return found

    def options(self, fresh: bool, options: Namespace) -> dict[str, object]:
        """Return the settings of an evaluation on the fresh captions, one sample each, or on those for tuning.

        On the latter, the number of samples is rounded down to a multiple of the number of captions, if it is larger.
        """
        known, samples = len(read_prompts(self.tuning)), options.samples
        return {
            "prompts": str(self.train),
            "eval_prompts": str(self.fresh if fresh else self.tuning),
            "evaluation.samples": samples if fresh or samples < known else samples - samples % known,
            "evaluation.every": options.every,
            "evaluation.seed": 2000 + options.caption_seed if fresh else 1234,
        }


def fresh_captions(number: int, seed: int, used: Iterable[str]) -> list[str]:
    """Return `number` different held-out captions, none of them in `used`. Raises ValueError if there are too few."""
    rng, taken, found = np.random.default_rng(seed), set(used), list[str]()
    for _ in range(ATTEMPTS):
        before = len(found)
        for scene in draw_scenes(ROUND, rng, held_out=True):
            if scene.caption not in taken:
                taken.add(scene.caption)
                found.append(scene.caption)
        if len(found) >= number:
            return found[:number]
        if len(found) == before:
            break
    drawn = f"the unused held-out captions among {ATTEMPTS * ROUND} draws"
    raise ValueError(f"samples: got {number}; expected at most {len(found)}, {drawn}")


def check_disjoint(lists: Mapping[str, Sequence[str]]) -> None:
    """Raise ValueError if a caption stands in two of the named lists."""
    seen: dict[str, str] = {}
    for name, captions in lists.items():
        for caption in dict.fromkeys(captions):
            if caption in seen:
                raise ValueError(f"captions: got {caption!r} in both {seen[caption]} and {name}; expected it in one")
            seen[caption] = name


def entries_of(groups: Mapping[str, Sequence[Job]], out: Path) -> list[Entry]:
    """Return an entry for each group with a finished run.

    Raises ValueError unless all had the same evaluation, and for a run with other settings than its job's.
    """
    for job in (job for jobs in groups.values() for job in jobs if job.finished(out)):
        job.check(out)
    folders = {name: [job.folder(out) for job in jobs if job.finished(out)] for name, jobs in groups.items()}
    folders = {name: found for name, found in folders.items() if found}
    if not folders:
        return []
    entries, notes = read_entries([], folders)
    if any(entry.incomparable for entry in entries):
        raise ValueError(f"{out}: {' '.join(notes)} Expected runs with the same evaluation: write to another folder")
    return entries
