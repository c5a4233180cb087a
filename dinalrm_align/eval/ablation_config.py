"""Settings of `recipes/ablate_reward.py`: arms, the questions they answer, and the noise levels. Torch-free.

An arm is a reward training with a few settings changed; all arms of a question are compared with the baseline.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from dinalrm_align.eval.config import check_noise_levels
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train.settings import ClosedUnitInterval, NonNegativeInt, PositiveInt, check_fields, did_you_mean

BASELINE = "calibrated"
Changes = dict[str, Any]
"""Dotted options of `recipes/train_reward.py` -> values."""


@dataclass(frozen=True)
class Arm:
    """One variant of the reward training.

    Args:
        title: for tables.
        changes: options that differ from the baseline, or a function of the baseline's reward that returns them.
        sigma: its own noise level, evaluated besides all others; the paper's 0.4 unless it was trained at one level.
    """

    title: str
    changes: Changes | Callable[[RewardConfig], Changes] = field(default_factory=dict)
    sigma: float = 0.4

    def options(self, reward: RewardConfig) -> Changes:
        return self.changes(reward) if callable(self.changes) else self.changes


def _depth(reward: RewardConfig, quarters: int) -> Changes:
    """That many quarters of the baseline's blocks, with taps in proportion."""
    layers = max(1, reward.num_layers * quarters // 4)

    def scaled(taps: tuple[int, ...]) -> list[int]:
        return sorted({max(1, round(tap * layers / reward.num_layers)) for tap in taps})

    taps = {"reward.visual_taps": scaled(reward.visual_taps), "reward.text_taps": scaled(reward.text_taps)}
    return {"reward.num_layers": layers, **taps}


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
    "half_depth": Arm("half the blocks", lambda reward: _depth(reward, 2)),
    "more_depth": Arm("a half more blocks", lambda reward: _depth(reward, 6)),
    "last_tap": Arm("only the last block tapped", _last_tap),
    "image_taps": Arm("image taps only", {"reward.text_taps": []}),
    "no_film": Arm("no FiLM", {"reward.head.film": False}),
    "no_gates": Arm("no value gates", {"reward.head.value_gates": False}),
    "queries_1": Arm("1 query", {"reward.head.num_queries": 1}),
    "queries_8": Arm("8 queries", {"reward.head.num_queries": 8}),
}


@dataclass(frozen=True)
class Question:
    """Arms that answer one question. paper: orderings (better, worse) of arXiv 2602.11146, section 5."""

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
PAPER_ARMS = [BASELINE, "fixed", "sigma_0", "frozen", "logit_normal"]


@dataclass
class AblateRun:
    """Settings of `python recipes/ablate_reward.py`.

    Args:
        model: base model whose transformer the rewards use. shapes, sd35, or the folder or hub id of a
            StableDiffusion3Pipeline.
        arms: variants to train and evaluate; calibrated is the baseline. Known: calibrated, fixed, logit_normal,
            sigma_0, sigma_0.4, frozen, nll, bradley_terry, half_depth, more_depth, last_tap, image_taps, no_film,
            no_gates, queries_1, queries_8.
        seeds: of initial weights, data order and noise; every arm is trained with each.
        steps: updates of every arm.
        training: YAML of `recipes/train_reward.py` that the arms change; default, that of the model's kind.
        pairs: preference pairs to train on, as in `recipes/train_reward.py`; default, those of the embedded world.
        judged: test sets, name -> location. Default, for the embedded world only: heldout, ranked lists of held-out
            captions with the noisy labels of training; concepts, pairs that differ in one concept, with exact labels;
            shifted, such pairs of degraded images. Noise draws are compared on the last set.
        output_dir: receives all runs and the report. Run again, it continues where it stopped.
        launch: launcher of the trainings instead of this program's Python, as "accelerate launch --num_processes 8".
        device: auto uses a CUDA GPU if there is one.
        batch_size: groups of images per batch of the evaluation.
        sigmas: single noise levels at which every reward is evaluated.
        ensembles: noise levels joined as tokens; the first for every reward, all of them for the baseline.
        draws: noise draws at sigma 0.4 for the baseline, for the variance of the score and the gain from averaging.
        noise_seed: of the evaluation's noise, the same for all rewards.
        shapes_pairs: pairs of the embedded world.
    """

    model: str = "shapes"
    arms: list[str] = field(default_factory=lambda: list(PAPER_ARMS))
    seeds: list[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    steps: PositiveInt = 500
    training: str | None = None
    pairs: str | None = None
    judged: dict[str, str] | None = None
    output_dir: str = "runs/ablate_reward"
    launch: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: PositiveInt = 16
    sigmas: list[ClosedUnitInterval] = field(
        default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    )
    ensembles: list[list[ClosedUnitInterval]] = field(
        default_factory=lambda: [[0.2, 0.5, 0.7], [0.1, 0.3, 0.5, 0.7, 0.9]]
    )
    draws: PositiveInt = 8
    noise_seed: NonNegativeInt = 1234
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms: got {arm!r}{did_you_mean(arm, ARMS) or ';'} known: {', '.join(ARMS)}")
        for name in ("arms", "seeds"):
            values = vars(self)[name]
            if not values or len({*values}) < len(values):
                raise ValueError(f"{name}: got {values}; expected at least one, each once")
        check_noise_levels(self.sigmas, self.ensembles)
