"""Settings of `recipes/evaluate_reward.py`, `ablate_reward.py` and `compare_runs.py`. Does not import torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from dinalrm_align.eval.test_sets_config import SetLocation, check_protocol
from dinalrm_align.models.specs import ModelName
from dinalrm_align.reward.config import LossConfig, RewardConfig
from dinalrm_align.reward.names import RewardText, parse_reward
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train import settings

BASELINE = "calibrated"
Changes = dict[str, Any]  # dotted options of `recipes/train_reward.py` -> values


@dataclass(frozen=True)
class Arm:
    """A training variant of the reward, which the ablation compares with the baseline.

    changes: options that differ from the baseline's, or a function from the baseline's config to these options.
    sigma: noise level of the report's column "own sigma". It is the training level, or 0.4 if there are several levels.
    """

    title: str
    changes: Changes | Callable[[RewardConfig], Changes] = field(default_factory=dict)
    sigma: float = 0.4

    @property
    def has_one_level(self) -> bool:
        return not callable(self.changes) and self.changes.get("train_sigma.density") == "constant"

    def options(self, reward: RewardConfig) -> Changes:
        return self.changes(reward) if callable(self.changes) else self.changes


def _depth(reward: RewardConfig, quarters: int) -> Changes:
    """Return options that scale the baseline's number of blocks, and its tap positions, by about `quarters` / 4."""
    changes: Changes = {"reward.num_layers": max(1, reward.num_layers * quarters // 4)}
    for name in ("visual_taps", "text_taps"):
        scaled = (tap * changes["reward.num_layers"] / reward.num_layers for tap in vars(reward)[name])
        changes[f"reward.{name}"] = sorted({max(1, round(tap)) for tap in scaled})
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
    "bradley_terry": Arm("Bradley-Terry, negative log-likelihood", {"loss.likelihood": "bradley_terry"}),
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
    """A question and the variants that answer it. `paper`: (better, worse) variants according to arXiv 2602.11146.

    Every variant is compared with the baseline. `others`: further pairs to compare.
    """

    title: str
    arms: tuple[str, ...]
    paper: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, str], ...] = ()


QUESTIONS: dict[str, Question] = {
    "likelihood": Question(
        "Likelihood", (BASELINE, "fixed", "bradley_terry"), ((BASELINE, "fixed"),), (("nll", "bradley_terry"),)
    ),
    "noise": Question(
        "Noise levels in training",
        (BASELINE, "fixed", "logit_normal", "sigma_0", "sigma_0.4"),
        ((BASELINE, "sigma_0"), ("fixed", "sigma_0"), ("logit_normal", "sigma_0"), (BASELINE, "sigma_0.4")),
    ),
    "backbone": Question("Backbone", (BASELINE, "frozen"), ((BASELINE, "frozen"),)),
    "objective": Question("Objective", (BASELINE, "nll")),
    "taps": Question("Blocks and taps", (BASELINE, "half_depth", "more_depth", "last_tap", "image_taps")),
    "head": Question("Head", (BASELINE, "no_film", "no_gates", "queries_1", "queries_8")),
}
PAPER_ARMS = [BASELINE, "fixed", "sigma_0", "frozen", "logit_normal"]


@dataclass
class AblateRun:
    """Settings of `python recipes/ablate_reward.py`.

    Args:
        model: `shapes`, `sd35`, or folder or hub id of a StableDiffusion3Pipeline. Rewards use its transformer.
        arms: variants to train and evaluate; `calibrated` is the baseline. Known: calibrated, fixed, logit_normal,
            sigma_0, sigma_0.4, frozen, nll, bradley_terry, half_depth, more_depth, last_tap, image_taps, no_film,
            no_gates, queries_1, queries_8.
        seeds: seeds of initial weights, data order and noise; every arm is trained once per seed. With fewer seeds the
            smallest detectable effect is larger; with one, the report claims nothing.
        steps: number of updates of every training.
        training: YAML file with settings of `recipes/train_reward.py`; the options of an arm take precedence. Default:
            the file in recipes/ for the kind of `model`, such as train_reward_shapes.yaml.
        pairs: preference pairs to train on, as in `recipes/train_reward.py`; for model `shapes`, generated by default.
        test_sets: test sets, name -> location, as in `recipes/evaluate_reward.py`; default, for model `shapes` only:
            heldout, outside (if configured), concepts, shifted. The variance over noise draws is measured on the last.
        output_dir: folder for all runs and the report. The same command continues an interrupted ablation.
        launch: command that launches each training, e.g. "accelerate launch --num_processes 8"; default: this Python.
        device: `auto` uses a CUDA GPU if there is one.
        batch_size: groups of images per batch of the evaluation.
        on_bad: action on images and records that cannot be read, in training and evaluation: refuse (exit) or skip
            (leave out their pairs); default: that of `training`.
        sigmas: single noise levels at which every reward is evaluated on heldout and outside (or on all test sets, if
            none has such a name). On the other test sets, only the baseline is evaluated at all of them.
        ensembles: lists of noise levels; each list gives one score, from the backbone tokens of all its levels. Every
            reward is evaluated with the first list, and the baseline with all lists.
        draws: number of noise draws at sigma 0.4 with which the baseline is evaluated, to measure the variance of the
            score and the gain from averaging.
        noise_seed: seed of the evaluation's noise, which is the same for all rewards.
        shapes_pairs: settings of the pairs generated for model `shapes`.
    """

    model: ModelName = "shapes"
    arms: list[str] = field(default_factory=lambda: list(PAPER_ARMS))
    seeds: list[settings.NonNegativeInt] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    steps: settings.PositiveInt = 500
    training: settings.PathText | None = None
    pairs: settings.PathText | None = None
    test_sets: dict[str, SetLocation] | None = None
    output_dir: settings.PathText = "runs/ablate_reward"
    launch: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: settings.PositiveInt = 16
    on_bad: Literal["refuse", "skip"] | None = None
    sigmas: list[settings.ClosedUnitInterval] = field(
        default_factory=lambda: [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95]
    )
    ensembles: list[list[settings.ClosedUnitInterval]] = field(
        default_factory=lambda: [[0.2, 0.5, 0.7], [0.1, 0.3, 0.5, 0.7, 0.9]]
    )
    draws: settings.PositiveInt = 8
    noise_seed: settings.NonNegativeInt = 1234
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        settings.check_fields(self)
        if self.test_sets == {}:
            raise ValueError("test_sets: got no sets; expected at least one, or leave it out to generate the sets")
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms: got {arm!r}{settings.did_you_mean(arm, ARMS) or ';'} known: {', '.join(ARMS)}")
        for name in ("arms", "seeds"):
            values = vars(self)[name]
            if not values or len({*values}) < len(values):
                raise ValueError(f"{name}: got {values}; expected at least one, each once")
        check_noise_levels(self.sigmas, self.ensembles)


@dataclass
class EvaluateRun:
    """Settings of `python recipes/evaluate_reward.py`.

    Args:
        model: `shapes`, `sd35`, or folder or hub id of a StableDiffusion3Pipeline. Latent rewards use its networks.
        reward: reward to evaluate, as in every recipe: dinalrm (default: the model's own reward), folder or hub id of
            another latent reward, pickscore, hpsv2.1, hpsv3, NAME=SOURCE, a weighted sum, or module:function.
        test_sets: test sets, name -> location. imagereward, hpdv2, hpdv3, hpdv3pp_aes and hpdv3pp_tf (HPDv3++,
            aesthetics and text following), genai_bench, genai_bench_v1 and pickapic are public test sets; their
            location is the folder of the published files, or "hub" to download them. If files are missing, the error
            lists them and how to get them. Any other name is your own set: a directory of latents, mined pairs or a
            jsonl of images. Default, for model `shapes` only: heldout (ranked lists of held-out captions with noisy
            labels, as in training), outside (such lists by the generators in `shapes_pairs.outside`, if any), concepts
            (pairs that differ in one concept) and shifted (pairs of degraded images that differ in one concept).
        protocol: name of a test set -> accuracy protocol, defined in the report: pooled, strict, diff, grouped,
            half-ties, three-way or tau; for ranked lists (imagereward, hpdv2) also hpsv2 or mps. Default: the set's.
        trained_on: training data of the reward: a directory of latent pairs, a jsonl of images, or a published
            train.json. The report then gives the overlap with the test sets, and the accuracy on pairs without overlap.
        output_dir: folder for scores, evaluation.md, evaluation.json and figures. A stopped evaluation resumes there.
            Default: runs/evaluate_MODEL_REWARD.
        device: `auto` uses a CUDA GPU if there is one.
        dtype: dtype of the reward's weights. auto: a latent reward has the model's own dtype on a GPU and float32 on a
            CPU, an image reward its own.
        batch_size: groups of latents, or images, per batch.
        size: images for a latent reward are resized to an area of about size x size pixels; default: the size that the
            model's reward was trained at, 1024 for SD3.5. Image rewards resize images themselves.
        text_length: T5 tokens per prompt, 1 to 512; default: the number in the reward's checkpoint.
        fit: `area` resizes with the aspect ratio kept; `crop` resizes to cover size x size and crops the centre.
        on_bad: `refuse` stops at an image or record that cannot be read, also in `trained_on`; `skip` leaves out its
            pairs and lists it in the report.
        sigmas: single noise levels at which a latent reward is evaluated.
        ensembles: lists of noise levels. For each list, the report gives the accuracy of one score computed from the
            backbone tokens of all levels, and the accuracy of the mean of the separate scores.
        calibrated_at: noise levels of the calibration report; they must be in `sigmas`. Default: those of 0.1, 0.4, 0.7
            and 0.9 that are in `sigmas`, or else all `sigmas`.
        loss: likelihood that turns score gaps into probabilities; use the one that the reward was trained with.
        gold: also report the accuracy of the model's gold reward on decoded latents. Image sets are left out.
        noise_seed: seed of the noise.
        bootstrap: number of bootstrap resamples of prompts for the intervals.
        shapes_pairs: settings of the test sets generated for model `shapes`.
    """

    model: ModelName = "shapes"
    reward: RewardText | None = None
    test_sets: dict[str, SetLocation] | None = None
    protocol: dict[str, str] = field(default_factory=dict)
    trained_on: settings.PathText | None = None
    output_dir: settings.PathText | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_size: settings.PositiveInt = 16
    size: settings.PositiveInt | None = None
    text_length: settings.IntFrom1To512 | None = None
    fit: Literal["area", "crop"] = "area"
    on_bad: Literal["refuse", "skip"] = "refuse"
    sigmas: list[settings.ClosedUnitInterval] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    )
    ensembles: list[list[settings.ClosedUnitInterval]] = field(default_factory=lambda: [[0.2, 0.5, 0.7]])
    calibrated_at: list[float] | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    gold: bool = True
    noise_seed: settings.NonNegativeInt = 1234
    bootstrap: settings.IntFrom100 = 1000
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        settings.check_fields(self)
        if self.size is not None and self.size % 16:
            raise ValueError(f"size: got {self.size}; expected a multiple of 16")
        check_noise_levels(self.sigmas, self.ensembles)
        if self.calibrated_at is None:
            self.calibrated_at = [sigma for sigma in (0.1, 0.4, 0.7, 0.9) if sigma in self.sigmas] or self.sigmas
        if not set(self.calibrated_at) <= set(self.sigmas):
            raise ValueError(f"calibrated_at: got {self.calibrated_at}; expected some of sigmas {self.sigmas}")
        if self.reward is not None:
            parse_reward(self.reward)
        if self.test_sets == {}:
            raise ValueError("test_sets: got no sets; expected at least one, or leave it out to generate the sets")
        for name in self.test_sets or {}:
            if not name or "/" in name or name.startswith("."):
                raise ValueError(f"test_sets: got the name {name!r}; expected a word that can be part of file names")
        names = self.test_sets or self.shapes_pairs.held_out_kinds
        for name, protocol in self.protocol.items():
            if name not in names:
                raise ValueError(f"protocol: got one for {name!r}; expected names in test_sets: {', '.join(names)}")
            check_protocol(name, protocol)

    @property
    def checkpoint(self) -> str | None:
        """Folder or hub id of the reward if it is a single latent reward ("" for the model's own), otherwise None."""
        terms = parse_reward(self.reward or "dinalrm")
        single = len(terms) == 1 and terms[0].name == "dinalrm" and terms[0].weight == 1
        return (terms[0].source or "") if single else None


def check_noise_levels(sigmas: list[float], ensembles: list[list[float]]) -> None:
    """Raise ValueError if `sigmas`, `ensembles` or a list in `ensembles` is empty or has an invalid noise level."""
    settings.check_levels("sigmas", sigmas)
    settings.check_levels("ensembles", ensembles)
    for index, levels in enumerate(ensembles):
        settings.check_levels(f"ensembles[{index}]", levels)


@dataclass
class CompareRun:
    """Settings of `python recipes/compare_runs.py`.

    Args:
        runs: folders of runs, of any recipes and rewards. Runs that differ only in their seed are averaged. Gains are
            shown for runs with the evaluation settings (model, prompts, noise, sampler) of the first run.
        group: name -> folders of runs with different seeds, averaged under this name. On the command line:
            --group NAME RUN [RUN ...], once per name.
        output_dir: folder for index.html (self-contained), compare.md and the figures.
        shown: number of prompts in the grid of images; fewer if a run stored images of fewer prompts.
        title: title of the page.
    """

    runs: list[settings.PathText] = field(default_factory=list)
    group: dict[str, list[settings.PathText]] = field(default_factory=dict)
    output_dir: settings.PathText = "runs/compare"
    shown: settings.PositiveInt = 8
    title: str = "Runs side by side"

    def __post_init__(self) -> None:
        settings.check_fields(self)
        for name, runs in self.group.items():
            if not runs:
                raise ValueError(f"group.{name}: got no run; expected the folder of at least one run")
        if not self.runs and not self.group:
            raise ValueError("runs: got none; expected the folder of at least one run")


@dataclass
class ScoreRun:
    """Settings of `python recipes/score_images.py`.

    Args:
        prompt_and_images: the prompt, then the paths of one or more image files.
        model: model whose latents a latent reward reads, as in the alignment recipes.
        reward: reward that scores the images: a name, NAME=SOURCE, the folder or hub id of a latent reward, the address
            of a server, or a weighted sum.
        device: auto: a CUDA GPU if there is one, otherwise the CPU.
        dtype: dtype of the weights, as in `EvaluateRun`.
    """

    prompt_and_images: list[str] = field(default_factory=list)
    model: ModelName = "auto"
    reward: RewardText = "dinalrm"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        settings.check_fields(self)
        if len(self.prompt_and_images) < 2:
            got = self.prompt_and_images or "nothing"
            raise ValueError(f'prompt_and_images: got {got}; expected a prompt and image files: "a red circle" a.png')
