"""The five alignment methods at their default budgets, and what share of the oracle's gain a learned reward gives them.

    python examples/evidence/methods.py runs/methods                                    # hours; start again to go on
    python examples/evidence/methods.py runs/methods --dry_run                          # print the commands
    python examples/evidence/methods.py runs/methods --methods grpo nft --sweep false   # a part of it

Every method runs with the defaults of its recipe on all seeds: ReFL, DPO, GRPO and NFT with the rewards dinalrm and
pixel, LPO with dinalrm, which alone reads noisy latents. All are evaluated on the same fresh captions, which were
neither trained on nor used to choose a setting, at the model's own guidance and, from the saved LoRAs with the same
noise, without guidance.

The oracle is the score that gold reports. As a reward it shows what a method can reach here if its reward is perfect;
ReFL needs a gradient and LPO a reward of noisy latents, so they have no such run. It runs three times for a method:

    oracle          the recipe's defaults: the same budget and settings as the learned rewards
    oracle, tuned   the best trial of a sweep over learning rate, group size and noise level, one at a time, at the same
                    number of updates and of samples per update; chosen with one seed on the captions for tuning
    oracle, longer  the same with three times the updates: the ceiling, not at the same budget

The share of the oracle's gain is a ratio of two mean gains, paired by seed and caption, with Fieller's interval for
seeds and captions as crossed random effects.

What this cannot show: which method is best after tuning, since the methods' defaults were not tuned equally and differ
in samples per update; that a share against the tuned oracle is a property of the reward alone, since the learned
rewards get no sweep here; and anything below the smallest effect that the report states.
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _curves import (
    HOW_TO_READ,
    draw_curves,
    figures_section,
    finish,
    kind_table,
    label,
    main_parts,
    mean_drift,
    names_of,
    smallest_effect,
)
from _estimates import Ratio, best_of, ratio_interval
from _runs import RECIPES, TUNING_SEED, Job, Prompts, Runner, arguments, entries_of, parse
from _unguided import UNGUIDED, Unguided
from matplotlib.figure import Figure

from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import settings_files
from dinalrm_align.eval.report.entries import COLOURS, Entry
from dinalrm_align.eval.report.figures import save_with_legend
from dinalrm_align.eval.report.intervals import by_caption, seeds_by_captions
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.report.page import cost_table
from dinalrm_align.models.specs import resolve_model
from dinalrm_align.train.command import parse as parse_settings
from dinalrm_align.train.files import flat, write_atomically

KINDS = {"refl": ReflRun, "dpo": DpoRun, "grpo": GrpoRun, "lpo": LpoRun, "nft": NftRun}
REWARDS = {"refl": ("dinalrm", "pixel"), "lpo": ("dinalrm",)}
ALL_REWARDS = ("dinalrm", "pixel", "oracle")
RATES = {"lr x 0.5": {"optim.lr": 0.5}, "lr x 2": {"optim.lr": 2}}
SWEEPS: dict[str, dict[str, dict[str, float]]] = {
    "dpo": {"default": {}, **RATES, "group x 2": {"dpo.group_size": 2, "dpo.batch_size": 0.5}},
    "grpo": {
        "default": {},
        **RATES,
        "group x 0.5": {"grpo.group_size": 0.5, "grpo.groups": 2},
        "group x 2": {"grpo.group_size": 2, "grpo.groups": 0.5},
        "noise x 0.5": {"grpo.noise_level": 0.5},
        "noise x 1.4": {"grpo.noise_level": 1.4},
    },
    "nft": {
        "default": {},
        **RATES,
        "group x 0.5": {"nft.group_size": 0.5, "nft.groups": 2},
        "group x 2": {"nft.group_size": 2, "nft.groups": 0.5},
    },
}
"""Method -> trials of its oracle: factors of the defaults. All keep the number of samples per update."""
LONGER = {"loop.steps": 3}
LIMITS = __doc__.strip().rpartition("\n\n")[2]


def scaled(defaults: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, float]:
    """Return the settings that `factors` changes: each default times its factor, whole numbers kept whole.

    Raises ValueError if a whole number would not stay whole.
    """
    found = {}
    for name, factor in factors.items():
        value = defaults[name] * factor
        if isinstance(defaults[name], int) and value != int(value):
            raise ValueError(f"{name}: got {defaults[name]} x {factor:g}; expected a whole number")
        found[name] = int(value) if isinstance(defaults[name], int) else float(f"{value:.6g}")
    return found


class Plan:
    """The runs of all phases, as functions of the options and, for the tuned oracle, of the sweep's results."""

    def __init__(self, options: Namespace, others: Mapping[str, str], prompts: Prompts) -> None:
        self.options, self.others, self.prompts = options, others, prompts
        self.kind = resolve_model(options.model)[0].kind
        self.known: dict[str, dict[str, Any]] = {}
        self.swept = [name for name in options.methods if options.sweep and "oracle" in self.rewards(name)]

    def rewards(self, method: str) -> list[str]:
        return [reward for reward in REWARDS.get(method, ALL_REWARDS) if reward in self.options.rewards]

    def own(self, method: str) -> dict[str, str]:
        """Return the further settings on the command line, without those of other methods' sections."""
        others = KINDS.keys() - {method}
        return {name: value for name, value in self.others.items() if name.partition(".")[0] not in others}

    def defaults(self, method: str) -> dict[str, Any]:
        """Return the settings of a recipe that a sweep scales, by dotted name."""
        if method not in self.known:
            files = settings_files(RECIPES / f"{method}_sd35.py", self.kind, "dinalrm")
            given = [f"--{name}={value}" for name, value in self.own(method).items()]
            run, _ = parse_settings(KINDS[method], "", given, files)
            self.known[method] = flat({name: vars(vars(run)[name]) for name in ("optim", "loop", method)})
        return self.known[method]

    def job(self, method: str, reward: str, arm: str, seed: int, factors: Mapping[str, float]) -> Job:
        tuning = seed == TUNING_SEED
        settings = {
            "model": self.options.model, "reward": reward, "seed": seed, "profile_every": self.options.every,
            **self.prompts.options(not tuning, self.options), **self.own(method),
            **(scaled(self.defaults(method), factors) if factors else {}),
        }  # fmt: skip
        if self.options.rollout_guidance == "own":
            settings[f"{method}.guidance_scale"] = "null"
        name = "_".join(filter(None, ["sweep" if tuning else "", method, reward, arm.replace(" ", ""), f"seed{seed}"]))
        return Job(name, method, settings)

    def sweep(self) -> dict[str, dict[str, Job]]:
        """Return the oracle's trials by method and name."""
        return {
            method: {name: self.job(method, "oracle", name, TUNING_SEED, factors) for name, factors in trials.items()}
            for method, trials in SWEEPS.items()
            if method in self.swept
        }

    def defaults_jobs(self) -> dict[tuple[str, str], list[Job]]:
        """Return the runs at default settings, by (method, reward)."""
        return {
            (method, reward): [self.job(method, reward, "", seed, {}) for seed in self.options.seeds]
            for method in self.options.methods
            for reward in self.rewards(method)
        }

    def ceiling_jobs(self, best: Mapping[str, str | None]) -> dict[tuple[str, str], list[Job]]:
        """Return the runs of the oracle after its sweep, by (method, arm). best: trial of each method."""
        found = {}
        for method, name in best.items():
            if name is None:
                continue
            factors = SWEEPS[method][name]
            for arm, own in (("tuned", factors), ("longer", {**factors, **LONGER})):
                if own:  # the default as the best trial is the run at default settings
                    jobs = [self.job(method, "oracle", f"{arm} {name}", seed, own) for seed in self.options.seeds]
                    found[method, f"oracle, {arm}"] = jobs
        return found

    def tuned(self) -> dict[str, dict[str, Entry | None]]:
        """Return the results of the sweep by method and trial; None for a run that did not finish."""
        sweep = self.sweep()
        groups = {job.name: [job] for jobs in sweep.values() for job in jobs.values()}
        found = {entry.name: entry for entry in entries_of(groups, self.options.out)}
        return {method: {name: found.get(job.name) for name, job in jobs.items()} for method, jobs in sweep.items()}


def best_trials(tuned: Mapping[str, Mapping[str, Entry | None]]) -> dict[str, str | None]:
    """Return the best trial of each method by gold on the captions for tuning; None if all failed."""
    return {
        method: best_of({name: entry and entry.gain("gold", entry.steps[-1]).mean for name, entry in trials.items()})
        for method, trials in tuned.items()
    }


Gains = Mapping[str, Mapping[int, np.ndarray]]
"""Score -> seed -> gain of every caption, (C,)."""


def guided_gains(entry: Entry) -> Gains:
    """Return the last gains of an entry in its own evaluations, at the model's guidance."""
    return {
        name: {run.seed: run.gain(name, entry.steps[-1]) for run in entry.runs}
        for name in main_parts(names_of([entry]))
    }


def unguided_gains(entry: Entry, unguided: Unguided) -> Gains:
    """Return the gains of an entry's LoRAs over the base model, both without guidance."""
    base, prompts = unguided.scores(None), unguided.run.terms["prompts"]
    found: dict[str, dict[int, np.ndarray]] = {}
    for run in entry.runs:
        scores = unguided.scores(run.folder / "lora")
        for name in main_parts(names_of([entry])):
            found.setdefault(name, {})[run.seed] = by_caption(scores[name] - base[name], prompts)
    return found


def stack(gains: Mapping[int, np.ndarray], seeds: Sequence[int]) -> np.ndarray:
    return np.stack([gains[seed] for seed in seeds])


def share(gains: Gains, oracle: Gains | None, name: str) -> Ratio | None:
    """Return the mean gain as a share of the oracle's, over the seeds that both have; None without an oracle."""
    seeds = sorted(gains[name].keys() & oracle[name].keys()) if oracle else []
    return ratio_interval(stack(gains[name], seeds), stack(oracle[name], seeds)) if seeds else None


def result_table(results: Mapping[tuple[str, str], Gains], entries: Mapping[tuple[str, str], Entry]) -> str:
    """Return the table of one way to evaluate: gains and shares of the oracle's, by method and arm."""
    names = main_parts(list(next(iter(results.values()))))
    rows = []
    for (method, arm), gains in results.items():
        intervals = [seeds_by_captions(stack(gains[name], sorted(gains[name]))) for name in names]
        shares = [share(gains, results.get((method, f"oracle{kind}")), "gold") for kind in ("", ", tuned")]
        shown = [f"{one}" if one and not arm.startswith("oracle") else "" for one in shares]
        entry = entries[method, arm]
        rows.append([
            f"{method}, {arm}", str(len(entry.runs)), str(entry.steps[-1]), *(one.brief for one in intervals),
            smallest_effect(intervals[0]), *shown, f"{mean_drift(entry)[-1]:.4f}",
        ])  # fmt: skip
    head = ["", "seeds", "updates", *(f"{label(name)} [95 %]" for name in names), "smallest effect on gold"]
    head += ["share of the oracle's gain", "share of the tuned oracle's gain", "drift"]
    return table(head, rows)


def trial_table(tuned: Mapping[str, Mapping[str, Entry | None]], best: Mapping[str, str | None], plan: Plan) -> str:
    """Return the table of all trials of the oracle."""
    rows = []
    for method, trials in tuned.items():
        for name, entry in trials.items():
            settings = scaled(plan.defaults(method), SWEEPS[method][name])
            text = ", ".join(f"{key} {value:g}" for key, value in settings.items()) or "the recipe's defaults"
            cells = ["failed or unfinished", ""]
            if entry is not None:
                cells = [entry.gain("gold", entry.steps[-1]).brief, f"{mean_drift(entry)[-1]:.4f}"]
            rows.append([method, name, text, *cells, "chosen" if best[method] == name else ""])
    return table(["method", "trial", "settings", "gold [95 %, captions]", "drift", ""], rows, "lllrrl")


def draw_bars(ways: Mapping[str, Mapping[tuple[str, str], Gains]], path: Path) -> Path:
    """Draw gold and its main parts: a bar for each method and reward, and a panel for each way to evaluate."""
    first = next(iter(ways.values()))
    names, methods = list(next(iter(first.values()))), list(dict.fromkeys(method for method, _ in first))
    arms = list(dict.fromkeys(arm for _, arm in first))
    figure = Figure(figsize=(5.6 * len(ways), 2.9 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(ways), squeeze=False)
    width = 0.8 / len(arms)
    for column, (way, results) in enumerate(ways.items()):
        for row, name in enumerate(names):
            axis = axes[row, column]
            for index, (arm, colour) in enumerate(zip(arms, COLOURS)):
                held = [number for number, method in enumerate(methods) if (method, arm) in results]
                tables = [results[methods[number], arm][name] for number in held]
                found = [seeds_by_captions(stack(gains, sorted(gains))) for gains in tables]
                means = np.array([one.mean for one in found])
                reach = np.array([[one.mean - one.low, one.high - one.mean] for one in found]).T.reshape(2, -1)
                xs = np.array(held, dtype=float) + (index - (len(arms) - 1) / 2) * width
                axis.bar(xs, means, width, color=colour, label=arm, yerr=reach, capsize=2)
            axis.set_xticks(range(len(methods)), methods)
            finish(axis, "", f"{label(name)}, {way}")
    return save_with_legend(figure, path)


def report(plan: Plan) -> None:
    """Write methods.md, methods.json and the figures of what has finished; sample what is missing without guidance."""
    options, out, tuned = plan.options, plan.options.out, plan.tuned()
    best = best_trials(tuned)
    jobs = {**plan.defaults_jobs(), **plan.ceiling_jobs(best)}
    jobs = {key: jobs[key] for method in options.methods for key in jobs if key[0] == method}
    missing = [job.name for runs in jobs.values() for job in runs if not job.finished(out)]
    keys = {f"{method}, {arm}": (method, arm) for method, arm in jobs}
    entries = {
        keys[entry.name]: entry for entry in entries_of({f"{m}, {a}": runs for (m, a), runs in jobs.items()}, out)
    }
    if not entries:
        raise SystemExit(f"{out}: no run on fresh captions has finished; run without --report")
    unguided = Unguided(out, next(iter(entries.values())).runs[0])
    own = float(unguided.run.terms["guidance_scale"])
    ways = {f"guidance {own:g}": {key: guided_gains(entry) for key, entry in entries.items()}}
    levels = {f"guidance {own:g}": float(unguided.run.scores[0]["gold"].mean())}
    if own > UNGUIDED:
        ways["no guidance"] = {key: unguided_gains(entry, unguided) for key, entry in entries.items()}
        levels["no guidance"] = float(unguided.scores(None)["gold"].mean())
    at_defaults = [entry for (_, arm), entry in entries.items() if arm == "dinalrm"] or list(entries.values())
    paths = [draw_bars(ways, out / "methods.png"), *draw_curves(at_defaults, out)]
    sections = [
        f"# Methods at their default budgets: {', '.join(options.methods)}",
        f"**Not finished, and left out: {', '.join(missing)}.**" if missing else "",
        *(
            f"## Evaluated with {way}\n\nThe base model's gold: {levels[way]:.3f}.\n\n{result_table(results, entries)}"
            for way, results in ways.items()
        ),
        f"## Trials of the oracle\n\nSeed {TUNING_SEED}, captions for tuning:\n\n{trial_table(tuned, best, plan)}"
        if tuned else "",
        kind_table(list(entries.values())),
        f"## Cost of an update\n\n{cost_table(list(entries.values())).markdown()}",
        f"## How to read this\n\n{HOW_TO_READ}\n\n{LIMITS}",
        figures_section(paths),
    ]  # fmt: skip
    write_atomically(out / "methods.md", "\n\n".join(filter(None, sections)) + "\n")
    record = {
        "seeds": options.seeds, "settings": plan.others, "not_finished": missing, "best_trials": best, "base": levels,
        "trials": {
            method: {name: entry and vars(entry.gain("gold", entry.steps[-1])) for name, entry in trials.items()}
            for method, trials in tuned.items()
        },
        "results": [
            {
                "evaluated": way, "method": method, "arm": arm,
                "gains": {label(n): vars(seeds_by_captions(stack(g, sorted(g)))) for n, g in gains.items()},
                "shares": {
                    label(n): {
                        kind: vars(found) for kind in ("oracle", "oracle, tuned")
                        if (found := share(gains, results.get((method, kind)), n))
                    }
                    for n in gains
                },
            }
            for way, results in ways.items() for (method, arm), gains in results.items()
        ],
    }  # fmt: skip
    write_atomically(out / "methods.json", json.dumps(record, indent=1))
    print(out / "methods.md", out / "methods.json", *paths, sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "runs/methods", range(3))
    parser.add_argument("--methods", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rewards", nargs="+", choices=ALL_REWARDS, default=list(ALL_REWARDS))
    parser.add_argument("--sweep", type=json.loads, default=True, help="true, or false: no tuned oracle")
    parser.add_argument(
        "--rollout_guidance", choices=("default", "own"), default="default", help="the recipe's, or the model's own"
    )
    options, others = parse(parser, argv)
    plan = Plan(options, others, Prompts.prepare(options))
    if options.report:
        report(plan)
        return
    sweep = [job for jobs in plan.sweep().values() for job in jobs.values()]
    defaults = [job for jobs in plan.defaults_jobs().values() for job in jobs]
    total = len(sweep) + len(defaults) + 2 * len(plan.swept) * len(options.seeds)
    runner = Runner(options.out, total, options.workers, options.dry_run)
    runner.run(sweep)
    runner.run(defaults)
    runner.run(job for jobs in plan.ceiling_jobs(best_trials(plan.tuned())).values() for job in jobs)
    if options.dry_run:
        print("# Then the oracle with the best trial of each sweep, also for three times the updates.")
        return
    report(plan)
    if runner.failed:
        raise SystemExit(f"failed: {', '.join(runner.failed)}; the same command tries again")


if __name__ == "__main__":
    main()
