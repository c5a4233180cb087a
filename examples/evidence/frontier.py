"""Rewards compared at equal drift: what a latent and a pixel reward gain at the same distance from the base model.

    python examples/evidence/frontier.py runs/frontier                                  # hours; start again to go on
    python examples/evidence/frontier.py runs/frontier --dry_run                        # print the commands
    python examples/evidence/frontier.py runs/frontier --report                         # write the report again
    python examples/evidence/frontier.py runs/nft --method nft --updates 40 --nft.levels=1     # a setting of the recipe

Two rewards of different scale, trained with one KL weight, end at different distances from the base model, and the one
that moved further gains or loses more. So rewards are compared here at equal drift, and KL weights are in units of the
reward's own standard deviation (ReFL), or of advantages and ranks (GRPO, NFT, DPO), which have no scale.

1. Sweep. Every reward gets the same list of trials, pairs KL:LR of a KL weight and a learning rate, with one seed, on
   the captions for tuning. For each KL weight, the learning rate with the best gold gain at the last update is kept.
   The best of these settings is the reward's chosen setting. The report lists all trials.
2. Seeds. Every reward runs with each KL weight and its learning rate on all seeds, evaluated on fresh captions: held
   out, and neither in training nor used to choose anything.

Gains at equal drift. A run is a curve of gains over drift, through its evaluations in the order of updates. For each
seed and caption the gain is linearly interpolated where the run first reaches the drift; only drifts that all runs of
both rewards reach are used, and nothing is extrapolated. Differences are paired by seed and caption.

With a method that needs no gradient, the oracle is a third reward, and the gains of the others are also given as shares
of its gain: at the same budget, and at equal drift.

What this cannot show: the best that a reward could do under more tuning than these trials; other methods, models or
captions than these; anything below the smallest effect that the report states; and, since gold is the embedded world's
own oracle, what people prefer. The pixel reward must have been trained on the same pairs to its own best beforehand.
"""

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from _curves import (
    HOW_TO_READ,
    base_levels,
    draw_curves,
    drift_curve,
    figures_section,
    finish,
    gain_at_drift,
    gain_table,
    gains_of,
    kind_table,
    label,
    main_parts,
    mean_drift,
    names_of,
    paired,
    part_table,
    share_of,
    smallest_effect,
    verdict,
)
from _estimates import at_drift, best_of, common_drift
from _runs import TUNING_SEED, Job, Prompts, Runner, arguments, entries_of, parse
from matplotlib.figure import Figure

from dinalrm_align.eval.report.entries import AVERAGES, COLOURS, Entry
from dinalrm_align.eval.report.figures import save_with_legend
from dinalrm_align.eval.report.intervals import Interval, seeds_by_captions
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.report.page import cost_table
from dinalrm_align.reward.names import file_name
from dinalrm_align.train.files import write_atomically


class Trial(NamedTuple):
    """A setting: the weight that holds the policy to the base model, and the learning rate."""

    kl: float
    lr: float

    def __str__(self) -> str:
        return f"KL {self.kl:g}, lr {self.lr:g}"


METHODS = {
    "refl": ("refl.kl_weight", ("dinalrm", "pixel"), "6:3e-4 6:1e-3 25:3e-4 25:1e-3 100:3e-4 100:1e-3"),
    "grpo": ("grpo.kl_beta", ("dinalrm", "pixel", "oracle"), "0:7e-4 0:2e-3 0.01:7e-4 0.01:2e-3 0.1:7e-4 0.1:2e-3"),
    "nft": ("nft.kl_beta", ("dinalrm", "pixel", "oracle"), "0.1:8e-4 0.1:2e-3 1:8e-4 1:2e-3 10:8e-4 10:2e-3"),
    "dpo": ("dpo.beta", ("dinalrm", "pixel", "oracle"), "30:4e-4 30:1e-3 100:4e-4 100:1e-3 300:4e-4 300:1e-3"),
}  # fmt: skip
"""Method -> its setting that penalises distance, rewards, trials. LPO reads noisy latents: it has no pixel reward."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the largest drift that all runs of both rewards reach. The headline compares gains at the last one."""
LIMITS = __doc__.strip().rpartition("\n\n")[2]


def trial(text: str) -> Trial:
    """Read "KL:LR"."""
    try:
        kl, lr = (float(number) for number in text.split(":"))
    except ValueError as error:
        raise ArgumentTypeError(f"got {text!r}; expected KL:LR, such as 6:3e-4") from error
    return Trial(kl, lr)


class Plan:
    """The runs of both phases, as functions of the options and, for the second phase, of the first one's results."""

    def __init__(self, options: Namespace, others: Mapping[str, str], prompts: Prompts) -> None:
        self.options, self.others, self.prompts = options, others, prompts
        self.weight, rewards, trials = METHODS[options.method]
        self.rewards: list[str] = options.rewards or list(rewards)
        self.trials: list[Trial] = options.trials or [trial(text) for text in trials.split()]
        names = [file_name(reward) for reward in self.rewards]
        if len({*names}) < len(names) or len({*self.trials}) < len(self.trials):
            raise SystemExit(f"got rewards {names} and trials {self.trials}; expected each once, rewards by file name")
        self.kl_weights = list(dict.fromkeys(one.kl for one in self.trials))

    def job(self, phase: str, reward: str, one: Trial, seed: int) -> Job:
        options = self.options
        settings = {
            "model": options.model, "reward": reward, "seed": seed, "loop.steps": options.updates, "optim.lr": one.lr,
            self.weight: one.kl, **({"refl.kl_unit": "reward_std"} if options.method == "refl" else {}),
            "profile_every": options.every, **self.prompts.options(phase == "seeds", options), **self.others,
        }  # fmt: skip
        name = f"{phase}_{file_name(reward)}_kl{one.kl:g}_lr{one.lr:g}_seed{seed}"
        return Job(name, options.method, settings)

    def sweep(self) -> dict[str, dict[Trial, Job]]:
        """Return the jobs of the first phase, by reward and trial. With a single trial there is nothing to choose."""
        trials = self.trials if len(self.trials) > 1 else []
        return {reward: {one: self.job("sweep", reward, one, TUNING_SEED) for one in trials} for reward in self.rewards}

    def seeds(self, chosen: Mapping[str, Mapping[float, Trial]]) -> dict[str, dict[Trial, list[Job]]]:
        """Return the jobs of the second phase, by reward and setting. chosen: of `choose`."""
        return {
            reward: {one: [self.job("seeds", reward, one, s) for s in self.options.seeds] for one in settings.values()}
            for reward, settings in chosen.items()
        }

    def tuned(self) -> dict[str, dict[Trial, Entry | None]]:
        """Return the results of the sweep; None for a run that did not finish."""
        groups = {f"{reward}, {one}": [job] for reward, jobs in self.sweep().items() for one, job in jobs.items()}
        found = {entry.name: entry for entry in entries_of(groups, self.options.out)}
        return {reward: {one: found.get(f"{reward}, {one}") for one in jobs} for reward, jobs in self.sweep().items()}

    def chosen(self, tuned: Mapping[str, Mapping[Trial, Entry | None]]) -> dict[str, dict[float, Trial]]:
        """Return the settings of the second phase by reward and KL weight, the chosen one first. tuned: of `tuned`."""
        if len(self.trials) == 1:
            return {reward: {self.trials[0].kl: self.trials[0]} for reward in self.rewards}
        return {reward: choose(tuning_gains(results)) for reward, results in tuned.items()}


def choose(gains: Mapping[Trial, float | None]) -> dict[float, Trial]:
    """Return the best trial of each KL weight by gold, the best one first. A KL weight whose trials failed is left out.

    gains: gold gain on the captions for tuning; None for a failed trial.
    """
    best = [best_of({one: gain for one, gain in gains.items() if one.kl == kl}) for kl in {one.kl for one in gains}]
    ranked = sorted((one for one in best if one is not None), key=lambda one: (-gains[one], one))
    return {one.kl: one for one in ranked}


def tuning_gains(tuned: Mapping[Trial, Entry | None]) -> dict[Trial, float | None]:
    return {one: entry and entry.gain("gold", entry.steps[-1]).mean for one, entry in tuned.items()}


@dataclass(frozen=True)
class Matched:
    """Two rewards at one drift. costs: updates, seconds and TFLOPs of training of each until it first has this drift.

    gains: score -> the gain of the first, of the second, and the paired difference.
    """

    first: Entry
    second: Entry
    drift: float
    costs: tuple[dict[str, float], dict[str, float]]
    gains: dict[str, tuple[Interval, Interval, Interval]]


def seeds_of(first: Entry, second: Entry) -> set[int]:
    """Return the seeds that both have finished."""
    return {run.seed for run in first.runs} & {run.seed for run in second.runs}


def matched(first: Entry, second: Entry) -> list[Matched]:
    """Compare two rewards at SHARES of the largest drift that every run of both reaches."""
    shared = seeds_of(first, second)
    entries = [replace(one, runs=tuple(run for run in one.runs if run.seed in shared)) for one in (first, second)]
    limit = common_drift([drift_curve(run)[1] for entry in entries for run in entry.runs])
    found = []
    for drift in (share * limit for share in SHARES):
        gains = {}
        for name in names_of(entries):
            tables = paired(*entries, partial(gain_at_drift, name=name, drift=drift))
            gains[name] = tuple(map(seeds_by_captions, (*tables, tables[0] - tables[1])))
        found.append(Matched(first, second, drift, tuple(cost_at(entry, drift) for entry in entries), gains))
    return found


def cost_at(entry: Entry, drift: float) -> dict[str, float]:
    """Return updates, seconds and TFLOPs of training until the runs first reach the drift, averaged over seeds."""
    curves = [(run, *drift_curve(run)) for run in entry.runs]
    updates = float(np.mean([at_drift(drifts, np.array(steps), drift) for _, steps, drifts in curves]))
    seconds = float(np.mean([at_drift(drifts, run.clock[steps], drift) for run, steps, drifts in curves]))
    return {"updates": updates, "seconds": seconds, "tflops": updates * entry.teraflops}


def headline(found: Matched) -> str:
    """Return the result of a pair of rewards in one sentence."""
    difference = found.gains["gold"][2]
    return (
        f"- {found.first.name} less {found.second.name}, gold at drift {found.drift:.4f}: {difference.brief}, "
        f"{verdict(difference)} ({difference.seeds} seeds, {difference.captions} fresh captions; smallest effect "
        f"{smallest_effect(difference)})."
    )


def matched_section(found: Sequence[Matched]) -> str:
    """Return the Markdown section of a pair of rewards: gold at every drift, and the parts at the largest one."""
    first, second, last = found[0].first.name, found[0].second.name, found[-1]
    head = [first, second, "difference [95 %]", "smallest effect"]

    def cells(one: Matched, name: str) -> list[str]:
        gains = one.gains[name]
        return [*(interval.brief for interval in gains), smallest_effect(gains[2])]

    def cost(values: Mapping[str, float]) -> str:
        return f"{values['updates']:.1f}, {values['seconds']:.0f}, {values['tflops']:.3g}"

    rows = [[f"{one.drift:.4f}", *cells(one, "gold"), *map(cost, one.costs)] for one in found]
    gold = table(["gold at drift", *head, *(f"{name}: updates, s, TFLOP" for name in (first, second))], rows)
    parts = [[label(name), *cells(last, name)] for name in last.gains]
    return f"## {first} less {second}, at equal drift\n\n{gold}\n\n" + table([f"at {last.drift:.4f}", *head], parts)


def share_section(best: Mapping[str, Entry]) -> str:
    """Return the gains of the chosen settings as shares of the oracle's; empty if the oracle is no reward here."""
    oracle, rows = best.get("oracle"), []
    for entry in best.values() if oracle else ():
        if entry is not oracle and seeds_of(entry, oracle):
            last = min(entry.steps[-1], oracle.steps[-1])
            drift = common_drift([drift_curve(run)[1] for one in (entry, oracle) for run in one.runs])
            same_budget = share_of(entry, oracle, lambda run, last=last: run.gain("gold", last))
            same_drift = share_of(entry, oracle, partial(gain_at_drift, name="gold", drift=drift))
            rows.append([entry.name, f"{same_budget}", f"{same_drift} (drift {drift:.4f})"])
    if not rows:
        return ""
    head = ["share of the oracle's gold gain, Fieller's 95 % interval", "at the same updates", "at equal drift"]
    return f"## Share of the oracle's gain\n\n{table(head, rows)}"


def same_weight_table(by_weight: Mapping[str, Mapping[float, Entry]]) -> str:
    """Return a table of pairs of rewards at the same KL weight, at the last update; their drifts differ."""
    rows = []
    for first, second in combinations(by_weight, 2):
        for kl in (kl for kl in by_weight[first] if kl in by_weight[second]):
            entries = by_weight[first][kl], by_weight[second][kl]
            if not seeds_of(*entries):
                continue
            last = min(entry.steps[-1] for entry in entries)
            tables = paired(*entries, lambda run, last=last: run.gain("gold", last))
            found = seeds_by_captions(tables[0] - tables[1])
            drifts = [f"{mean_drift(entry)[-1]:.4f}" for entry in entries]
            rows.append([f"{first} less {second}, KL {kl:g}", *drifts, found.brief, smallest_effect(found)])
    return table(["", "drift, first", "drift, second", "gold [95 %]", "smallest effect"], rows)


def equal_drift_table(by_weight: Mapping[str, Mapping[float, Entry]]) -> str:
    """Return a table of every setting of a reward with every one of another, at the largest drift that both reach."""
    rows = []
    for settings, others in combinations(by_weight.values(), 2):
        for first, second in product(settings.values(), others.values()):
            if seeds_of(first, second):
                last = matched(first, second)[-1]
                gains = last.gains["gold"]
                cells = [interval.brief for interval in gains]
                rows.append([first.name, second.name, f"{last.drift:.4f}", *cells, smallest_effect(gains[2])])
    head = ["first", "second", "drift", "gold, first", "gold, second", "first less second [95 %]", "smallest effect"]
    return table(head, rows)


def trial_table(tuned: Mapping[str, Mapping[Trial, Entry | None]], chosen: Mapping[str, Mapping[float, Trial]]) -> str:
    """Return the table of all trials of the sweep."""
    rows = []
    for reward, results in tuned.items():
        taken = list(chosen[reward].values())
        for one, entry in results.items():
            mark = "chosen" if one in taken[:1] else "for its KL weight" if one in taken else ""
            cells = ["failed or unfinished", "", "", ""]
            if entry is not None:
                names, last = main_parts(names_of([entry])), entry.steps[-1]
                gains = [entry.gain(name, last).brief for name in names]
                cells = ["; ".join(gains), f"{mean_drift(entry)[-1]:.4f}", str(entry.runs[0].alarm or "none"), mark]
            rows.append([reward, f"{one.kl:g}", f"{one.lr:g}", *cells])
    head = ["reward", "KL weight", "lr", "gold; its main parts [95 %, captions]", "drift", "alarm at update", ""]
    return table(head, rows)


def draw_frontier(by_weight: Mapping[str, Mapping[float, Entry]], path: Path) -> Path:
    """Draw gold and its main parts over drift: a curve of updates per KL weight, and a line through their ends."""
    names = main_parts(names_of([entry for settings in by_weight.values() for entry in settings.values()]))
    figure = Figure(figsize=(5.3 * len(names), 4.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for colour, (reward, settings) in zip(COLOURS, by_weight.items()):
            ends = []
            for entry in settings.values():
                xs, gains = mean_drift(entry), [entry.gain(name, step) for step in entry.steps]
                axis.plot(xs, [one.mean for one in gains], color=colour, alpha=0.35, linewidth=0.9)
                ends.append((xs[-1], gains[-1]))
            ends.sort(key=lambda end: end[0])
            xs, means = [x for x, _ in ends], [one.mean for _, one in ends]
            reach = [[one.mean - one.low for _, one in ends], [one.high - one.mean for _, one in ends]]
            text = f"{reward}: last update, every KL weight"
            axis.errorbar(xs, means, yerr=reach, fmt="o-", capsize=3, color=colour, label=text)
        axis.set_xscale("symlog", linthresh=1e-3)
        finish(axis, "drift", label(name))
    return save_with_legend(figure, path)


def report(plan: Plan) -> None:
    """Write frontier.md, frontier.json and the figures of what has finished."""
    options, out, tuned = plan.options, plan.options.out, plan.tuned()
    chosen = plan.chosen(tuned)
    jobs = plan.seeds(chosen)
    groups = {f"{reward}, {one}": runs for reward, settings in jobs.items() for one, runs in settings.items()}
    missing = [job.name for runs in groups.values() for job in runs if not job.finished(out)]
    found = {entry.name: entry for entry in entries_of(groups, out)}
    by_weight = {
        reward: {kl: found[f"{reward}, {one}"] for kl, one in settings.items() if f"{reward}, {one}" in found}
        for reward, settings in chosen.items()
    }
    by_weight = {reward: settings for reward, settings in by_weight.items() if settings}
    if not by_weight:
        raise SystemExit(f"{out}: no run on fresh captions has finished; run without --report")
    best = {
        reward: settings[kl] for reward, settings in by_weight.items() if (kl := next(iter(chosen[reward]))) in settings
    }
    compared = [matched(first, second) for first, second in combinations(best.values(), 2) if seeds_of(first, second)]
    paths = [draw_frontier(by_weight, out / "frontier.png"), *(draw_curves(list(best.values()), out) if best else [])]
    sections = [
        f"# {' and '.join(by_weight)} at equal drift: {options.method}, {options.updates} updates",
        f"**Not finished, and left out: {', '.join(missing)}.**" if missing else "",
        "\n".join(headline(one[-1]) for one in compared),
        *map(matched_section, compared),
        base_levels(next(iter(found.values()))),
        share_section(best),
        f"## Every KL weight, last update\n\n{gain_table(list(found.values()))}",
        f"The same KL weight, `{plan.weight}`, whatever drift it leads to:\n\n{same_weight_table(by_weight)}",
        "Every setting with every other, at the largest drift that all runs of both reach. Each interval is for one "
        f"comparison:\n\n{equal_drift_table(by_weight)}",
        f"## Parts of gold at the chosen settings, last update\n\n{part_table(list(best.values()))}" if best else "",
        kind_table(list(found.values())),
        f"## Cost of an update\n\n{cost_table(list(best.values())).markdown()}" if best else "",
        f"## Trials\n\nThe same {len(plan.trials)} for each reward, seed {TUNING_SEED}, captions for tuning:\n\n"
        + trial_table(tuned, chosen)
        if len(plan.trials) > 1
        else "## Trials\n\nOne setting, and no sweep.",
        f"## How to read this\n\n{HOW_TO_READ} Gains at equal drift: for each seed and caption, linear interpolation "
        f"between evaluations where the run first reaches the drift; no extrapolation.\n\n{LIMITS}",
        figures_section(paths),
    ]
    write_atomically(out / "frontier.md", "\n\n".join(filter(None, sections)) + "\n")
    record = {
        "method": options.method, "updates": options.updates, "kl_weight": plan.weight, "seeds": options.seeds,
        "settings": plan.others, "not_finished": missing,
        "trials": {
            reward: [[*one, gain] for one, gain in tuning_gains(results).items()] for reward, results in tuned.items()
        },
        "chosen": {reward: list(settings.values()) for reward, settings in chosen.items()},
        "gains": {name: {step: gains_of(entry, step) for step in entry.steps} for name, entry in found.items()},
        "drift": {name: {run.seed: drift_curve(run) for run in entry.runs} for name, entry in found.items()},
        "cost": {name: {kind: entry.cost(kind) for kind in AVERAGES} for name, entry in found.items()},
        "equal_drift": [
            {"first": one.first.name, "second": one.second.name, "drift": one.drift, "costs": one.costs}
            | {"gains": {label(name): [vars(each) for each in gains] for name, gains in one.gains.items()}}
            for pair in compared for one in pair
        ],
    }  # fmt: skip
    write_atomically(out / "frontier.json", json.dumps(record, indent=1))
    print(out / "frontier.md", out / "frontier.json", *paths, sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "runs/frontier", range(5))
    parser.add_argument("--method", choices=METHODS, default="refl")
    parser.add_argument("--rewards", nargs="+", help="rewards to compare, as for --reward of a recipe")
    parser.add_argument("--trials", type=trial, nargs="+", metavar="KL:LR", help="settings that every reward tries")
    parser.add_argument("--updates", type=int, default=60)
    chosen_here = {"loop.steps", "optim.lr", "refl.kl_unit", *(weight for weight, *_ in METHODS.values())}
    options, others = parse(parser, argv, reserved=chosen_here)
    plan = Plan(options, others, Prompts.prepare(options))
    if options.report:
        report(plan)
        return
    sweep = [job for jobs in plan.sweep().values() for job in jobs.values()]
    total = len(sweep) + len(plan.rewards) * len(plan.kl_weights) * len(options.seeds)
    runner = Runner(options.out, total, options.workers, options.dry_run)
    runner.run(sweep)
    chosen = plan.chosen(plan.tuned())
    if options.dry_run and not all(map(len, chosen.values())):
        print("# Then every KL weight, with the best learning rate of the sweep, on all seeds and fresh captions.")
        return
    runner.run(job for settings in plan.seeds(chosen).values() for jobs in settings.values() for job in jobs)
    if not options.dry_run:
        report(plan)
        if runner.failed:
            raise SystemExit(f"failed: {', '.join(runner.failed)}; the same command tries again")


if __name__ == "__main__":
    main()
