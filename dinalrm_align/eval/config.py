"""Settings of `recipes/evaluate_reward.py`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.eval.test_sets_config import check_protocol
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.names import parse_reward
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train.settings import (
    ClosedUnitInterval,
    NonNegativeInt,
    PositiveInt,
    check_fields,
    check_integer,
    check_levels,
)


@dataclass
class EvaluateRun:
    """Settings of `python recipes/evaluate_reward.py`.

    Args:
        model: base model whose transformer, VAE and text encoders a latent reward uses. shapes, sd35, or the folder or
            hub id of a StableDiffusion3Pipeline.
        reward: the reward to evaluate, as in every recipe. dinalrm (the model's own, the default), the folder or hub id
            of another latent reward, pickscore, hpsv2.1, hpsv3, NAME=SOURCE, a weighted sum, or module:function.
        judged: test sets, name -> location. imagereward, hpdv2, hpdv3, genai_bench, genai_bench_v1 and pickapic are
            public test sets, located in the folder of their published files, or at "hub" to download them; the error
            for a wrong folder lists the files and how to get them. Any other name is your own set, a directory of
            latents, mined pairs or a jsonl of images. Default, for the embedded world only: heldout, ranked lists of
            held-out captions with the noisy labels of training; concepts, pairs that differ in one concept; shifted,
            such pairs of degraded images.
        protocol: name of a set -> protocol of its accuracy. pooled, strict, diff, grouped, half-ties, three-way, tau,
            and for ranked lists (imagereward, hpdv2) hpsv2 and mps; default, the set's own. The report lists them all
            with their definitions.
        trained_on: training data of the reward, to report overlap with the test sets and the accuracy without it. A
            directory of latent pairs, a jsonl of images, or a published train.json.
        output_dir: receives the scores per image and pair, evaluation.md, evaluation.json and figures. Existing scores
            are reused, so a stopped run continues.
        device: auto uses a CUDA GPU if there is one.
        batch_size: groups of latents, or images, per batch.
        size: side of the square whose area images have for a latent reward; default, the model's own. DiNa-LRM for
            SD3.5 was trained at 1024. Image rewards get images as they are.
        fit: how images are resized to that area. area keeps the aspect ratio; crop scales them to cover the square and
            crops the centre.
        on_bad: action for an image that is missing or cannot be read. refuse raises an error; skip leaves out its pairs
            and lists it in the report.
        sigmas: single noise levels for a latent reward.
        ensembles: noise levels joined as tokens, and averaged.
        calibrated_at: the single levels of the calibration report; each must be one of sigmas.
        loss: the likelihood that turns score gaps into probabilities, as the reward was trained with.
        gold: also report the accuracy of the model's gold score on decoded latents; not for sets of images, where a
            gold score is evaluated like any other reward.
        noise_seed: of the noise.
        bootstrap: resamples of prompts for the intervals.
        shapes_pairs: test sets of the embedded world.
    """

    model: str = "shapes"
    reward: str | None = None
    judged: dict[str, str] | None = None
    protocol: dict[str, str] = field(default_factory=dict)
    trained_on: str | None = None
    output_dir: str = "runs/evaluate_reward"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: PositiveInt = 16
    size: PositiveInt | None = None
    fit: Literal["area", "crop"] = "area"
    on_bad: Literal["refuse", "skip"] = "refuse"
    sigmas: list[ClosedUnitInterval] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    ensembles: list[list[ClosedUnitInterval]] = field(default_factory=lambda: [[0.2, 0.5, 0.7]])
    calibrated_at: list[float] = field(default_factory=lambda: [0.1, 0.4, 0.7, 0.9])
    loss: LossConfig = field(default_factory=LossConfig)
    gold: bool = True
    noise_seed: NonNegativeInt = 1234
    bootstrap: int = 1000
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("bootstrap", self.bootstrap, low=100)
        if self.size is not None and self.size % 16:
            raise ValueError(f"size: got {self.size}; expected a multiple of 16")
        check_noise_levels(self.sigmas, self.ensembles)
        if not set(self.calibrated_at) <= set(self.sigmas):
            raise ValueError(f"calibrated_at: got {self.calibrated_at}; expected some of sigmas {self.sigmas}")
        if self.reward is not None:
            parse_reward(self.reward)
        if self.judged == {}:
            raise ValueError("judged: got no sets; expected at least one, or leave it out for the embedded world's own")
        for name in self.judged or {}:
            if not name or "/" in name or name.startswith("."):
                raise ValueError(f"judged: got the name {name!r}; expected a plain word that can be part of file names")
        for name, protocol in self.protocol.items():
            if self.judged is not None and name not in self.judged:
                raise ValueError(f"protocol: got one for {name!r}; expected names in judged: {', '.join(self.judged)}")
            check_protocol(name, protocol)

    @property
    def checkpoint(self) -> str | None:
        """Source of the latent reward, "" for the model's own; None unless the reward is a single latent reward."""
        terms = parse_reward(self.reward or "dinalrm")
        single = len(terms) == 1 and terms[0].name == "dinalrm" and terms[0].weight == 1
        return (terms[0].source or "") if single else None

    @property
    def reads_latents(self) -> bool:
        """Whether the reward is or contains a latent reward."""
        return any(term.name == "dinalrm" for term in parse_reward(self.reward or "dinalrm"))


def check_noise_levels(sigmas: list[float], ensembles: list[list[float]]) -> None:
    """Raise ValueError unless there are single levels and ensembles, none of them empty."""
    check_levels("sigmas", sigmas)
    check_levels("ensembles", ensembles)
    for index, levels in enumerate(ensembles):
        check_levels(f"ensembles[{index}]", levels)
