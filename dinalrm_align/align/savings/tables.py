"""The tables of `recipes/savings.py`: Markdown that reads well in a terminal too."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dinalrm_align.align.savings.case import WORK, Case
from dinalrm_align.align.savings.config import SavingsRun
from dinalrm_align.align.savings.count import Cost
from dinalrm_align.align.savings.measure import Measured
from dinalrm_align.align.savings.plan import base_case, economies, paper_readings, parts, percent_saved, scenarios
from dinalrm_align.eval.report.markdown import table

GIB, TERA = 2**30, 1e12
NAMES = {"dinalrm": "DiNa-LRM (latent)", "pickscore": "PickScore (pixel)", "hpsv3": "HPSv3 (pixel)"}

Costs = Mapping[Case, Cost]
Runs = Mapping[Case, Measured | str]


def conventions(run: SavingsRun) -> str:
    """What every number stands for, in one paragraph."""
    tokens = 77 + run.text_length
    levels = "" if run.levels == 1 else f", {run.levels} noise levels"
    return (
        f"{run.size} x {run.size} pixels, batch {run.batch}, {tokens} text tokens (77 + {run.text_length}){levels}. "
        "Weights bfloat16, policy LoRA and its AdamW float32; text embeddings cached, text encoders off the device; "
        "latent reward on the policy's own blocks, its LoRA unmerged. A pixel reward on latents is charged with the "
        "VAE's decoder (bfloat16), a latent reward with none of it. GiB = 2^30 bytes of live tensors at the peak. "
        "F2: TFLOP, two per multiply-accumulate, attention and all recomputation included (flash attention's backward "
        "is 2.5 times its forward); M0: T multiply-accumulates without attention."
    )


def parts_table(run: SavingsRun, costs: Costs) -> str:
    rows = []
    for case in parts(base_case(run)):
        cost, name = costs[case], WORK[case.work]
        if case.work in ("score", "gradient", "pixels", "pixels_gradient"):
            name = f"{NAMES[case.reward]}: {name}"
        rows.append([name, _gib(cost.weights), _gib(cost.activations), *_operations(cost)])
    return table(
        ["network, nothing recomputed", "weights GiB", "above GiB", "F2", "of it attention", "M0"], rows, padded=True
    )


def scenarios_table(run: SavingsRun, costs: Costs) -> str:
    """Also says what the latent reward saves against the pixel ones, in percent of memory and of F2."""
    base, rows = base_case(run), []
    for case in scenarios(base):
        cost = costs[case]
        saved = ["", ""]
        if case.pixel:
            latent = costs[case.but(reward="dinalrm")]
            shares = (percent_saved(latent.memory, cost.memory), percent_saved(latent.f2, cost.f2))
            saved = [f"{share:.1f} %" for share in shares]
        again = "yes" if case.reward_checkpointing and case.work not in ("score",) else "no"
        rows.append(
            [f"{case.work}: {NAMES[case.reward]}", again, _gib(cost.weights), _gib(cost.state), _gib(cost.activations),
             _gib(cost.memory), *_operations(cost), *saved]
        )  # fmt: skip
    header = ["scenario", "recomputed", "weights", "moments", "above", "GiB in all", "F2", "of it attention", "M0"]
    return table([*header, "latent saves GiB", "latent saves F2"], rows, padded=True)


def paper_table(run: SavingsRun, costs: Costs) -> str:
    def percent(reading: Mapping[str, float], name: str) -> str:
        return f"{reading[name]:.1f}" if name in reading else ""

    readings = paper_readings(base_case(run), costs)
    rows = [
        [name, *(percent(reading, column) for column in ("paper", "hpsv3", "pickscore"))]
        for name, reading in readings.items()
    ]
    return table(["DiNa-LRM saves, in percent", "paper, HPSv3", "here, HPSv3", "here, PickScore"], rows, padded=True)


def economies_table(run: SavingsRun, costs: Costs) -> str:
    rows, before = [], None
    for name, case in economies(base_case(run)).items():
        cost = costs[case]
        before = cost if name.startswith("as above") else before
        change = "" if cost is before else f"{(cost.memory - before.memory) / GIB:+.2f}"
        more = "" if cost is before else f"{100 * (cost.f2 / before.f2 - 1):+.1f} %"
        rows.append([name, _gib(cost.memory), change, f"{cost.f2 / TERA:.1f}", more])
    return table(["one ReFL update, blocks recomputed", "GiB in all", "change", "F2", "change"], rows, padded=True)


def targets_table(run: SavingsRun, costs: Costs) -> str:
    """The most that some cases may take, at 1024 x 1024 and batch 1, and what they take."""
    base = base_case(run)
    refl, gradient = base.but(work="refl"), base.but(work="gradient")
    plain = gradient.but(reward_checkpointing=False, policy_checkpointing=False)
    aims = [
        ("ReFL update", refl, "memory", 6.5),
        ("ReFL update, batch 4", refl.but(batch=4), "memory", 10.0),
        ("ReFL update, base in NF4", refl.but(base_quant="nf4"), "memory", 4.5),
        ("reward forward and backward, above weights, nothing recomputed", plain, "activations", 4.2),
        ("reward forward and backward, above weights, blocks recomputed", gradient, "activations", 0.7),
    ]
    rows = [
        [name, f"{limit:.1f}", _gib(getattr(costs[case], kind)),
         "met" if getattr(costs[case], kind) <= limit * GIB else "missed"]
        for name, case, kind, limit in aims
    ]  # fmt: skip
    return table(["latent reward", "at most GiB", "GiB", ""], rows, padded=True)


def measured_table(costs: Costs, runs: Runs, rate: float | None) -> str:
    """Prediction beside measurement. rate: TFLOP/s of a large product of matrices on that device."""
    rows = []
    for case, found in runs.items():
        name, cost = describe(case), costs[case]
        if isinstance(found, str):
            rows.append([name, _gib(cost.memory), *[found.split(":")[0], *[""] * 6]])
            continue
        speed = found.teraflops(cost.f2)
        rows.append(
            [name, _gib(cost.memory), _gib(found.memory), f"{100 * (cost.memory / found.memory - 1):+.1f} %",
             _gib(found.reserved) if found.reserved else "", f"{found.milliseconds:.1f}", f"{cost.f2 / TERA:.2f}",
             f"{speed:.1f}", f"{100 * speed / rate:.1f} %" if rate else ""]
        )  # fmt: skip
    header = ["case", "counted GiB", "measured GiB", "error", "reserved GiB", "ms", "F2", "TFLOP/s", "of the card's"]
    return table(header, rows, padded=True)


def describe(case: Case) -> str:
    """A case in a few words: its work, its reward, and what is not by default."""
    usual = {field.name: field.default for field in dataclasses.fields(Case)}
    shown = {name: value for name, value in vars(case).items() if value != usual[name]}
    shown.pop("work", None), shown.pop("reward", None)
    return " ".join([case.work, case.reward, *(f"{name}={value}" for name, value in shown.items())])


def report(run: SavingsRun, costs: Costs, runs: Runs | None, card: str, rate: float | None) -> str:
    """savings.md."""
    sections = [
        ("Savings of a latent reward", conventions(run)),
        ("Network by network", parts_table(run, costs)),
        ("Scenarios", scenarios_table(run, costs) + "\n\n" + "\n".join(_explained())),
        ("Against the paper", paper_table(run, costs)),
    ]
    if run.economies:
        sections.append(("Options, and what they save and cost", economies_table(run, costs) + "\n\n" + UNCOUNTED))
        if run.size == 1024 and run.batch == 1 and run.levels == 1:
            sections.append(("Aims at 1024 x 1024", targets_table(run, costs)))
    if runs is not None:
        sections.append((f"Measured on {card}", measured_table(costs, runs, rate)))
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections) + "\n"


UNCOUNTED = (
    "Options without a count: `--memory.compile` and `--memory.attention` change time. `--memory.offload` keeps off "
    "the GPU, while they are not used, the VAE (0.31 GiB in float32) and, before training, the text encoders (10.4 GiB "
    "in bfloat16). `--memory.decode_tile` bounds the decoder's activations by those of one tile, and changes pixels "
    "near the seams."
)


def to_json(run: SavingsRun, costs: Costs, runs: Runs | None, card: str, rate: float | None) -> dict[str, Any]:
    """savings.json: everything, in bytes and operations."""
    rows = []
    for case, cost in costs.items():
        row = {"case": dataclasses.asdict(case), "counted": dataclasses.asdict(cost) | {"memory": cost.memory}}
        if runs is not None and case in runs:
            found = runs[case]
            row["measured"] = found if isinstance(found, str) else dataclasses.asdict(found)
        rows.append(row)
    return {
        "settings": dataclasses.asdict(run),
        "conventions": conventions(run),
        "savings_percent": paper_readings(base_case(run), costs),
        "device": card,
        "device_matrix_tflops": rate,
        "cases": rows,
    }


def _explained() -> list[str]:
    return [f"- {name}: {WORK[name]}" for name in ("score", "gradient", "refl", "grpo")]


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _operations(cost: Cost) -> list[str]:
    return [f"{number / TERA:.2f}" for number in (cost.f2, cost.attention, cost.m0)]
