"""Write the report of one reward: evaluation.md, evaluation.json, figures, and the scores of every pair.

For each test set, the report gives the accuracy at each noise level and under each protocol, published accuracies, the
overlap with the training data, and the images without a score.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dinalrm_align.data.formats.record import INVALID
from dinalrm_align.eval.ablation import SINGLE_LEVEL, Evidence, accuracy_of, arm_mean, inference_section, written
from dinalrm_align.eval.calibration import calibration_section, reliabilities
from dinalrm_align.eval.config import EvaluateRun
from dinalrm_align.eval.plots import draw_band, panels, plot_inference, plot_reliability
from dinalrm_align.eval.protocols import Accuracy, accuracy
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NO_NOISE, NoiseLevels, PairScores
from dinalrm_align.eval.test_sets import Leak
from dinalrm_align.eval.test_sets_config import HPSV3, PAPER, PROTOCOLS, TEST_SETS, default_protocol, protocols_of
from dinalrm_align.train.files import save_figure, write_atomically

REWARD = "reward"  # name of the evaluated reward where `eval.ablation` expects an arm
SHOWN_FAULTS = 10


@dataclass(frozen=True)
class SetResult:
    """Results on one test set.

    protocol: accuracy protocol: the requested one, or else the default of the test set.
    per_level: noise level -> accuracy under `protocol`.
    per_protocol: (protocol, noise level) -> accuracy, for all protocols of the set, at its `main_levels`.
    leak: overlap of the test pairs with the training data; None if not requested.
    without_leak: main noise level -> accuracy under `protocol` on the pairs that the reward was not trained on.
    faults: name of an image without a score, or message on an invalid record -> reason.
    """

    name: str
    scores: PairScores
    protocol: str
    per_level: dict[str, Accuracy]
    per_protocol: dict[tuple[str, str], Accuracy]
    leak: Leak | None
    without_leak: dict[str, Accuracy]
    faults: Mapping[str, str]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.protocol}"


def evaluate_set(
    name: str, scores: PairScores, config: EvaluateRun, *, leak: Leak | None, faults: Mapping[str, str]
) -> SetResult:
    """Compute all results on a test set. The protocol is the one in `config.protocol`, or else the set's default."""
    protocol, levels = config.protocol.get(name, default_protocol(name)), main_levels(config, scores)

    def at(rule: str, level: str, of: PairScores = scores) -> Accuracy:
        return accuracy(of, rule, level, draws=config.bootstrap)

    without_leak = {}
    if leak is not None and not leak.any.all():
        clean = scores.subset(~leak.any)
        without_leak = {level: at(protocol, level, clean) for level in levels}
    per_level = {level: at(protocol, level) for level in scores.scores}
    per_protocol = {(rule, level): at(rule, level) for rule in protocols_of(name) for level in levels}
    return SetResult(name, scores, protocol, per_level, per_protocol, leak, without_leak, faults)


def write(
    results: Sequence[SetResult], gold: Mapping[str, float], config: EvaluateRun, *, command: str, directory: Path
) -> None:
    """Write the report of a reward. Noise levels and calibration are reported for latent rewards only.

    gold: name of a test set -> accuracy of the gold score; empty if not evaluated. Calibration is measured on the first
    set.
    """
    sets = {result.name: result.scores for result in results}
    evidence = Evidence({REWARD: {0: sets}}, list(sets), sorted(config.sigmas), config.ensembles)
    first, levels = results[0].name, main_levels(config, results[0].scores)
    values: dict[str, object] = {"command": command, "sets": {result.name: _numbers(result) for result in results}}
    values["accuracy"] = {
        name: {level: round(scores.accuracy(level), 5) for level in scores.scores} for name, scores in sets.items()
    }
    sizes = "; ".join(f"{name}: {scores.size}" for name, scores in sets.items())
    sections = [
        f"# Evaluation of a reward\n\n`{command}`\n\nReward {config.reward or f'of {config.model}'}. Evaluated on "
        f"{sizes}. Pairwise accuracy in per cent, 95 % intervals over captions; with one reward, the variance between "
        "seeds is unknown.\n"
    ]
    if gold:
        found = ", ".join(f"{100 * value:.1f} on {name}" for name, value in gold.items())
        text = f"Accuracy of the gold score on decoded latents: {found}. Labels are noisy; decoding is lossy.\n"
        sections.append(text)
    sections += _set_sections(results, levels)
    concepts = [_concept_section(name, evidence) for name, scores in sets.items() if scores.concept is not None]
    if levels == [NO_NOISE.name]:
        sections += concepts
    else:
        curves = reliabilities(evidence.runs, {REWARD: config.loss}, first, config.calibrated_at)
        sections += [
            "![Accuracy against sigma](accuracy_vs_sigma.png)\n",
            inference_section(evidence, REWARD),
            "![Noise levels at inference](inference.png)\n",
            *concepts,
            calibration_section(curves, first),
            "![Reliability](reliability.png)\n",
        ]
        plot_levels(results, directory / "accuracy_vs_sigma.png")
        plot_inference(evidence, REWARD, directory / "inference.png")
        plot_reliability(curves, directory / "reliability.png")
        values["calibration"] = {
            f"{sigma:g}": dict(
                error=round(one.reliability.error, 5),
                best_scale=round(one.scale, 4) if math.isfinite(one.scale) else None,  # JSON has no infinity
                nll=round(one.nll, 5),
            )
            for sigma, one in curves[REWARD].items()
        }
    for name, scores in sets.items():
        _write_pairs(scores, directory / f"pairs_{name}.jsonl")
    values["gold"] = {name: round(value, 5) for name, value in gold.items()}
    write_atomically(directory / "evaluation.md", "\n".join(sections))
    write_atomically(directory / "evaluation.json", json.dumps(values, indent=1) + "\n")


def main_levels(config: EvaluateRun, scores: PairScores) -> list[str]:
    """Return the names of the main noise levels: sigma 0.4 and the first ensemble, or "score" if no noise is used."""
    if NO_NOISE.name in scores.scores:
        return [NO_NOISE.name]
    return [NoiseLevels.at(SINGLE_LEVEL).name, NoiseLevels.at(*config.ensembles[0]).name]


def _concept_section(name: str, evidence: Evidence) -> str:
    """Return a Markdown section with accuracy per noise level and concept (what the two images of a pair differ in)."""
    scores = evidence.runs[REWARD][0][name]
    levels = sorted(scores.scores, key=lambda level: ("+" in level, level))
    header = ["concept", "pairs", *(level if level == NO_NOISE.name else f"sigma {level}" for level in levels)]
    overall = [written(arm_mean(evidence, REWARD, name, accuracy_of(level)), signed=False) for level in levels]
    rows = [["all", len(scores.label), *overall]]
    concepts = np.array(scores.concept)
    for concept in sorted({*scores.concept}):
        here = concepts == concept
        rows.append(
            [concept, here.sum(), *(f"{100 * np.nanmean(scores.correct(level)[here]):.1f}" for level in levels)]
        )
    return f"## By concept, on {name}\n\n{table(header, rows)}\n"


def _set_sections(results: Sequence[SetResult], main_levels: Sequence[str]) -> list[str]:
    """Return Markdown sections on accuracy, protocols, published values, training overlap and unscored images."""
    levels = dict.fromkeys(level for result in results for level in result.per_level)
    rows = [[level, *(result.per_level.get(level, "") for result in results)] for level in levels]
    sections = [
        "## Accuracy\n\nPer cent, 95 % bootstrap intervals over prompts; rows are noise levels, several joined as "
        f"tokens.\n\n{table(['noise level', *(result.title for result in results)], rows)}\n",
        _protocols(results, main_levels),
    ]
    public = [result for result in results if result.name in TEST_SETS]
    if public:
        sections.append(_published(public, main_levels))
    sections += [_leak(result, result.leak) for result in results if result.leak is not None]
    return sections + [_faults(result) for result in results if result.faults]


def _protocols(results: Sequence[SetResult], main_levels: Sequence[str]) -> str:
    used = [rule for rule in PROTOCOLS if any((rule, main_levels[0]) in result.per_protocol for result in results)]
    columns = [(result, level) for result in results for level in main_levels]
    rows = []
    for rule in used:
        values = [(result.per_protocol.get((rule, level), ""), rule == result.protocol) for result, level in columns]
        rows.append([rule, *(f"{value}{' *' * own}" for value, own in values)])
    header = ["protocol", *(f"{result.name} at {level}" for result, level in columns)]
    rules = "\n".join(f"- {rule}: {PROTOCOLS[rule]}." for rule in used)
    return (
        f"## The same scores under every protocol\n\n{table(header, rows)}\n\n"
        f"An asterisk marks the set's own protocol, or the requested one.\n\n{rules}\n"
    )


def _published(results: Sequence[SetResult], main_levels: Sequence[str]) -> str:
    rows = [[f"**this reward, {level}**", *(result.per_level[level] for result in results)] for level in main_levels]
    for source, entries in (("DiNa-LRM's paper", PAPER), ("HPSv3's repository", HPSV3)):
        rows.append([f"*{source}*", *("" for _ in results)])
        for reward, row in entries:
            rows.append([reward, *(f"{row[result.name]:.2f}" if result.name in row else "" for result in results)])
    return (
        f"## Published values\n\n{table(['reward', *(result.title for result in results)], rows)}\n\n"
        "Protocols and image sizes of the published values differ and are not always stated; the two tables disagree "
        "on HPSv3 by up to 0.9.\n"
    )


def _leak(result: SetResult, leak: Leak) -> str:
    counts = {"prompt": leak.prompt, f"image (compared by {leak.by})": leak.image, "either": leak.any}
    overlap = ", ".join(f"{int(which.sum())} by {what}" for what, which in counts.items())
    title = f"## Overlap with training data, {result.name}"
    text = f"{title}\n\nOf {len(result.scores.label)} pairs were trained on: {overlap}.\n\n"
    if not result.without_leak:
        return f"{text}All pairs were trained on.\n"
    found = result.without_leak.items()
    rows = [[level, result.per_level[level], f"{value} ({value.pairs} pairs)"] for level, value in found]
    return text + table(["noise level", "all pairs", "pairs not trained on"], rows) + "\n"


def _faults(result: SetResult) -> str:
    more = len(result.faults) - SHOWN_FAULTS
    lines = [f"- {name}: {fault}" for name, fault in list(result.faults.items())[:SHOWN_FAULTS]]
    lines += [f"- and {more} more, in scores_{result.name}.faults.json"] * (more > 0)
    what = "images or records" if INVALID in result.faults.values() else "images"
    title = f"## Left out, {result.name}\n\n{len(result.faults)} {what} have no score; their pairs are left out:\n\n"
    return title + "\n".join(lines) + "\n"


def _numbers(result: SetResult) -> dict[str, object]:
    """Return the results on one test set as JSON-serialisable values for evaluation.json."""
    return {
        "protocol": result.protocol,
        "readings": {level: _rounded(value) for level, value in result.per_level.items()},
        "protocols": [
            {"protocol": rule, "read_at": level, **_rounded(value)}
            for (rule, level), value in result.per_protocol.items()
        ],
        "images_left_out": len(result.faults),
        "trained_on": None if result.leak is None else {
            "pairs_by_prompt": int(result.leak.prompt.sum()), "pairs_by_image": int(result.leak.image.sum()),
            "pairs": int(result.leak.any.sum()), "compared_by": result.leak.by,
            "without": {level: _rounded(value) for level, value in result.without_leak.items()},
        },
    }  # fmt: skip


def _rounded(value: Accuracy) -> dict[str, float | int | None]:
    return {name: None if np.isnan(each) else round(each, 5) for name, each in asdict(value).items()}


def _write_pairs(scores: PairScores, path: Path) -> None:
    """Write one line of JSON for each pair: prompt, image names, label, and both images' scores at all noise levels."""
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
    """Plot accuracy with intervals against sigma. Horizontal lines show ensembles and the DiNa-LRM paper's values."""
    figure, axes = panels([result.title for result in results], (5, 4.2), "noise level sigma", "accuracy, per cent")
    for axis, result in zip(axes, results, strict=True):
        ensembles = {name: value for name, value in result.per_level.items() if "+" in name}
        single = sorted((float(name), value) for name, value in result.per_level.items() if name not in ensembles)
        points = [(value.value, value.low, value.high) for _, value in single]
        draw_band(axis, [sigma for sigma, _ in single], points, "single level")
        for index, (name, value) in enumerate(ensembles.items(), start=1):
            axis.axhline(100 * value.value, color=f"C{index}", linestyle="--", label=f"{name}, tokens")
        for style, (reward, published) in zip((":", "-."), PAPER, strict=False):
            if result.name in published:
                label = f"paper: {reward}"
                axis.axhline(published[result.name], color="grey", linestyle=style, linewidth=1, label=label)
        axis.legend(fontsize=7)
    save_figure(figure, path)
