"""Create the contents of savings.md, savings.json and savings.png. Tables are padded for reading in a terminal."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.align.savings import config
from dinalrm_align.align.savings.config import REWARDS, ROLLOUT_STEPS, WORK, Case, SavingsRun, rollout_step
from dinalrm_align.align.savings.cost import Cost, Measured
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.train.files import save_figure

GIB, TERA = 2**30, 1e12
NAMES = {"dinalrm": "DiNa-LRM (latent)", "pickscore": "PickScore (pixel)", "hpsv3": "HPSv3 (pixel)"}
MEMORY = ("base model", "reward's weights and VAE", "LoRA's moments", "activations")
OPERATIONS = ("rollout", "policy", "VAE decoder", "reward", "recomputed")
COLOURS = dict(zip(MEMORY, ("#4c6a92", "#d1793a", "#9a9a9a", "#e6c26e")))
COLOURS |= dict(zip(OPERATIONS, ("#9fb3cc", "#4c6a92", "#b8483e", "#d1793a", "#c9c9c9")))
UNCOUNTED = (
    "Options without a count: `--memory.compile` and `--memory.attention` change time. `--memory.offload` keeps the "
    "VAE (0.31 GiB in float32) off the GPU between evaluations. `--memory.decode_tile` bounds the decoder's "
    "activations by those of one tile, and changes pixels near the seams."
)

Costs = Mapping[Case, Cost]
Runs = Mapping[Case, Measured | str]


def percent_saved(part: float, whole: float) -> float:
    return 100 * (1 - part / whole)


@dataclass(frozen=True)
class Rollout:
    """FLOPs and modelled seconds of a ReFL rollout with the mean number of guided steps."""

    f2: float
    seconds: float

    @classmethod
    def of(cls, base: Case, costs: Costs) -> "Rollout":
        steps, step = sum(ROLLOUT_STEPS) / 2, costs[rollout_step(base)]
        return cls(steps * step.f2, steps * step.seconds)


def paper_readings(base: Case, costs: Costs) -> dict[str, dict[str, float]]:
    """Return how much DiNa-LRM saves against pixel rewards, in percent, as {quantity: {source: saving}}.

    The source "paper" is the published saving against HPSv3 (arXiv 2602.11146). The sources "hpsv3" and "pickscore" are
    the savings counted here against HPSv3 and PickScore. The main quantities are:

    - "memory": peak bytes of a ReFL update without its rollout and without gradient checkpointing.
    - "reward FLOPs": scoring, including the VAE's decoder for pixel rewards.
    - "optimisation FLOPs": scoring and one forward pass of the policy. This definition is closest to the paper.
    - "gradient part of an update, executed": a ReFL update without its rollout, backward passes included.
    """
    plain = base.kept
    policy, rollout = costs[plain.but(work="policy_forward")].f2, Rollout.of(base, costs).f2

    def saved(case: Case, value: Callable[[Cost], float]) -> dict[str, float]:
        found = {reward: value(costs[case.but(reward=reward)]) for reward in REWARDS}
        return {other: percent_saved(found["dinalrm"], found[other]) for other in ("hpsv3", "pickscore")}

    kept, recomputed, score = plain.but(work="refl"), base.but(work="refl"), base.but(work="score")
    return {
        "memory": {"paper": 51.4, **saved(kept, lambda cost: cost.memory)},
        "memory, everything recomputed": saved(recomputed, lambda cost: cost.memory),
        "reward FLOPs": {"paper": 71.1, **saved(score, lambda cost: cost.f2)},
        "reward MACs without attention": saved(score, lambda cost: cost.m0),
        "optimisation FLOPs": {"paper": 46.4, **saved(score, lambda cost: policy + cost.f2)},
        "gradient part of an update, executed": saved(kept, lambda cost: cost.f2),
        "update with its rollout, executed": saved(kept, lambda cost: rollout + cost.f2),
    }


def report(run: SavingsRun, costs: Costs, runs: Runs | None, card: str, rate: float | None) -> str:
    """Return the text of savings.md. `card`: the measured GPU, or "" if none. `rate`: TFLOP/s of a matrix product."""
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
    if runs is not None:
        sections.append((f"Measured on {card}", measured_table(costs, runs, rate)))
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections) + "\n"


def to_json(run: SavingsRun, costs: Costs, runs: Runs | None, card: str, rate: float | None) -> dict[str, Any]:
    """Return the content of savings.json: settings, savings, and the cost of every configuration."""
    rows = []
    for case, cost in costs.items():
        rows.append({"case": asdict(case), "counted": asdict(cost) | {"memory": cost.memory}})
        if found := (runs or {}).get(case):
            rows[-1]["measured"] = found if isinstance(found, str) else asdict(found)
    settings, readings = dict(settings=asdict(run), conventions=conventions(run)), paper_readings(run.base, costs)
    return settings | dict(savings_percent=readings, device=card, device_matrix_tflops=rate, cases=rows)


def conventions(run: SavingsRun) -> str:
    tokens, levels = 77 + run.text_length, "" if run.levels == 1 else f", {run.levels} noise levels"
    return (
        f"{run.size} x {run.size} pixels, batch {run.batch}, {tokens} text tokens (77 + {run.text_length}){levels}. "
        "Weights bfloat16, policy LoRA and its AdamW float32, its products bfloat16; text embeddings cached, text "
        "encoders off the device; latent reward on the policy's own blocks, its LoRA unmerged. A pixel reward on "
        "latents includes the VAE's decoder (bfloat16), a latent reward does not. GiB = 2^30 bytes of live tensors at "
        "the peak. F2: TFLOP, two per multiply-accumulate, including attention and all recomputation (flash "
        "attention's backward is 2.5 times its forward); M0: T multiply-accumulates without attention. ms: "
        "milliseconds on an H100, modelled and not measured (dinalrm_align/align/savings/cost.py)."
    )


def parts_table(run: SavingsRun, costs: Costs) -> str:
    rows = []
    for case in config.parts(run.base):
        cost, of_policy = costs[case], case.work.startswith(("policy", "vae"))
        name = WORK[case.work] if of_policy else f"{NAMES[case.reward]}: {WORK[case.work]}"
        timed = [str(cost.kernels), _ms(cost.seconds)]
        rows.append([name, _gib(cost.weights), _gib(cost.activations), *_operations(cost), *timed])
    head = ["network, nothing recomputed", "weights GiB", "above GiB", "F2", "of it attention", "M0", "kernels", "ms"]
    return table(head, rows, padded=True)


def scenarios_table(run: SavingsRun, costs: Costs) -> str:
    """Return a table of each scenario's cost and, for pixel rewards, the percentage that the latent reward saves."""
    rows, rollout = [], Rollout.of(run.base, costs).f2
    for case in config.scenarios(run.base):
        cost, latent, saved = costs[case], costs[case.but(reward="dinalrm")], ["", ""]
        if case.pixel:
            shares = (percent_saved(latent.memory, cost.memory), percent_saved(latent.f2, cost.f2))
            saved = [f"{share:.1f} %" for share in shares]
        saved += _with_rollout(rollout, latent.f2, cost.f2, case.pixel) if case.work == "refl" else ["", ""]
        part = " (gradient part)" if case.work == "refl" else ""
        rows.append(
            [f"{case.work}{part}: {NAMES[case.reward]}",
             "yes" if case.reward_checkpointing and case.work != "score" else "no", _gib(cost.weights),
             _gib(cost.state), _gib(cost.activations), _gib(cost.memory), *_operations(cost), *saved]
        )  # fmt: skip
    header = ["scenario", "recomputed", "weights", "moments", "above", "GiB in all", "F2", "of it attention", "M0"]
    header += ["latent saves GiB", "latent saves F2", "F2 with rollout", "latent saves, with rollout"]
    return table(header, rows, padded=True)


def _with_rollout(rollout: float, latent: float, f2: float, pixel: bool) -> list[str]:
    """Return an update's FLOPs with its rollout and, for a pixel reward, the percentage that a latent one saves."""
    saved = f"{percent_saved(rollout + latent, rollout + f2):.1f} %" if pixel else ""
    return [f"{(rollout + f2) / TERA:.1f}", saved]


def rollout_table(run: SavingsRun, costs: Costs) -> str:
    """Return a table of the FLOPs and modelled time of a ReFL update, with and without its rollout, by reward."""
    base, rows = run.base, []
    rollout = Rollout.of(base, costs)
    for case in (base.kept, base):
        latent = costs[case.but(work="refl")]
        for reward in REWARDS:
            cost, pixel = costs[case.but(reward=reward, work="refl")], reward != "dinalrm"
            whole, saved = _with_rollout(rollout.f2, latent.f2, cost.f2, pixel)
            seconds = rollout.seconds + cost.seconds
            faster = percent_saved(rollout.seconds + latent.seconds, seconds)
            rows.append(
                [f"refl: {NAMES[reward]}", "yes" if case.reward_checkpointing else "no", f"{cost.f2 / TERA:.1f}", whole,
                 f"{percent_saved(latent.f2, cost.f2):.1f} %" if pixel else "", saved, _ms(cost.seconds), _ms(seconds),
                 f"{faster:.1f} %" if pixel else ""]
            )  # fmt: skip
    head = ["scenario", "recomputed", "F2, gradient part", "F2, with rollout", "latent saves, gradient part"]
    head += ["latent saves, with rollout", "ms, gradient part", "ms, with rollout", "latent saves ms, with rollout"]
    step = costs[rollout_step(base)]
    return (
        f"{table(head, rows, padded=True)}\n\nThe rollout is {rollout.f2 / TERA:.0f} TFLOP on average: the recipe "
        f"draws the gradient step from {ROLLOUT_STEPS[0]} to {ROLLOUT_STEPS[1]} of 40, and as many guided steps come "
        f"before it, each a forward of two rows per sample: {_gib(step.activations)} GiB above the weights. The "
        "gradient part sets the peak of memory."
    )


def paper_table(run: SavingsRun, costs: Costs) -> str:
    columns, readings = ("paper", "hpsv3", "pickscore"), paper_readings(run.base, costs).items()
    rows = [[name, *(f"{row[key]:.1f}" if key in row else "" for key in columns)] for name, row in readings]
    return table(["DiNa-LRM saves, in percent", "paper, HPSv3", "here, HPSv3", "here, PickScore"], rows, padded=True)


def economies_table(run: SavingsRun, costs: Costs) -> str:
    rows, before, rollout = [], None, Rollout.of(run.base, costs).f2 / run.batch
    for name, case in config.economies(run.base).items():
        cost, whole = costs[case], costs[case].f2 + case.batch * rollout
        before = (cost, whole) if name.startswith("as above") else before
        changes = ["", "", ""]
        if cost is not before[0]:
            more = [100 * (now / then - 1) for now, then in ((cost.f2, before[0].f2), (whole, before[1]))]
            changes = [f"{(cost.memory - before[0].memory) / GIB:+.2f}", *(f"{share:+.1f} %" for share in more)]
        row = [name, _gib(cost.memory), changes[0], f"{cost.f2 / TERA:.1f}", changes[1]]
        rows.append([*row, f"{whole / TERA:.1f}", changes[2]])
    head = ["one ReFL update, blocks recomputed", "GiB in all", "change", "F2, gradient part", "change"]
    head += ["F2, with rollout", "change"]
    return table(head, rows, padded=True)


def measured_table(costs: Costs, runs: Runs, rate: float | None) -> str:
    """Return a table of counted and measured costs. `rate`: TFLOP/s of a large matrix product on the GPU."""
    defaults, rows = {field.name: field.default for field in fields(Case)}, []
    for case, found in runs.items():
        shown = {"work": case.work, "reward": case.reward}
        changed = [f"{name}={value}" for name, value in asdict(case).items() if value != (defaults | shown)[name]]
        name, cost = " ".join([*shown.values(), *changed]), costs[case]
        if isinstance(found, str):
            rows.append([name, _gib(cost.memory), found, *[""] * 6])
            continue
        speed = found.teraflops(cost.f2)
        rows.append(
            [name, _gib(cost.memory), _gib(found.memory), f"{100 * (cost.memory / found.memory - 1):+.1f} %",
             _gib(found.reserved), f"{found.milliseconds:.1f}", f"{cost.f2 / TERA:.2f}",
             f"{speed:.1f}", f"{100 * speed / rate:.1f} %" if rate else ""]
        )  # fmt: skip
    header = ["case", "counted GiB", "measured GiB", "error", "reserved GiB", "ms", "F2", "TFLOP/s", "of the card's"]
    return table(header, rows, padded=True)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def _operations(cost: Cost) -> list[str]:
    return [f"{number / TERA:.2f}" for number in (cost.f2, cost.attention, cost.m0)]


def stacks(run: SavingsRun, costs: Costs) -> tuple[dict, dict, dict]:
    """Return the data of the plots in `draw_costs`: GiB with gradient checkpointing, GiB without it, and TFLOP.

    Each plot's data is {reward: {component: number}}, with the components in `MEMORY` or `OPERATIONS`.
    """
    base, plain = run.base, run.base.kept
    own = costs[plain.but(work="policy_forward")].weights / GIB
    recomputed, kept, operations, rollout = {}, {}, {}, Rollout.of(base, costs).f2
    for reward in REWARDS:
        for memory, case in ((recomputed, base), (kept, plain)):
            cost = costs[case.but(reward=reward, work="refl")]
            sizes = own, cost.weights / GIB - own, cost.state / GIB, cost.activations / GIB
            memory[reward] = dict(zip(MEMORY, sizes))
        update, again = (costs[case.but(reward=reward, work="refl")].f2 for case in (plain, base))
        gradient = costs[plain.but(reward=reward, work="gradient")].f2
        decoding = costs[plain.but(work="vae_gradient")].f2 if reward != "dinalrm" else 0
        found = rollout, update - gradient, decoding, gradient - decoding, again - update
        operations[reward] = {name: f2 / TERA for name, f2 in zip(OPERATIONS, found)}
    return recomputed, kept, operations


def draw_costs(run: SavingsRun, costs: Costs, path: Path) -> None:
    """Draw savings.png: memory and FLOPs of a ReFL update, also without its rollout, one stacked bar per reward."""
    recomputed, plain, operations = stacks(run, costs)
    figure = Figure(figsize=(16.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 4)
    top = max(sum(parts.values()) for parts in plain.values()) * 1.14
    _bars(axes[0], plain, "Peak memory, activations kept", "{:.1f} GiB", top)
    _bars(axes[1], recomputed, "Peak memory, blocks recomputed", "{:.1f} GiB", top)
    gradient = {reward: {n: f2 for n, f2 in parts.items() if n != "rollout"} for reward, parts in operations.items()}
    _bars(axes[2], gradient, "Operations, gradient part alone", "{:.0f} TFLOP", None)
    high = max(sum(parts.values()) for parts in operations.values()) * 1.5  # room for the legend
    _bars(axes[3], operations, "Operations, whole update", "{:.0f} TFLOP", high)
    sizes = f"{run.size} x {run.size}, batch {run.batch}, {77 + run.text_length} text tokens, bfloat16"
    figure.suptitle(f"One ReFL update of SD3.5 Medium: {sizes}", fontsize=12)
    save_figure(figure, path, dpi=130)


def _bars(axis: Axes, stacked: dict, title: str, shown: str, top: float | None) -> None:
    """Draw one stacked bar per reward, annotated with its total and, for pixel rewards, the latent reward's saving."""
    latent = sum(stacked["dinalrm"].values())
    floors = dict.fromkeys(stacked, 0.0)
    for name in next(iter(stacked.values())):
        heights = [parts[name] for parts in stacked.values()]
        axis.bar(range(len(stacked)), heights, 0.62, bottom=list(floors.values()), color=COLOURS[name], label=name)
        floors = {reward: floor + stacked[reward][name] for reward, floor in floors.items()}
    for index, (reward, height) in enumerate(floors.items()):
        saved = f"\nlatent: {percent_saved(latent, height):.2g} % less" if reward != "dinalrm" else ""
        axis.annotate(
            shown.format(height) + saved, (index, height), (0, 4), textcoords="offset points", ha="center", fontsize=9
        )
    axis.set_xticks(range(len(stacked)), [NAMES[reward].replace(" (", "\n(") for reward in stacked])
    axis.set_ylim(0, top or max(floors.values()) * 1.2)
    axis.set_ylabel(shown.split()[-1])
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
