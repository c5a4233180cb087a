"""Folders of alignment runs with made-up metrics and scores."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dinalrm_align.models.grids import save_strip

PROMPTS = ["a red circle", "a blue <square>", "a red circle", "a blue <square>"]
GOLD, PROXY = [1.0, 2.0, 1.0, 2.0], [10.0, 30.0, 10.0, 30.0]  # the base model's scores; s.d. of the proxy 10


def make_run(
    folder: Path, gains: float | Mapping[int, Sequence[float]], *, seed: int = 0, recipe: str = "refl_sd35",
    reward: str = "dinalrm", lr: float = 1e-3, profiled: Sequence[int] = (), gflops: float = 2.0,
    alarm: int | None = None, extra: Mapping[str, float] | None = None, evaluators: Sequence[str] = (),
    parts: Sequence[str] = (), **terms: object,
) -> Path:  # fmt: skip
    """A run whose updates take 2 seconds, and 6 when profiled.

    gains: evaluated update -> gold gain of each of the four samples; a number stands for four updates, evaluated at 2
    and 4, with that mean gain at 4 and half of it at 2. The proxy and further evaluators gain ten times as much, parts
    of gold half as much.
    """
    if not isinstance(gains, Mapping):
        gains = {step: np.array([-1, 1, 1, -1]) * 0.1 + gains * step / 4 for step in (2, 4)}
    (folder / "evaluations").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"model: shapes\nreward: {reward}\nseed: {seed}\noptim:\n  lr: {lr}\nloop:\n  keep_last: {seed + 1}\n"
    )
    terms = {"prompts": PROMPTS, "seed": 1234, "shown": 2, **terms}
    rows, elapsed = [], 0.0
    for step in range(max(gains) + 1):
        row = {"step": step}
        if step:
            elapsed += 6.0 if step in profiled else 2.0
            row |= {"elapsed": elapsed, "kl": 0.01 * step, "memory_mib/backward": 10.0 * (seed + 1) + step}
            row |= (
                {"gflops/rollout": gflops * step, "gflops/backward": 3.0}
                if step in profiled
                else {"seconds/rollout": 1.5, "seconds/backward": 0.5}
            )
        if step in gains or step == 0:
            gain = np.array(gains.get(step, [0.0] * 4))
            scores = {"gold": (GOLD + gain).tolist(), "proxy": (PROXY + 10 * gain).tolist()}
            row |= {name: float(np.mean(values)) for name, values in scores.items()} | dict(extra or {})
            row |= {"hacking": float(step >= alarm)} if alarm is not None else {}
            scores |= {f"gold/{name}": scores["proxy"] for name in evaluators}
            scores |= {f"gold_parts/{name}": (gain / 2 + 0.5).tolist() for name in parts}
            (folder / "evaluations" / f"{step:06d}.json").write_text(json.dumps({"terms": terms, **scores}))
            strip = np.full((terms["shown"], 8, 8, 3), (40 * step + 10 * seed) % 256, dtype=np.uint8)
            save_strip(strip, folder / "evaluations" / f"{step:06d}.png")
        rows.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "summary.json").write_text(json.dumps({"recipe": recipe, "seed": seed}))
    return folder


def make_four_runs(folder: Path) -> list[Path]:
    """ReFL with two rewards, two seeds of the first; GRPO once, hacked at update 4, with a drift."""
    return [
        make_run(folder / "a0", 0.4), make_run(folder / "a1", 0.6, seed=1),
        make_run(folder / "b0", 0.1, reward="pixel"),
        make_run(folder / "c0", -0.4, recipe="grpo_sd35", alarm=4, extra={"drift": 0.3}),
    ]  # fmt: skip
