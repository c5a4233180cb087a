"""Settings of judging a finished reward, `recipes/evaluate_reward.py`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.eval.test_sets_config import check_protocol
from dinalrm_align.reward.loss_config import LossConfig
from dinalrm_align.reward.names import parse_reward
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.train.settings import check_fields, check_integer


@dataclass
class EvaluateRun:
    """Everything `python recipes/evaluate_reward.py` can be told.

    Args:
        model: whose transformer, VAE and text encoders a latent reward reads with. shapes, sd35, or the folder or hub
            id of a StableDiffusion3Pipeline.
        reward: what is judged, as every recipe writes rewards. dinalrm (the model's own, the default), the folder or
            hub id of another latent reward, pickscore, hpsv2.1, hpsv3, NAME=SOURCE, a weighted sum, or module:function.
        judged: name -> where the pairs are. imagereward, hpdv2, hpdv3, genai_bench, genai_bench_v1 and pickapic are the
            public test sets, each the folder of its published files, or "hub" to download it; a wrong folder tells what
            belongs there and how to get it. Any other name is your own, a directory of latents, mined pairs or a jsonl
            of pictures. The embedded world makes "heldout", lists of held-out captions judged as in training,
            "concepts", pairs that differ in one concept, and "shifted", such pairs of damaged pictures.
        protocol: name of a set -> the rule by which scores become its accuracy. pooled, strict, diff, grouped,
            half-ties, three-way, tau, and for lists that raters ranked (imagereward, hpdv2) hpsv2 and mps; by default
            the one that the set is known by. The report has all of them, and what each means.
        trained_on: what the reward was trained on, to count the pairs that it has met and to tell the accuracy without
            them. A directory of latent pairs, a jsonl of pictures, or a published train.json.
        output_dir: gets the scores, per picture and per pair, evaluation.md, evaluation.json and pictures. Run again,
            scores that are there are not taken again; a stopped run goes on.
        device: auto takes a CUDA GPU if there is one.
        batch_size: groups of latents, or pictures, judged at once.
        size: side of the square at whose area a latent reward sees pictures; by default the model's own. DiNa-LRM for
            SD3.5 was trained at 1024. Rewards over pictures see them as they are.
        fit: how pictures come to that size. area keeps each picture's aspect; crop scales it to cover the square and
            cuts off the rest.
        on_bad: what to do about a picture that is missing or cannot be read. refuse ends with its name; skip leaves its
            pairs out, and names and counts them.
        sigmas: single noise levels that a latent reward is read at.
        ensembles: noise levels joined as tokens, and averaged.
        calibrated_at: single levels at which calibration is looked at; each must be one of sigmas.
        loss: the likelihood that turns gaps of scores into probabilities. What the reward was trained with.
        gold: also tell how often raters agree with the model's gold score, which reads the decoded latents; not on sets
            of pictures, where a gold score is a reward like any other.
        noise_seed: of the noise that pictures are judged with.
        bootstrap: resamples of prompts behind an interval.
        shapes_pairs: the pairs that the embedded world makes.
    """

    model: str = "shapes"
    reward: str | None = None
    judged: dict[str, str] | None = None
    protocol: dict[str, str] = field(default_factory=dict)
    trained_on: str | None = None
    output_dir: str = "runs/evaluate_reward"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = 16
    size: int | None = None
    fit: Literal["area", "crop"] = "area"
    on_bad: Literal["refuse", "skip"] = "refuse"
    sigmas: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    ensembles: list[list[float]] = field(default_factory=lambda: [[0.2, 0.5, 0.7]])
    calibrated_at: list[float] = field(default_factory=lambda: [0.1, 0.4, 0.7, 0.9])
    loss: LossConfig = field(default_factory=LossConfig)
    gold: bool = True
    noise_seed: int = 1234
    bootstrap: int = 1000
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("batch_size", self.batch_size, low=1)
        check_integer("noise_seed", self.noise_seed)
        check_integer("bootstrap", self.bootstrap, low=100)
        if self.size is not None:
            check_integer("size", self.size, low=16)
            if self.size % 16:
                raise ValueError(f"size: got {self.size}; expected a multiple of 16")
        check_levels(self.sigmas, self.ensembles)
        if not set(self.calibrated_at) <= set(self.sigmas):
            raise ValueError(f"calibrated_at: got {self.calibrated_at}; each must be one of sigmas {self.sigmas}")
        if self.reward is not None:
            parse_reward(self.reward)
        if self.judged == {}:
            raise ValueError("judged: got no sets; expected some, or leave it out for the embedded world's own")
        for name in self.judged or {}:
            if not name or "/" in name or name.startswith("."):
                raise ValueError(f"judged: got the name {name!r}; it becomes part of file names: use a plain word")
        for name, protocol in self.protocol.items():
            if self.judged is not None and name not in self.judged:
                raise ValueError(f"protocol: got one for {name!r}; judged are {', '.join(self.judged)}")
            check_protocol(name, protocol)

    @property
    def checkpoint(self) -> str | None:
        """Of the latent reward that is judged, "" for the model's own; None: it is no single latent reward."""
        terms = parse_reward(self.reward or "dinalrm")
        single = len(terms) == 1 and terms[0].name == "dinalrm" and terms[0].weight == 1
        return (terms[0].source or "") if single else None

    @property
    def reads_latents(self) -> bool:
        """Whether a latent reward is judged, alone or as a part."""
        return any(term.name == "dinalrm" for term in parse_reward(self.reward or "dinalrm"))


def check_levels(sigmas: list[float], ensembles: list[list[float]]) -> None:
    """ValueError unless there is a single level and an ensemble, none empty, every level in [0, 1]."""
    levels = [*sigmas, *(sigma for ensemble in ensembles for sigma in ensemble)]
    if not sigmas or not ensembles or not all(ensembles) or not all(0 <= sigma <= 1 for sigma in levels):
        raise ValueError(f"sigmas, ensembles: got {sigmas}, {ensembles}; expected some of each, levels in [0, 1]")
