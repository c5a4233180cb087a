"""savings.png: what one ReFL update holds and computes, stacked by what it is for, latent beside pixel."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.align.savings.case import Case
from dinalrm_align.align.savings.config import SavingsRun
from dinalrm_align.align.savings.count import Cost
from dinalrm_align.align.savings.plan import REWARDS, base_case, without_recomputing
from dinalrm_align.align.savings.tables import GIB, NAMES, TERA
from dinalrm_align.train.figures import save_figure

COLORS = {
    "base model": "#4c6a92", "reward's weights and VAE": "#d1793a", "LoRA's moments": "#9a9a9a",
    "activations": "#e6c26e", "policy": "#4c6a92", "VAE decoder": "#b8483e", "reward": "#d1793a",
    "recomputed": "#c9c9c9",
}  # fmt: skip


def stacks(run: SavingsRun, costs: Mapping[Case, Cost]) -> tuple[dict, dict, dict]:
    """By reward: GiB of an update with blocks recomputed, the same without, and TFLOP (F2); each by what it is for."""
    base = base_case(run)
    plain = without_recomputing(base)
    own = costs[plain.but(work="policy_forward")].weights / GIB
    policy, decoder = (costs[plain.but(work=work)] for work in ("policy_forward", "vae_gradient"))
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
        again = costs[base.but(reward=reward, work="refl")].f2 - update
        gradient = costs[plain.but(reward=reward, work="gradient")].f2
        decoding = decoder.f2 if reward != "dinalrm" else 0
        operations[reward] = {
            "policy": (update - gradient) / TERA,
            "VAE decoder": decoding / TERA,
            "reward": (gradient - decoding) / TERA,
            "recomputed": again / TERA,
        }
    assert policy.f2 > 0
    return memory[0], memory[1], operations


def draw(run: SavingsRun, costs: Mapping[Case, Cost], path: Path) -> None:
    recomputed, plain, operations = stacks(run, costs)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    top = max(sum(parts.values()) for parts in plain.values()) * 1.14
    _bars(axes[0], plain, "GiB", "Memory, activations kept", "{:.1f} GiB", top)
    _bars(axes[1], recomputed, "GiB", "Memory, blocks recomputed", "{:.1f} GiB", top)
    _bars(axes[2], operations, "TFLOP", "Operations", "{:.0f} TFLOP", None)
    tokens = 77 + run.text_length
    figure.suptitle(
        f"One ReFL update of SD3.5 Medium: {run.size} x {run.size}, batch {run.batch}, {tokens} text tokens, bfloat16",
        fontsize=12,
    )
    save_figure(figure, path, dpi=130)


def _bars(axis: Axes, stacked: dict, unit: str, title: str, shown: str, top: float | None) -> None:
    """A stacked bar per reward; each says its height, and how much less the latent reward's is than it."""
    latent = sum(stacked["dinalrm"].values())
    floors = dict.fromkeys(stacked, 0.0)
    for name in next(iter(stacked.values())):
        heights = [parts[name] for parts in stacked.values()]
        axis.bar(range(len(stacked)), heights, 0.62, bottom=list(floors.values()), color=COLORS[name], label=name)
        floors = {reward: floor + stacked[reward][name] for reward, floor in floors.items()}
    for place, (reward, height) in enumerate(floors.items()):
        text = shown.format(height)
        if reward != "dinalrm":
            text += f"\nlatent: {100 * (1 - latent / height):.0f} % less"
        axis.annotate(text, (place, height), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axis.set_xticks(range(len(stacked)), [NAMES[reward].replace(" (", "\n(") for reward in stacked])
    axis.set_ylim(0, top or max(floors.values()) * 1.2)
    axis.set_ylabel(unit)
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
