"""The summary of a finished run: summary.json, and the gains in words."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinalrm_align.align.resolve import Resolved
from dinalrm_align.align.signal import SignalCheck
from dinalrm_align.eval.report.parts import PREFIX, by_main_part, part_names
from dinalrm_align.reward.names import gold_rewards
from dinalrm_align.train.files import write_atomically
from dinalrm_align.train.metrics import METRICS, read_metrics


def summarise(
    resolved: Resolved[Any],
    scores: Mapping[str, Mapping[str, float]],
    facts: Mapping[str, object],
    *,
    signal: SignalCheck,
) -> None:
    """Write summary.json, with the entries `facts`, and print the gain of each of `HeldOut.summarise`'s scores."""
    run, folder = resolved.run, Path(resolved.run.output_dir)
    what = {"recipe": resolved.recipe, "model": resolved.spec.name, "reward": run.reward, "seed": run.seed}
    alarms = [int(row["step"]) for row in read_metrics(folder / METRICS) if row.get("hacking")]
    summary = {**what, **facts, **scores, "hacking_alarm": alarms[0] if alarms else None, **signal.counts()}
    write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
    lora = f"LoRA: {folder / 'lora'} (weights: {facts['weights']})"
    print(f"images: {folder / 'before_after.png'}; curves: {folder / 'curves.png'}; {lora}")
    named = {"proxy", *gold_rewards(run.gold, resolved.spec.gold)}
    for name, score in ((name, score) for name, score in scores.items() if name in named):
        gain = f"gain {score['gain']:+.4f}, standard error over prompts {score['standard_error']:.4f}"
        print(f"{name} {score['before']:.4f} -> {score['after']:.4f}: {gain}")
        for line in parts_in_words(scores) if name == "gold" else ():
            print(line)
    signal.conclude()


def parts_in_words(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return lines on the parts of gold in `scores`: a heading, then each main part with its components; or no line."""

    def gain(part: str) -> str:
        return f"{scores[PREFIX + part]['gain']:+.3f} ± {scores[PREFIX + part]['standard_error']:.3f}"

    lines = []
    for main, components in by_main_part(part_names(scores)).items():
        score, inner = scores[PREFIX + main], [f"{part.removeprefix(f'{main}/')} {gain(part)}" for part in components]
        whole = f"  {main} {score['before']:.3f} -> {score['after']:.3f} ({gain(main)})"
        lines.append(whole + (f": {', '.join(inner)}" if inner else ""))
    return ["parts of gold (gain ± standard error over prompts):", *lines] if lines else []
