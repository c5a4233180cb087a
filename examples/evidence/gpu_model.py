"""Count kernels, bytes and FLOPs of one update of every alignment recipe for SD3.5 Medium, and model its time.

    python examples/evidence/gpu_model.py examples/results          writes gpu_model.md and gpu_model.json there

An update is broken down into forwards of the policy, with and without gradient, and calls of the reward, as often as
the settings of the recipe for sd35 say. Each kind is counted on full-size networks without weights
(`dinalrm_align.align.savings`) at a few batch sizes; other sizes are interpolated. Nothing is measured, and no GPU is
needed.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from tqdm import tqdm

from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import settings_files
from dinalrm_align.align.savings import cost as counting
from dinalrm_align.align.savings.config import FULL, Case
from dinalrm_align.align.savings.cost import Cost, FakeFloats
from dinalrm_align.align.savings.workloads import build_networks
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.models.specs import MODELS
from dinalrm_align.train.command import parse

RECIPES = Path(__file__).parents[2] / "recipes"
RUNS = {"refl": ReflRun, "dpo": DpoRun, "grpo": GrpoRun, "lpo": LpoRun, "nft": NftRun}
SPEC = MODELS["sd35"]
SIZES, CARD, GIB, TERA = (512, 1024), 80, 2**30, 1e12
PICKSCORE = 985_978_369 * 4 / GIB
"""GiB of the gold judge's weights, CLIP ViT-H/14 in float32."""
PHASES = ("rollout", "scores", "gradient", "other forwards", "evaluations")
ANCHORS = {
    "policy_forward": (2, 8, 32),
    "policy_gradient": (2, 4, 12),
    "score": (4, 16),
    "gradient": (4,),
    "refl": (4,),
}
"""Batch sizes at which each kind of work is counted."""


@dataclass(frozen=True)
class Work:
    """Work of one kind. half: the forwards use a bfloat16 copy of the policy's float32 LoRA."""

    kind: str
    batch: int
    size: int = SPEC.height
    recompute: bool = False
    half: bool = True

    def count(self) -> Cost:
        case = Case(work=self.kind, batch=self.batch, size=self.size, text_length=SPEC.text_length)
        case = case.but(policy_checkpointing=self.recompute, reward_checkpointing=self.recompute, vae_dtype="float32")
        if self.half:
            return counting.count(case, FULL)
        with mock.patch("dinalrm_align.align.policy.Shadows"):  # the LoRA's own float32 weights
            return counting.count(case, FULL)


class Costs:
    """Costs of work at any batch size. Costs are counted when first needed and at `ANCHORS`, else interpolated."""

    def __init__(self, progress: tqdm) -> None:
        self.counted: dict[Work, Cost] = {}
        self.progress = progress

    def __call__(self, work: Work) -> Cost:
        anchors = ANCHORS.get(work.kind, (work.batch,))
        if work.batch in anchors:
            return self._anchor(work)
        above = next((place for place, batch in enumerate(anchors) if batch > work.batch), len(anchors) - 1)
        low, high = anchors[above - 1 : above + 1]
        first, second = (self._anchor(dataclasses.replace(work, batch=batch)) for batch in (low, high))
        share = (work.batch - low) / (high - low)
        values = {f.name: getattr(first, f.name) for f in fields(Cost)}
        return Cost(**{name: value + share * (getattr(second, name) - value) for name, value in values.items()})

    def _anchor(self, work: Work) -> Cost:
        if work not in self.counted:
            self.counted[work] = work.count()
            self.progress.update()
        return self.counted[work]


@dataclass(frozen=True)
class Part:
    """A kind of work in an update, and how often it is done, on average."""

    phase: str
    work: Work
    times: float


@dataclass(frozen=True)
class Variant:
    """What differs between the rows of the report."""

    half: bool = True
    recompute: bool = False
    draws_at_once: int | None = None
    sample_batch: int | None = None
    steps_per_rollout: int = 1


def starts_mean(most: int, low: int, high: int) -> float:
    """Return the mean of the largest of `most` different steps from low to high: one gradient step each."""
    return low - 1 + most * (high - low + 2) / (most + 1)


class Update:
    """The parts of a recipe's update. `size`: height and width of the images."""

    def __init__(self, name: str, run: Any, variant: Variant, size: int) -> None:
        self.name, self.run, self.variant, self.size = name, run, variant, size

    def part(self, phase: str, kind: str, batch: int, times: float) -> Part:
        recompute = self.variant.recompute and "gradient" in kind
        half = self.variant.half or not kind.startswith("policy")
        return Part(phase, Work(kind, batch, self.size, recompute, half), times)

    def rows(self, batch: int, scale: float | None) -> int:
        return batch * (2 if (SPEC.guidance_scale if scale is None else scale) > 1 else 1)

    def __iter__(self) -> Iterator[Part]:
        yield from getattr(self, self.name)(getattr(self.run, self.name), self.run.loop.accumulate)
        shown = self.run.evaluation
        every = shown.every or self.run.loop.steps
        batches, steps = shown.samples / shown.batch_size / every, shown.num_steps or SPEC.num_steps
        rows = self.rows(shown.batch_size, shown.guidance_scale)
        yield self.part("evaluations", "policy_forward", rows, batches * steps)
        yield self.part("evaluations", "vae_decode", 4, shown.samples / 4 / every)

    def refl(self, config: Any, accumulate: int) -> Iterator[Part]:
        variant, low = self.variant, round(config.earliest * SPEC.num_steps)
        shared, batch = variant.steps_per_rollout, config.batch_size
        together = max(1, (variant.sample_batch or config.sample_batch or batch) // batch)
        mean = starts_mean(shared, low, SPEC.num_steps - 1)
        times = (
            accumulate / shared / together * mean
        )  # batches shrink after step 30: as many rows, counted as whole ones
        yield self.part("rollout", "policy_forward", self.rows(batch * together, config.guidance_scale), times)
        yield self.part("gradient", "policy_gradient", batch, accumulate)
        yield self.part("gradient", "gradient", batch, accumulate)

    def dpo(self, config: Any, accumulate: int) -> Iterator[Part]:
        size = min(config.sample_batch or config.group_size, config.group_size)
        batches = accumulate * config.batch_size * config.group_size / size
        steps = config.num_steps or SPEC.num_steps
        yield self.part("rollout", "policy_forward", self.rows(size, config.guidance_scale), batches * steps)
        yield self.part("scores", "score", size, batches)
        at_once = self.variant.draws_at_once or config.draws_together(2 * config.batch_size)
        rows, times = 2 * config.batch_size * at_once, accumulate * config.draws / at_once
        yield self.part("gradient", "policy_gradient", rows, times)
        yield self.part("other forwards", "policy_forward", rows, times)

    def grpo(self, config: Any, accumulate: int) -> Iterator[Part]:
        updates, samples = config.minibatches * config.epochs, config.groups * config.group_size
        batches, size = samples / config.sample_batch / updates, config.sample_batch
        yield self.part("rollout", "policy_forward", self.rows(size, config.guidance_scale), batches * config.num_steps)
        yield self.part("scores", "score", size, batches * config.reward_draws)
        micro = round(samples * config.window_size / config.minibatches / accumulate)
        rows, old = self.rows(micro, config.guidance_scale), self.variant.half * (updates - 1) / updates
        yield self.part("gradient", "policy_gradient", rows, accumulate)
        yield self.part("other forwards", "policy_forward", rows, accumulate * ((config.kl_beta > 0) + old))

    def lpo(self, config: Any, accumulate: int) -> Iterator[Part]:
        updates, batches = config.minibatches * config.epochs, config.batch_size / config.sample_batch
        rows, states = self.rows(config.sample_batch, config.guidance_scale), config.num_steps - 1
        yield self.part("rollout", "policy_forward", rows, batches * config.num_steps / updates)
        yield self.part("scores", "score", config.sample_batch * config.candidates, batches * states / updates)
        pairs = round(config.batch_size * states / config.minibatches / accumulate)
        rows = self.rows(pairs, config.guidance_scale)
        yield self.part("gradient", "policy_gradient", rows, accumulate)
        yield self.part("other forwards", "policy_forward", rows, accumulate)

    def nft(self, config: Any, accumulate: int) -> Iterator[Part]:
        updates, samples = config.minibatches * config.epochs, config.groups * config.group_size
        batches, size = samples / config.sample_batch / updates, config.sample_batch
        yield self.part("rollout", "policy_forward", self.rows(size, config.guidance_scale), batches * config.num_steps)
        yield self.part("scores", "score", size, batches * config.reward_draws)
        rows = round(samples * config.levels / config.minibatches / accumulate)
        yield self.part("gradient", "policy_gradient", rows, accumulate)
        yield self.part("other forwards", "policy_forward", rows, accumulate * (1 + (config.kl_beta > 0)))


def totals(parts: list[Part], costs: Costs) -> dict[str, Any]:
    """Return sums over the parts of an update without evaluations, and seconds and FLOPs by phase."""

    def by_phase(name: str) -> dict[str, float]:
        return {
            phase: sum(p.times * getattr(costs(p.work), name) for p in parts if p.phase == phase) for phase in PHASES
        }

    def in_training(values: dict[str, float]) -> float:
        return sum(values.values()) - values["evaluations"]

    seconds, flops = by_phase("seconds"), by_phase("f2")
    sums = {name: in_training(by_phase(name)) for name in ("kernels", "moved", "f2")}
    rollout = flops["rollout"] / in_training(flops)
    return {**sums, "update": in_training(seconds), "seconds": seconds, "rollout_share_of_flops": rollout}


@cache
def nf4_saves() -> int:
    """Return the bytes of weights that a base model in NF4 saves."""
    case = Case(work="refl", size=SPEC.height)
    full, packed = (build_networks(FULL, c, FakeFloats().empty_like) for c in (case, case.but(base_quant="nf4")))
    return full.weight_bytes() - packed.weight_bytes()


def peak_gib(name: str, rows: int, size: int, costs: Costs, *, recompute: bool = False, small: bool = False) -> float:
    """Return the predicted peak of a run's memory on the GPU, with the reward dinalrm.

    Weights of base model, reward, LoRA, gold judge and VAE; AdamW's moments, and as much again for averages and
    references; the larger of the activations of an update and those of an evaluation, which decodes four images.

    rows: rows of the forwards with gradient in a micro-step. small: base model in NF4 and VAE in bfloat16.
    """
    refl = costs(Work("refl", 4, size, recompute))
    decode = costs(Work("vae_decode", 4, SPEC.height))
    train = refl.activations if name == "refl" else costs(Work("policy_gradient", rows, size, recompute)).activations
    images, weights = decode.activations * (size / SPEC.height) ** 2, refl.weights
    if small:
        weights, images = weights - nf4_saves(), images / 2
    vae = decode.weights / (2 if small else 1)
    return PICKSCORE + (weights + vae + 2 * refl.state + max(train, images)) / GIB


HEAD = ["recipe", "", "launches", "TB moved", "PFLOP", *PHASES[:-1], "seconds", "hours", "evaluations add"]


def row(name: str, what: str, found: dict[str, Any], steps: int) -> list[str]:
    whole, seconds = found["update"], found["seconds"]
    return [
        name, what, f"{found['kernels']:,.0f}", f"{found['moved'] / TERA:.2f}", f"{found['f2'] / 1e15:.2f}",
        *(f"{100 * seconds[phase] / whole:.0f} %" for phase in PHASES[:-1]), f"{whole:.3g}",
        f"{whole * steps / 3600:.1f}", f"{100 * seconds['evaluations'] / whole:.0f} %",
    ]  # fmt: skip


def write_report(
    folder: Path,
    runs: dict[str, Any],
    found: dict[tuple[str, str], dict[str, Any]],
    sizes: list[list[str]],
    costs: Costs,
) -> None:
    rows = [row(name, what, values, runs[name].loop.steps) for (name, what), values in found.items()]
    step = {
        (kind, half): f"{1e3 * costs(Work(kind, 8, half=half)).seconds:.0f}"
        for kind in ("policy_forward", "policy_gradient") for half in (False, True)
    }  # fmt: skip
    shares = [f"{n} {100 * v['rollout_share_of_flops']:.0f} %" for (n, what), v in found.items() if what == "now"]
    text = f"""# Counted cost of a run on SD3.5 Medium

`python examples/evidence/gpu_model.py examples/results`. Counted on full-size networks without weights: {SPEC.height} x
{SPEC.width}, {77 + SPEC.text_length} text tokens, reward `dinalrm`, one GPU, the settings of `recipes/*_sd35.yaml`.
**Nothing was measured.** Time is modelled for an H100 SXM, kernel by kernel: the longest of FLOPs at
{100 * counting.COMPUTE:.0f} % of the peak (bfloat16 989 TFLOP/s, float32 67), bytes of inputs and outputs at
{100 * counting.TRAFFIC:.0f} % of 3.35 TB/s, and {1e6 * counting.LAUNCH:.0f} us. AdamW (0.5 GB, 0.2 ms an update),
loading, text encoding and waits of the host are left out; every policy has a LoRA of rank {FULL.policy.rank}.

## An update

- before: the LoRA's products in float32, blocks recomputed, a DPO pair's draws one at a time.
- now: the present settings; blocks are recomputed where the update needs more than 90 % of 80 GB otherwise (DPO), and
  with LPO, whose settings say so. `--gradient_checkpointing auto` decides by half of the free memory.
- The other rows are options of ReFL, compared with "now".

launches: kernels. Percentages: shares of the update's time. hours: `loop.steps` updates, without evaluations. The last
column leaves out scores and probes of the evaluations.

{table(HEAD, rows, padded=True)}

The rollout's share of FLOPs, now: {", ".join(shares)}. A policy step at batch 8 takes
{step["policy_forward", False]} ms with a float32 LoRA and {step["policy_forward", True]} ms with a bfloat16 copy;
forward and backward {step["policy_gradient", False]} and {step["policy_gradient", True]} ms.

## Memory of a run

GiB at the peak: base model, reward, LoRA, AdamW, averages, the gold judge (PickScore) and the VAE in float32, and the
activations of an update or of decoding four images of an evaluation, whichever are more. NF4: `--memory.base_quant nf4
--memory.vae_dtype bfloat16`, recomputed. rows: with gradient in a micro-step; two per sample with guidance, and two per
draw of a DPO pair. Without workspaces and fragmentation: leave 10 % of a card free.

{table(["recipe", "size", "rows", "kept", "recomputed", "recomputed, NF4"], sizes, padded=True)}
"""
    (folder / "gpu_model.md").write_text(text, encoding="utf-8")
    stored = [{"recipe": name, "settings": what, **values} for (name, what), values in found.items()]
    (folder / "gpu_model.json").write_text(json.dumps({"updates": stored, "memory_gib": sizes}, indent=1) + "\n")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: settings_files(RECIPES / f"{name}_sd35.py", SPEC.kind, "dinalrm") for name in RUNS}
    runs = {name: parse(kind, "", [], files[name])[0] for name, kind in RUNS.items()}
    costs = Costs(tqdm(desc="counted", dynamic_ncols=True))
    variants, sizes = {}, []
    for name, run in runs.items():
        variants[name, "before"] = Variant(half=False, recompute=True, draws_at_once=1)
        for size in SIZES:
            [step] = (part for part in Update(name, run, Variant(), size) if part.work.kind == "policy_gradient")
            rows = round(step.work.batch * step.times / run.loop.accumulate)
            changes = ({}, {"recompute": True}, {"recompute": True, "small": True})
            gib = [peak_gib(name, rows, size, costs, **change) for change in changes]
            sizes.append([name, str(size), str(rows), *(f"{value:.1f}" for value in gib)])
            if size == SPEC.height:
                variants[name, "now"] = Variant(recompute=run.gradient_checkpointing is True or gib[0] > 0.9 * CARD)
    now = variants["refl", "now"]
    for option, values in (("sample_batch", (16, 64)), ("steps_per_rollout", (2, 4))):
        for value in values:
            variants["refl", f"refl.{option} {value}"] = dataclasses.replace(now, **{option: value})
    updates = {key: list(Update(key[0], runs[key[0]], variant, SPEC.height)) for key, variant in variants.items()}
    found = {key: totals(parts, costs) for key, parts in updates.items()}
    write_report(folder, runs, dict(sorted(found.items(), key=lambda item: list(RUNS).index(item[0][0]))), sizes, costs)


if __name__ == "__main__":
    main()
