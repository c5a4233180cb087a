"""savings.md, savings.json and savings.png; the Markdown tables are padded for reading in a terminal."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.align.savings.cases import (
    REWARDS,
    ROLLOUT_STEPS,
    base_case,
    economies,
    paper_readings,
    parts,
    percent_saved,
    rollout_operations,
    scenarios,
    without_recomputing,
)
from dinalrm_align.align.savings.config import WORK, Case, SavingsRun
from dinalrm_align.align.savings.cost import Cost, Measured
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.train.files import save_figure

GIB, TERA = 2**30, 1e12
NAMES = {"dinalrm": "DiNa-LRM (latent)", "pickscore": "PickScore (pixel)", "hpsv3": "HPSv3 (pixel)"}
COLOURS = {
    "base model": "#4c6a92", "reward's weights and VAE": "#d1793a", "LoRA's moments": "#9a9a9a",
    "activations": "#e6c26e", "policy": "#4c6a92", "VAE decoder": "#b8483e", "reward": "#d1793a",
    "recomputed": "#c9c9c9",
}  # fmt: skip
UNCOUNTED = (
    "Options without a count: `--memory.compile` and `--memory.attention` change time. `--memory.offload` keeps the "
    "VAE (0.31 GiB in float32) off the GPU while it is not used, and the text encoders (10.4 GiB in bfloat16) before "
    "training. `--memory.decode_tile` bounds the decoder's activations by those of one tile, and changes pixels near "
    "the seams."
)

Costs = Mapping[Case, Cost]
Runs = Mapping[Case, Measured | str]


def report(run: SavingsRun, costs: Costs, runs: Runs | None, card: str, rate: float | None) -> str:
    """savings.md. runs, card, rate: measurements, the GPU's name and its TFLOP/s; None, "" and None without them."""
    explained = "\n".join(f"- {name}: {WORK[name]}" for name in ("score", "gradient", "refl", "grpo"))
    sections = [
        ("Savings of a latent reward", conventions(run)),
        ("Each network", parts_table(run, costs)),
        ("Scenarios", f"{scenarios_table(run, costs)}\n\n{explained}"),
        ("ReFL with the rollout", rollout_table(run, costs)),
        ("Against the paper", paper_table(run, costs)),
    ]
    if run.economies:
        sections.append(("Options, and what they save and cost", f"{economies_table(run, costs)}\n\n{UNCOUNTED}"))
        if run.size == 1024 and run.batch == 1 and run.levels == 1:
            sections.append(("Targets at 1024 x 1024", targets_table(run, costs)))
    if runs is not None:
        sections.append((f"Measured on {card}", measured_table(costs, runs, rate)))
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections) + "\n"


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


def conventions(run: SavingsRun) -> str:
    """The conventions of all numbers, in one paragraph."""
    tokens = 77 + run.text_length
    levels = "" if run.levels == 1 else f", {run.levels} noise levels"
    return (
        f"{run.size} x {run.size} pixels, batch {run.batch}, {tokens} text tokens (77 + {run.text_length}){levels}. "
        "Weights bfloat16, policy LoRA and its AdamW float32; text embeddings cached, text encoders off the device; "
        "latent reward on the policy's own blocks, its LoRA unmerged. A pixel reward on latents includes the VAE's "
        "decoder (bfloat16), a latent reward does not. GiB = 2^30 bytes of live tensors at the peak. F2: TFLOP, two "
        "per multiply-accumulate, including attention and all recomputation (flash attention's backward is 2.5 times "
        "its forward); M0: T multiply-accumulates without attention."
    )


def parts_table(run: SavingsRun, costs: Costs) -> str:
    rows = []
    for case in parts(base_case(run)):
        cost, name = costs[case], WORK[case.work]
        if case.work in ("score", "gradient", "pixels", "pixels_gradient"):
            name = f"{NAMES[case.reward]}: {name}"
        rows.append([name, _gib(cost.weights), _gib(cost.activations), *_operations(cost)])
    head = ["network, nothing recomputed", "weights GiB", "above GiB", "F2", "of it attention", "M0"]
    return table(head, rows, padded=True)


def scenarios_table(run: SavingsRun, costs: Costs) -> str:
    """Cost of each scenario, and what the latent reward saves against pixel rewards, in percent of memory and F2."""
    rows = []
    for case in scenarios(base_case(run)):
        cost, saved = costs[case], ["", ""]
        if case.pixel:
            latent = costs[case.but(reward="dinalrm")]
            shares = (percent_saved(latent.memory, cost.memory), percent_saved(latent.f2, cost.f2))
            saved = [f"{share:.1f} %" for share in shares]
        part = " (gradient part)" if case.work == "refl" else ""
        rows.append(
            [f"{case.work}{part}: {NAMES[case.reward]}",
             "yes" if case.reward_checkpointing and case.work != "score" else "no", _gib(cost.weights),
             _gib(cost.state), _gib(cost.activations), _gib(cost.memory), *_operations(cost), *saved]
        )  # fmt: skip
    header = ["scenario", "recomputed", "weights", "moments", "above", "GiB in all", "F2", "of it attention", "M0"]
    return table([*header, "latent saves GiB", "latent saves F2"], rows, padded=True)


def rollout_table(run: SavingsRun, costs: Costs) -> str:
    """F2 of the gradient part of a ReFL update, and of the whole update with the rollout before it."""
    base, rows = base_case(run), []
    rollout = rollout_operations(base, costs)
    for case in (without_recomputing(base), base):
        latent = costs[case.but(work="refl")].f2
        for reward in REWARDS:
            f2 = costs[case.but(reward=reward, work="refl")].f2
            saved = [percent_saved(latent, f2), percent_saved(rollout + latent, rollout + f2)]
            rows.append(
                [f"refl: {NAMES[reward]}", "yes" if case.reward_checkpointing else "no", f"{f2 / TERA:.2f}",
                 f"{(rollout + f2) / TERA:.2f}", *(f"{share:.1f} %" if reward != "dinalrm" else "" for share in saved)]
            )  # fmt: skip
    head = ["scenario", "recomputed", "F2, gradient part", "F2, with the rollout"]
    head += ["latent saves, gradient part", "latent saves, with the rollout"]
    return (
        f"{table(head, rows, padded=True)}\n\nThe rollout is {rollout / TERA:.0f} TFLOP on average: the recipe draws "
        f"the gradient step from {ROLLOUT_STEPS[0]} to {ROLLOUT_STEPS[1]} of 40, and as many guided steps, two forward "
        "passes each, come before it."
    )


def paper_table(run: SavingsRun, costs: Costs) -> str:
    rows = [
        [name, *(f"{reading[column]:.1f}" if column in reading else "" for column in ("paper", "hpsv3", "pickscore"))]
        for name, reading in paper_readings(base_case(run), costs).items()
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
    head = ["gradient part of one ReFL update, blocks recomputed", "GiB in all", "change", "F2", "change"]
    return table(head, rows, padded=True)


def targets_table(run: SavingsRun, costs: Costs) -> str:
    """Upper limits of memory at 1024 x 1024 and batch 1, and the counted memory."""
    base = base_case(run)
    refl, gradient = base.but(work="refl"), base.but(work="gradient")
    targets = [
        ("ReFL update", refl, "memory", 6.5),
        ("ReFL update, batch 4", refl.but(batch=4), "memory", 10.0),
        ("ReFL update, base in NF4", refl.but(base_quant="nf4"), "memory", 4.5),
        ("reward forward and backward, above weights, nothing recomputed", without_recomputing(gradient),
         "activations", 4.2),
        ("reward forward and backward, above weights, blocks recomputed", gradient, "activations", 0.7),
    ]  # fmt: skip
    rows = []
    for name, case, kind, limit in targets:
        size = getattr(costs[case], kind)
        rows.append([name, f"{limit:.1f}", _gib(size), "met" if size <= limit * GIB else "missed"])
    return table(["latent reward", "at most GiB", "GiB", ""], rows, padded=True)


def measured_table(costs: Costs, runs: Runs, rate: float | None) -> str:
    """Counted beside measured. rate: TFLOP/s of a large matrix product on the same device."""
    rows = []
    for case, found in runs.items():
        name, cost = describe(case), costs[case]
        if isinstance(found, str):
            rows.append([name, _gib(cost.memory), found.split(":")[0], *[""] * 6])
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
    """A case in a few words: workload, reward and the fields that differ from the defaults."""
    changed = [
        f"{field.name}={getattr(case, field.name)}"
        for field in dataclasses.fields(Case)
        if field.name not in ("work", "reward") and getattr(case, field.name) != field.default
    ]
    return " ".join([case.work, case.reward, *changed])


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _operations(cost: Cost) -> list[str]:
    return [f"{number / TERA:.2f}" for number in (cost.f2, cost.attention, cost.m0)]


def stacks(run: SavingsRun, costs: Costs) -> tuple[dict, dict, dict]:
    """Parts of a ReFL update's gradient part by reward: GiB with recomputation, GiB without, and TFLOP (F2)."""
    base = base_case(run)
    plain = without_recomputing(base)
    own = costs[plain.but(work="policy_forward")].weights / GIB
    memory: list[dict[str, dict[str, float]]] = []
    for case in (base, plain):
        found = {}
        for reward in REWARDS:
            cost = costs[case.but(reward=reward, work="refl")]
            found[reward] = {
                "base model": own,
                "reward's weights and VAE": cost.weights / GIB - own,
                "LoRA's moments": cost.state / GIB,
                "activations": cost.activations / GIB,
            }
        memory.append(found)
    operations = {}
    for reward in REWARDS:
        update = costs[plain.but(reward=reward, work="refl")].f2
        gradient = costs[plain.but(reward=reward, work="gradient")].f2
        decoding = costs[plain.but(work="vae_gradient")].f2 if reward != "dinalrm" else 0
        operations[reward] = {
            "policy": (update - gradient) / TERA,
            "VAE decoder": decoding / TERA,
            "reward": (gradient - decoding) / TERA,
            "recomputed": (costs[base.but(reward=reward, work="refl")].f2 - update) / TERA,
        }
    return memory[0], memory[1], operations


def draw(run: SavingsRun, costs: Costs, path: Path) -> None:
    """savings.png: memory and operations of the gradient part of one ReFL update, stacked, latent beside pixel."""
    recomputed, plain, operations = stacks(run, costs)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    top = max(sum(parts.values()) for parts in plain.values()) * 1.14
    _bars(axes[0], plain, "Memory, activations kept", "{:.1f} GiB", top)
    _bars(axes[1], recomputed, "Memory, blocks recomputed", "{:.1f} GiB", top)
    _bars(axes[2], operations, "Operations, without the rollout", "{:.0f} TFLOP", None)
    figure.suptitle(
        f"Gradient part of one ReFL update of SD3.5 Medium: {run.size} x {run.size}, batch {run.batch}, "
        f"{77 + run.text_length} text tokens, bfloat16",
        fontsize=12,
    )
    save_figure(figure, path, dpi=130)


def _bars(axis: Axes, stacked: dict, title: str, shown: str, top: float | None) -> None:
    """A stacked bar per reward, annotated with its height and what the latent reward saves against it."""
    latent = sum(stacked["dinalrm"].values())
    floors = dict.fromkeys(stacked, 0.0)
    for name in next(iter(stacked.values())):
        heights = [parts[name] for parts in stacked.values()]
        axis.bar(range(len(stacked)), heights, 0.62, bottom=list(floors.values()), color=COLOURS[name], label=name)
        floors = {reward: floor + stacked[reward][name] for reward, floor in floors.items()}
    for index, (reward, height) in enumerate(floors.items()):
        text = shown.format(height)
        if reward != "dinalrm":
            text += f"\nlatent: {percent_saved(latent, height):.0f} % less"
        axis.annotate(text, (index, height), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axis.set_xticks(range(len(stacked)), [NAMES[reward].replace(" (", "\n(") for reward in stacked])
    axis.set_ylim(0, top or max(floors.values()) * 1.2)
    axis.set_ylabel(shown.split()[-1])
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
