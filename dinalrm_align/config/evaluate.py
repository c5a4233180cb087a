"""Settings of judging a finished reward, `recipes/evaluate_reward.py`. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.config.check import check_fields, check_integer
from dinalrm_align.config.loss import LossConfig
from dinalrm_align.config.shapes import PairsConfig


@dataclass
class EvaluateRun:
    """Everything `python recipes/evaluate_reward.py` can be told.

    Args:
        model: whose transformer the reward reads with. shapes, sd35, or the folder or hub id of a
            StableDiffusion3Pipeline.
        reward: folder or hub id of the reward; by default the model's own.
        judged: name -> pairs, directories of latents or jsonl of pictures; the embedded world makes "heldout", lists of
            held-out captions judged as in training, "concepts", pairs that differ in one concept, and "shifted", such
            pairs of damaged pictures.
        output_dir: gets the scores, evaluation.md, reliability.png and inference.png. Run again, scores that are there
            are not taken again.
        device: auto takes a CUDA GPU if there is one.
        batch_size: groups of pictures judged at once.
        sigmas: single noise levels.
        ensembles: noise levels joined as tokens, and averaged.
        calibrated_at: single levels at which calibration is looked at; each must be one of sigmas.
        loss: the likelihood that turns gaps of scores into probabilities: what the reward was trained with.
        gold: also tell how often raters agree with the model's gold score, which reads the decoded pictures.
        noise_seed: of the noise that pictures are judged with.
        shapes_pairs: the pairs that the embedded world makes.
    """

    model: str = "shapes"
    reward: str | None = None
    judged: dict[str, str] | None = None
    output_dir: str = "runs/evaluate_reward"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: int = 16
    sigmas: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    ensembles: list[list[float]] = field(default_factory=lambda: [[0.2, 0.5, 0.7]])
    calibrated_at: list[float] = field(default_factory=lambda: [0.1, 0.4, 0.7, 0.9])
    loss: LossConfig = field(default_factory=LossConfig)
    gold: bool = True
    noise_seed: int = 1234
    shapes_pairs: PairsConfig = field(default_factory=PairsConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        check_integer("batch_size", self.batch_size, low=1)
        check_integer("noise_seed", self.noise_seed)
        check_levels(self.sigmas, self.ensembles)
        if not set(self.calibrated_at) <= set(self.sigmas):
            raise ValueError(f"calibrated_at: got {self.calibrated_at}; each must be one of sigmas {self.sigmas}")


def check_levels(sigmas: list[float], ensembles: list[list[float]]) -> None:
    """ValueError unless there is a single level and an ensemble, none empty, every level in [0, 1]."""
    levels = [*sigmas, *(sigma for ensemble in ensembles for sigma in ensemble)]
    if not sigmas or not ensembles or not all(ensembles) or not all(0 <= sigma <= 1 for sigma in levels):
        raise ValueError(f"sigmas, ensembles: got {sigmas}, {ensembles}; expected some of each, levels in [0, 1]")
