"""Settings of the ablations, `recipes/ablate_reward.py`: the arms, and what is measured of each. Torch-free.

An arm is reward training with a few settings changed; the first of a question is what the others are compared with.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from dinalrm_align.eval.config import check_levels
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train.settings import check_fields, check_integer, did_you_mean

BASELINE = "calibrated"
Changes = dict[str, Any]
"""Dotted options of `recipes/train_reward.py` and their values."""


@dataclass(frozen=True)
class Arm:
    """One way to train a reward.

    Args:
        title: what it is, for tables.
        changes: options that differ from the baseline's; or a function that finds them, given the baseline's reward.
        sigma: the single noise level it is judged at beside all others, the paper's 0.4 unless it was trained for one.
    """

    title: str
    changes: Changes | Callable[[RewardConfig], Changes] = field(default_factory=dict)
    sigma: float = 0.4

    def options(self, reward: RewardConfig) -> Changes:
        return self.changes(reward) if callable(self.changes) else self.changes


def _depth(number: int) -> Callable[[RewardConfig], Changes]:
    """The first `number` quarters of the baseline's blocks, its taps moved along."""

    def changes(reward: RewardConfig) -> Changes:
        layers = max(1, reward.num_layers * number // 4)

        def moved(taps: tuple[int, ...]) -> list[int]:
            return sorted({max(1, round(tap * layers / reward.num_layers)) for tap in taps})

        return {
            "reward.num_layers": layers,
            "reward.visual_taps": moved(reward.visual_taps),
            "reward.text_taps": moved(reward.text_taps),
        }

    return changes


def _last_tap(reward: RewardConfig) -> Changes:
    return {"reward.visual_taps": [reward.num_layers], "reward.text_taps": [reward.num_layers]}


ARMS: dict[str, Arm] = {
    BASELINE: Arm("sigma uniform, calibrated Thurstone, fidelity, LoRA"),
    "fixed": Arm("fixed variance", {"loss.likelihood": "thurstone_fixed"}),
    "logit_normal": Arm("sigma logit-normal", {"train_sigma.density": "logit_normal"}),
    "sigma_0": Arm(
        "sigma 0, fixed variance",
        {"train_sigma.density": "constant", "train_sigma.value": 0.0, "loss.likelihood": "thurstone_fixed"},
        sigma=0.0,
    ),
    "sigma_0.4": Arm("sigma 0.4", {"train_sigma.density": "constant", "train_sigma.value": 0.4}),
    "frozen": Arm("frozen backbone", {"reward.tuning": "none"}),
    "nll": Arm("negative log-likelihood", {"loss.objective": "nll"}),
    "bradley_terry": Arm("Bradley-Terry", {"loss.likelihood": "bradley_terry"}),
    "half_depth": Arm("half the blocks", _depth(2)),
    "more_depth": Arm("a half more blocks", _depth(6)),
    "last_tap": Arm("the last block tapped alone", _last_tap),
    "image_taps": Arm("image taps alone", {"reward.text_taps": []}),
    "no_film": Arm("no FiLM", {"reward.head.film": False}),
    "no_gates": Arm("no value gates", {"reward.head.value_gates": False}),
    "queries_1": Arm("1 query", {"reward.head.num_queries": 1}),
    "queries_8": Arm("8 queries", {"reward.head.num_queries": 8}),
}


@dataclass(frozen=True)
class Question:
    """Arms that answer one question. paper: what is read of it in arXiv 2602.11146, section 5, as (better, worse)."""

    title: str
    arms: tuple[str, ...]
    paper: tuple[tuple[str, str], ...] = ()


QUESTIONS: dict[str, Question] = {
    "likelihood": Question("Likelihood", (BASELINE, "fixed"), ((BASELINE, "fixed"),)),
    "noise": Question(
        "Noise levels in training",
        (BASELINE, "fixed", "logit_normal", "sigma_0", "sigma_0.4"),
        ((BASELINE, "sigma_0"), ("fixed", "sigma_0"), ("logit_normal", "sigma_0"), (BASELINE, "sigma_0.4")),
    ),
    "backbone": Question("Backbone", (BASELINE, "frozen"), ((BASELINE, "frozen"),)),
    "objective": Question("Objective", (BASELINE, "nll", "bradley_terry")),
    "taps": Question("Blocks and taps", (BASELINE, "half_depth", "more_depth", "last_tap", "image_taps")),
    "head": Question("Head", (BASELINE, "no_film", "no_gates", "queries_1", "queries_8")),
}
PAPERS_ARMS = [BASELINE, "fixed", "sigma_0", "frozen", "logit_normal"]


@dataclass
class AblateRun:
    """Everything `python recipes/ablate_reward.py` can be told.

    Args:
        model: whose transformer the rewards read with. shapes, sd35, or the folder or hub id of a
            StableDiffusion3Pipeline.
        arms: which variants to train and judge; calibrated is the baseline that the others are compared with. Known:
            calibrated, fixed, logit_normal, sigma_0, sigma_0.4, frozen, nll, bradley_terry, half_depth, more_depth,
            last_tap, image_taps, no_film, no_gates, queries_1, queries_8.
        seeds: of initial weights, order of the data and noise; every arm is trained with each.
        steps: updates of every arm.
        training: YAML of `recipes/train_reward.py` that the arms change; by default that of the model's kind.
        pairs: preference pairs to train on, as in `recipes/train_reward.py`; the embedded world makes its own.
        judged: name -> pairs that the rewards are judged on; the embedded world makes "heldout", lists of held-out
            captions judged as in training, "concepts", pairs that differ in one concept, labels without noise, and
            "shifted", such pairs of damaged pictures. Draws of noise are compared on the last.
        output_dir: everything. Run again, it goes on where it stopped.
        launch: what starts a training besides the Python of this program, for instance "accelerate launch
            --num_processes 8".
        device: auto takes a CUDA GPU if there is one.
        batch_size: groups of pictures judged at once.
        sigmas: single noise levels that every reward is judged at.
        ensembles: noise levels joined as tokens; the first for every reward, all for the baseline's.
        draws: noise draws at sigma 0.4, for the baseline: how far they move the score, and what averaging them gains.
        noise_seed: of the noise that pictures are judged with, the same for all rewards.
        shapes_pairs: the pairs that the embedded world makes.
    """

    model: str = "shapes"
    arms: list[str] = field(default_factory=lambda: list(PAPERS_ARMS))
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 500
    training: str | None = None
    pairs: str | None = None
    judged: dict[str, str] | None = None
    output_dir: str = "runs/ablate_reward"
    launch: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = 16
    sigmas: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
    ensembles: list[list[float]] = field(default_factory=lambda: [[0.2, 0.5, 0.7], [0.1, 0.3, 0.5, 0.7, 0.9]])
    draws: int = 8
    noise_seed: int = 1234
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms: unknown {arm!r}{did_you_mean(arm, ARMS)} (known: {', '.join(ARMS)})")
        for name, named in (("arms", self.arms), ("seeds", self.seeds)):
            if not named or len({*named}) < len(named):
                raise ValueError(f"{name}: got {named}; expected at least one, and each once")
        for seed in self.seeds:
            check_integer("seeds", seed)
        for name in ("steps", "batch_size", "draws"):
            check_integer(name, vars(self)[name], low=1)
        check_integer("noise_seed", self.noise_seed)
        check_levels(self.sigmas, self.ensembles)
