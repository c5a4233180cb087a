"""Reward hacking: long runs on a frozen reward, what holds them back, and when the alarm goes off.

    python examples/evidence/hacking.py runs/hacking                                    # hours; start again to go on
    python examples/evidence/hacking.py runs/hacking --updates 30 --seeds 0 --arms none kl

ReFL maximises the embedded world's latent reward at its default learning rate, in four arms that differ in one thing
each; all other settings, captions and noise are the same:

    none        the reward at one noise level, no KL term
    kl          a velocity KL, in units of the reward's standard deviation
    anchor      the pixel reward is added at every second update
    ensemble    one score from the tokens of three noise levels

At every evaluation a run compares reward and gold with its best evaluation, and raises an alarm if the reward rose and
gold fell, both significantly. Gold, its parts, the reward and the drift are reported over updates, on captions that
were not trained on. "Best" is the evaluation with the best mean gold of each run, chosen on the captions it is reported
on, which flatters it; the fall from there to the end is what hacking cost.

What this cannot show: that an arm without an alarm would have none after more updates, at another learning rate or KL
weight; that a gain is due to an arm and not to the smaller distance that it keeps (frontier.py compares at equal
drift); or how often the alarm is wrong, for which runs that hack nothing would be needed.
"""

import json
from argparse import Namespace
from collections.abc import Mapping, Sequence

import numpy as np
from _curves import (
    HOW_TO_READ,
    base_levels,
    draw_curves,
    draw_entry,
    figures_section,
    finish,
    gain_table,
    gains_of,
    kind_table,
    label,
    main_parts,
    mean_drift,
    names_of,
    part_table,
)
from _runs import Job, Prompts, Runner, arguments, entries_of, parse
from matplotlib.figure import Figure

from dinalrm_align.eval.report.entries import Entry, Run
from dinalrm_align.eval.report.figures import save_with_legend
from dinalrm_align.eval.report.intervals import seeds_by_captions
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.train.files import write_atomically

ONE_LEVEL, LEVELS = [0.4], [0.2, 0.5, 0.7]
ARMS: dict[str, dict[str, object]] = {
    "none": {"refl.reward_sigma": ONE_LEVEL, "refl.kl_weight": 0},
    "kl": {"refl.reward_sigma": ONE_LEVEL, "refl.kl_weight": 24.5},
    "anchor": {
        "refl.reward_sigma": ONE_LEVEL, "refl.kl_weight": 0, "anchor.reward": "pixel", "anchor.every": 2,
    },
    "ensemble": {"refl.reward_sigma": LEVELS, "refl.kl_weight": 0},
}  # fmt: skip
LIMITS = __doc__.strip().rpartition("\n\n")[2]


def jobs_of(options: Namespace, others: Mapping[str, str], prompts: Prompts) -> dict[str, list[Job]]:
    """Return the runs of every arm, one for each seed."""
    found = {}
    for arm in options.arms:
        settings = {
            "model": options.model, "reward": options.reward, "loop.steps": options.updates, "optim.lr": options.lr,
            "refl.kl_unit": "reward_std", **ARMS[arm], **prompts.options(True, options), "profile_every": 0, **others,
        }  # fmt: skip
        found[arm] = [Job(f"{arm}_seed{seed}", "refl", {**settings, "seed": seed}) for seed in options.seeds]
    return found


def best_update(run: Run) -> int:
    """Return the evaluation of a run with the best mean gold."""
    return max(run.scores, key=lambda step: float(run.scores[step]["gold"].mean()))


def alarm_table(entries: Sequence[Entry]) -> str:
    """Return a table of the alarm, the best evaluation, and the fall from there to the end, by arm."""
    rows = []
    for entry in entries:
        last = entry.steps[-1]
        alarms = ["none" if run.alarm is None else str(run.alarm) for run in entry.runs]
        bests = [best_update(run) for run in entry.runs]
        falls = seeds_by_captions(
            np.stack([run.gain("gold", last) - run.gain("gold", best) for run, best in zip(entry.runs, bests)])
        )
        best = seeds_by_captions(np.stack([run.gain("gold", best) for run, best in zip(entry.runs, bests)]))
        cells = [", ".join(alarms), ", ".join(map(str, bests)), best.brief, entry.gain("gold", last).brief, falls.brief]
        proxy, drift = entry.gain("proxy", last).brief, f"{mean_drift(entry)[-1]:.4f}"
        rows.append([entry.name, ", ".join(str(run.seed) for run in entry.runs), *cells, proxy, drift])
    head = ["arm", "seeds", "alarm at update", "best at update", "gold at its best", "gold at the end", "fall [95 %]"]
    return table([*head, "reward at the end, s.d.", "drift"], rows)


def report(options: Namespace, jobs: Mapping[str, Sequence[Job]], others: Mapping[str, str]) -> None:
    """Write hacking.md, hacking.json and the figures of what has finished."""
    out, entries = options.out, entries_of(jobs, options.out)
    if not entries:
        raise SystemExit(f"{out}: no run has finished; run without --report")
    missing = [job.name for runs in jobs.values() for job in runs if not job.finished(out)]
    names = ["proxy", *main_parts(names_of(entries))]
    figure = Figure(figsize=(5.2 * len(names), 4.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names)), names):
        for entry in entries:
            draw_entry(axis, entry, name, "updates")
        finish(axis, "update", "reward, s.d. of the base model" if name == "proxy" else label(name))
    paths = [save_with_legend(figure, out / "hacking.png"), *draw_curves(entries, out, ["proxy"])]
    samples = len(entries[0].runs[0].terms["prompts"])
    text = [
        f"# Reward hacking: ReFL, {options.updates} updates, learning rate {options.lr:g}, {samples} samples",
        f"**Not finished, and left out: {', '.join(missing)}.**" if missing else "",
        alarm_table(entries),
        base_levels(entries[0]),
        f"## Last update\n\n{gain_table(entries)}",
        f"## Parts of gold, last update\n\n{part_table(entries)}",
        kind_table(entries),
        f"## How to read this\n\n{HOW_TO_READ} A cross marks an alarm.\n\n{LIMITS}",
        figures_section(paths),
    ]
    write_atomically(out / "hacking.md", "\n\n".join(filter(None, text)) + "\n")
    record = {
        "updates": options.updates, "lr": options.lr, "seeds": options.seeds, "settings": others, "arms": ARMS,
        "not_finished": missing,
        "alarms": {entry.name: {run.seed: run.alarm for run in entry.runs} for entry in entries},
        "gains": {entry.name: {step: gains_of(entry, step) for step in entry.steps} for entry in entries},
        "drift": {entry.name: dict(zip(entry.steps, mean_drift(entry))) for entry in entries},
    }  # fmt: skip
    write_atomically(out / "hacking.json", json.dumps(record, indent=1))
    print(alarm_table(entries), out / "hacking.md", out / "hacking.json", *paths, sep="\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, "runs/hacking", range(3))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--reward", default="dinalrm", help="a latent reward, as for --reward of a recipe")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    options, others = parse(parser, argv, reserved=("loop.steps", "optim.lr", *ARMS["anchor"]))
    jobs = jobs_of(options, others, Prompts.prepare(options))
    runner = Runner(options.out, sum(map(len, jobs.values())), options.workers, options.dry_run)
    if not options.report:
        runner.run(job for runs in jobs.values() for job in runs)
    if not options.dry_run:
        report(options, jobs, others)
        if runner.failed:
            raise SystemExit(f"failed: {', '.join(runner.failed)}; the same command tries again")


if __name__ == "__main__":
    main()
