"""Results of a reward on test sets: accuracy per noise level and protocol, published values, overlap with training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dinalrm_align.eval.leakage import Leak
from dinalrm_align.eval.protocols import Accuracy, accuracy
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import PairScores
from dinalrm_align.eval.test_sets_config import HPSV3, PAPER, PROTOCOLS, TEST_SETS, Row, default_protocol, protocols_of
from dinalrm_align.train.files import save_figure, write_atomically

SHOWN_FAULTS = 10


@dataclass(frozen=True)
class SetResult:
    """Results on one set.

    Args:
        name: of the set.
        scores: of its pairs.
        protocol: the set's own, or the requested one.
        per_level: accuracy under `protocol`, by noise level.
        per_protocol: accuracy at the main noise levels, by (protocol, noise level).
        leak: pairs that were trained on; None if not requested.
        without_leak: accuracy under `protocol` at the main noise levels on pairs that were not trained on.
        faults: images without a score, with the reason.
    """

    name: str
    scores: PairScores
    protocol: str
    per_level: dict[str, Accuracy]
    per_protocol: dict[tuple[str, str], Accuracy]
    leak: Leak | None = None
    without_leak: dict[str, Accuracy] = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name}, {self.protocol}"


def evaluate_set(
    name: str,
    scores: PairScores,
    main_levels: Sequence[str],
    *,
    protocol: str | None = None,
    leak: Leak | None = None,
    faults: Mapping[str, str] | None = None,
    draws: int,
) -> SetResult:
    """All results on one set. protocol: default: the set's own. draws: bootstrap resamples."""
    protocol = protocol or default_protocol(name)

    def at(rule: str, level: str, of: PairScores = scores) -> Accuracy:
        return accuracy(of, rule, level, draws=draws)

    without_leak = {}
    if leak is not None and not leak.any.all():
        clean = subset(scores, ~leak.any)
        without_leak = {level: at(protocol, level, clean) for level in main_levels}
    return SetResult(
        name=name,
        scores=scores,
        protocol=protocol,
        per_level={level: at(protocol, level) for level in scores.scores},
        per_protocol={(rule, level): at(rule, level) for rule in protocols_of(name) for level in main_levels},
        leak=leak,
        without_leak=without_leak,
        faults=faults or {},
    )


def subset(scores: PairScores, kept: np.ndarray) -> PairScores:
    """The same scores with the pairs where kept (N,) bool is true."""
    columns = {
        name: vars(scores)[name][kept] for name in ("chosen", "rejected", "label", "caption", "group")
        if vars(scores)[name] is not None
    }  # fmt: skip
    concept = None if scores.concept is None else tuple(np.array(scores.concept)[kept].tolist())
    return replace(scores, **columns, concept=concept)


def section(results: Sequence[SetResult], main_levels: Sequence[str]) -> str:
    """Markdown: accuracy per noise level, under every protocol, beside published values, and what was left out."""
    parts = [_levels(results), _protocols(results, main_levels)]
    public = [result for result in results if result.name in TEST_SETS]
    if public:
        parts.append(_published(public, main_levels))
    parts += [_leak(result) for result in results if result.leak is not None]
    parts += [_faults(result) for result in results if result.faults]
    return "\n".join(parts)


def _levels(results: Sequence[SetResult]) -> str:
    levels = dict.fromkeys(level for result in results for level in result.per_level)
    rows = [[level, *(result.per_level.get(level, "") for result in results)] for level in levels]
    return (
        "## Accuracy\n\nPer cent, 95 % bootstrap intervals over prompts; rows are noise levels, several joined as "
        f"tokens.\n\n{table(['noise level', *(result.title for result in results)], rows)}\n"
    )


def _protocols(results: Sequence[SetResult], main_levels: Sequence[str]) -> str:
    used = [rule for rule in PROTOCOLS if any((rule, main_levels[0]) in result.per_protocol for result in results)]
    columns = [(result, level) for result in results for level in main_levels]

    def cell(result: SetResult, level: str, rule: str) -> str:
        value = result.per_protocol.get((rule, level))
        return "" if value is None else f"{value}{' *' * (rule == result.protocol)}"

    header = ["protocol", *(f"{result.name} at {level}" for result, level in columns)]
    rows = [[rule, *(cell(result, level, rule) for result, level in columns)] for rule in used]
    rules = "\n".join(f"- {rule}: {PROTOCOLS[rule]}." for rule in used)
    return (
        f"## The same scores under every protocol\n\n{table(header, rows)}\n\n"
        f"An asterisk marks the set's own protocol, or the requested one.\n\n{rules}\n"
    )


def _published(results: Sequence[SetResult], main_levels: Sequence[str]) -> str:
    def published(source: str, entries: Sequence[Row]) -> list[list[object]]:
        values = [
            [reward, *(f"{row[result.name]:.2f}" if result.name in row else "" for result in results)]
            for reward, row in entries
        ]
        return [[f"*{source}*", *("" for _ in results)], *values]

    rows = [[f"**this reward, {level}**", *(result.per_level[level] for result in results)] for level in main_levels]
    rows += published("DiNa-LRM's paper", PAPER) + published("HPSv3's repository", HPSV3)
    return (
        f"## Published values\n\n{table(['reward', *(result.title for result in results)], rows)}\n\n"
        "Protocols and image sizes of the published values differ and are not always stated; the two tables disagree "
        "on HPSv3 by up to 0.9.\n"
    )


def _leak(result: SetResult) -> str:
    leak, total = result.leak, len(result.scores.label)
    counts = {"prompt": leak.prompt, f"image (compared by {leak.by})": leak.image, "either": leak.any}
    overlap = ", ".join(f"{int(which.sum())} by {what}" for what, which in counts.items())
    text = f"## Overlap with training data, {result.name}\n\nOf {total} pairs were trained on: {overlap}.\n\n"
    if not result.without_leak:
        return f"{text}All pairs were trained on.\n"
    rows = [
        [level, result.per_level[level], f"{value} ({value.pairs} pairs)"]
        for level, value in result.without_leak.items()
    ]
    return text + table(["noise level", "all pairs", "pairs not trained on"], rows) + "\n"


def _faults(result: SetResult) -> str:
    more = len(result.faults) - SHOWN_FAULTS
    lines = [f"- {name}: {fault}" for name, fault in list(result.faults.items())[:SHOWN_FAULTS]]
    lines += [f"- and {more} more, in judged_{result.name}.faults.json"] * (more > 0)
    return (
        f"## Left out, {result.name}\n\n{len(result.faults)} images have no score; their pairs are left out:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def numbers(results: Sequence[SetResult]) -> dict[str, object]:
    """JSON-serialisable: set -> protocol, accuracies, overlap with training data, number of faults."""
    return {
        result.name: {
            "protocol": result.protocol,
            "readings": {level: _rounded(value) for level, value in result.per_level.items()},
            "protocols": [
                {"protocol": rule, "read_at": level, **_rounded(value)}
                for (rule, level), value in result.per_protocol.items()
            ],
            "pictures_left_out": len(result.faults),
            "trained_on": None if result.leak is None else {
                "pairs_by_prompt": int(result.leak.prompt.sum()), "pairs_by_picture": int(result.leak.image.sum()),
                "pairs": int(result.leak.any.sum()), "compared_by": result.leak.by,
                "without": {level: _rounded(value) for level, value in result.without_leak.items()},
            },
        }
        for result in results
    }  # fmt: skip


def _rounded(value: Accuracy) -> dict[str, float | int | None]:
    return {
        name: each if isinstance(each, int) else None if np.isnan(each) else round(each, 5)
        for name, each in asdict(value).items()
    }


def write_pairs(scores: PairScores, path: Path) -> None:
    """Write one JSON line per pair: prompt, both images, the label of the first, both scores at every noise level."""
    lines = []
    for row, (first, second) in enumerate(zip(scores.chosen.tolist(), scores.rejected.tolist(), strict=True)):
        names = (first, second) if scores.images is None else (scores.images[first], scores.images[second])
        record = {
            "prompt": int(scores.caption[row]) if scores.prompts is None else scores.prompts[scores.caption[row]],
            "first": names[0], "second": names[1], "label": float(scores.label[row]),
            "scores": {
                name: [float(values[first]), float(values[second])] for name, values in scores.scores.items()
            },
        }  # fmt: skip
        lines.append(json.dumps(record, ensure_ascii=False))
    write_atomically(path, "\n".join(lines) + "\n")


def plot_levels(results: Sequence[SetResult], path: Path) -> None:
    """Accuracy and its interval against the noise level; ensembles and the paper's values as horizontal lines."""
    figure = Figure(figsize=(5 * len(results), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axis, result in zip(panels, results, strict=True):
        ensembles = {name: value for name, value in result.per_level.items() if "+" in name}
        single = sorted((float(name), value) for name, value in result.per_level.items() if name not in ensembles)
        sigmas, values = zip(*single, strict=True)
        axis.plot(sigmas, [100 * value.value for value in values], marker="o", markersize=3, label="single level")
        low, high = [100 * value.low for value in values], [100 * value.high for value in values]
        axis.fill_between(sigmas, low, high, alpha=0.15, linewidth=0)
        for index, (name, value) in enumerate(ensembles.items(), start=1):
            axis.axhline(100 * value.value, color=f"C{index}", linestyle="--", label=f"{name}, tokens")
        for style, (reward, published) in zip((":", "-."), PAPER, strict=False):
            if result.name in published:
                accuracy_there, label = published[result.name], f"paper: {reward}"
                axis.axhline(accuracy_there, color="grey", linestyle=style, linewidth=1, label=label)
        axis.set(title=result.title, xlabel="noise level sigma", ylabel="accuracy, per cent")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save_figure(figure, path)
