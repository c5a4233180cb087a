"""A reward on named test sets: accuracy per noise level and protocol, beside the paper's, with what leaked."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dinalrm_align.eval.leakage import Leak
from dinalrm_align.eval.protocols import Accuracy, accuracy
from dinalrm_align.eval.scores import PairScores
from dinalrm_align.eval.test_sets_config import HPSV3, PAPER, PROTOCOLS, TEST_SETS, Row, default_protocol, protocols_of
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.figures import save_figure


@dataclass(frozen=True)
class SetResult:
    """What one set shows. protocol: its headline. per_reading: under that, by reading, in the order they were taken.
    per_protocol: at the readings of the headline, by (protocol, reading). leak: None where nobody asked. without: the
    headline readings on the pairs that were not trained on. faults: pictures without a score.
    """

    name: str
    judged: PairScores
    protocol: str
    per_reading: dict[str, Accuracy]
    per_protocol: dict[tuple[str, str], Accuracy]
    leak: Leak | None = None
    without: dict[str, Accuracy] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)


def evaluate_set(
    name: str,
    judged: PairScores,
    headline: Sequence[str],
    *,
    protocol: str | None = None,
    leak: Leak | None = None,
    faults: Mapping[str, str] | None = None,
    draws: int,
) -> SetResult:
    """Everything about one set. headline: the readings that stand for the reward. protocol: default, the set's own."""
    protocol = protocol or default_protocol(name)

    def at(rule: str, reading: str, of: PairScores = judged) -> Accuracy:
        return accuracy(of, rule, reading, draws=draws)

    without = {}
    if leak is not None and not leak.any.all():
        clean = subset(judged, ~leak.any)
        without = {reading: at(protocol, reading, clean) for reading in headline}
    return SetResult(
        name=name,
        judged=judged,
        protocol=protocol,
        per_reading={reading: at(protocol, reading) for reading in judged.scores},
        per_protocol={(rule, reading): at(rule, reading) for rule in protocols_of(name) for reading in headline},
        leak=leak,
        without=without,
        faults=faults or {},
    )


def subset(judged: PairScores, kept: np.ndarray) -> PairScores:
    """The same scores with some of the pairs; kept (N,) bool."""
    columns = {
        name: vars(judged)[name][kept] for name in ("chosen", "rejected", "label", "caption", "group")
        if vars(judged)[name] is not None
    }  # fmt: skip
    concept = None if judged.concept is None else tuple(np.array(judged.concept)[kept].tolist())
    return replace(judged, **columns, concept=concept)


def section(found: Sequence[SetResult], headline: Sequence[str]) -> str:
    """Markdown: accuracy per noise level, under every protocol, beside others, and what leaked or was left out."""
    parts = [_levels(found), _protocols(found, headline)]
    if any(one.name in TEST_SETS for one in found):
        parts.append(_beside(found, headline))
    parts += [_leak(one) for one in found if one.leak is not None]
    parts += [_faults(one) for one in found if one.faults]
    return "\n".join(parts)


def _levels(found: Sequence[SetResult]) -> str:
    readings = list(dict.fromkeys(reading for one in found for reading in one.per_reading))
    lines = [
        "## Accuracy", "",
        "Per cent, 95 % bootstrap intervals over prompts; rows are noise levels, several joined as tokens.", "",
        f"| read at | {' | '.join(f'{one.name}, {one.protocol}' for one in found)} |",
        f"|---|{'---:|' * len(found)}",
    ]  # fmt: skip
    for reading in readings:
        cells = [str(one.per_reading[reading]) if reading in one.per_reading else "" for one in found]
        lines.append(f"| {reading} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _protocols(found: Sequence[SetResult], headline: Sequence[str]) -> str:
    used = [rule for rule in PROTOCOLS if any((rule, headline[0]) in one.per_protocol for one in found)]
    head = [f"{one.name} at {reading}" for one in found for reading in headline]
    lines = ["## The same scores under every protocol", "", f"| protocol | {' | '.join(head)} |"]
    lines.append(f"|---|{'---:|' * len(head)}")
    for rule in used:
        cells = [
            str(one.per_protocol[rule, reading]) + " *" * (rule == one.protocol)
            if (rule, reading) in one.per_protocol
            else ""
            for one in found
            for reading in headline
        ]
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    lines += ["", "An asterisk: the protocol the set is known by, or that was asked for.", ""]
    lines += [f"- {rule}: {PROTOCOLS[rule]}." for rule in used]
    return "\n".join(lines) + "\n"


def _beside(found: Sequence[SetResult], headline: Sequence[str]) -> str:
    public = [one for one in found if one.name in TEST_SETS]

    def rows(table: Sequence[Row]) -> list[str]:
        return [
            f"| {who} | {' | '.join(f'{values[one.name]:.2f}' if one.name in values else '' for one in public)} |"
            for who, values in table
        ]

    ours = [
        f"| **this reward, {reading}** | {' | '.join(str(one.per_reading[reading]) for one in public)} |"
        for reading in headline
    ]
    lines = [
        "## Beside what others report", "",
        f"| reward | {' | '.join(f'{one.name}, {one.protocol}' for one in public)} |",
        f"|---|{'---:|' * len(public)}", *ours,
        f"| *DiNa-LRM's paper* |{' |' * len(public)}", *rows(PAPER),
        f"| *HPSv3's repository* |{' |' * len(public)}", *rows(HPSV3), "",
        "Others measured under protocols and picture sizes of their own, which not all of them publish; the two tables "
        "disagree on HPSv3 by up to 0.9.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _leak(one: SetResult) -> str:
    leak, total = one.leak, len(one.judged.label)
    counts = {"prompt": leak.prompt, f"picture (compared by {leak.by})": leak.picture, "either": leak.any}
    told = ", ".join(f"{int(which.sum())} by {what}" for what, which in counts.items())
    lines = [f"## Trained on, of {one.name}", "", f"Of {total} pairs were trained on: {told}.", ""]
    if not one.without:
        return "\n".join([*lines, "No pair is left without them."]) + "\n"
    lines += ["| read at | all pairs | pairs not trained on |", "|---|---:|---:|"]
    lines += [
        f"| {reading} | {one.per_reading[reading]} | {value} ({value.pairs} pairs) |"
        for reading, value in one.without.items()
    ]
    return "\n".join(lines) + "\n"


def _faults(one: SetResult) -> str:
    lines = [f"## Left out, of {one.name}", "", f"{len(one.faults)} pictures have no score, nor have their pairs:", ""]
    shown = list(one.faults.items())[:10]
    lines += [f"- {name}: {fault}" for name, fault in shown]
    if len(one.faults) > len(shown):
        lines.append(f"- and {len(one.faults) - len(shown)} more, in judged_{one.name}.faults.json")
    return "\n".join(lines) + "\n"


def numbers(found: Sequence[SetResult]) -> dict[str, object]:
    """JSON-ready: set -> protocol, accuracies, leak, faults."""
    return {
        one.name: {
            "protocol": one.protocol,
            "readings": {reading: _rounded(value) for reading, value in one.per_reading.items()},
            "protocols": [
                {"protocol": rule, "read_at": reading, **_rounded(value)}
                for (rule, reading), value in one.per_protocol.items()
            ],
            "pictures_left_out": len(one.faults),
            "trained_on": None if one.leak is None else {
                "pairs_by_prompt": int(one.leak.prompt.sum()), "pairs_by_picture": int(one.leak.picture.sum()),
                "pairs": int(one.leak.any.sum()), "compared_by": one.leak.by,
                "without": {reading: _rounded(value) for reading, value in one.without.items()},
            },
        }
        for one in found
    }  # fmt: skip


def _rounded(value: Accuracy) -> dict[str, float | int | None]:
    return {
        name: each if isinstance(each, int) else None if np.isnan(each) else round(each, 5)
        for name, each in asdict(value).items()
    }


def write_pairs(judged: PairScores, path: Path) -> None:
    """One pair a line: prompt, both pictures, the raters' label for the first, both scores in every reading."""
    lines = []
    for row, (first, second) in enumerate(zip(judged.chosen.tolist(), judged.rejected.tolist(), strict=True)):
        names = (first, second) if judged.pictures is None else (judged.pictures[first], judged.pictures[second])
        record = {
            "prompt": int(judged.caption[row]) if judged.prompts is None else judged.prompts[judged.caption[row]],
            "first": names[0], "second": names[1], "label": float(judged.label[row]),
            "scores": {
                name: [float(values[first]), float(values[second])] for name, values in judged.scores.items()
            },
        }  # fmt: skip
        lines.append(json.dumps(record, ensure_ascii=False))
    write_atomically(path, "\n".join(lines) + "\n")


def plot_levels(found: Sequence[SetResult], path: Path) -> None:
    """Accuracy against the level a reward is read at, with its interval; ensembles, and the paper's, as lines."""
    figure = Figure(figsize=(5 * len(found), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, one in zip(panels, found, strict=True):
        levels = sorted((float(name), value) for name, value in one.per_reading.items() if "+" not in name)
        sigmas, values = zip(*levels, strict=True)
        axis.plot(sigmas, [100 * value.value for value in values], marker="o", markersize=3, label="one level")
        low, high = [100 * value.low for value in values], [100 * value.high for value in values]
        axis.fill_between(sigmas, low, high, alpha=0.15, linewidth=0)
        for index, (name, value) in enumerate((n, v) for n, v in one.per_reading.items() if "+" in n):
            axis.axhline(100 * value.value, color=f"C{index + 1}", linestyle="--", label=f"{name}, tokens")
        for index, (who, theirs) in enumerate(PAPER[:2]):
            if one.name in theirs:
                style = (":", "-.")[index]
                axis.axhline(theirs[one.name], color="grey", linestyle=style, linewidth=1, label=f"paper: {who}")
        axis.set(title=f"{one.name}, {one.protocol}", xlabel="sigma the reward is read at", ylabel="accuracy, per cent")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)
