"""Half precision against float32: errors of a latent reward's scores and gradients, per dtype and noise level.

    python -m dinalrm_align.eval.precision --output examples/results

Two modes are compared: `cast`, the backbone in that dtype (LatentReward.from_pretrained(dtype=...)), and `autocast`
around float32 weights. In both, noising, timesteps and the last linear layer are computed in float32, and the text
encoders run in float32.
"""

import dataclasses
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.eval.precision_config import PrecisionRun
from dinalrm_align.eval.precision_images import Sample, heldout_images, images_of_pairs
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import Level, level_name
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.command import parse, refuse, refusing
from dinalrm_align.train.device import available_device
from dinalrm_align.train.durable import write_atomically

if TYPE_CHECKING:
    from dinalrm_align.reward.latent import LatentReward


@dataclass(frozen=True)
class ScoresAndGradients:
    """scores (N,), and the gradient of each with respect to its latent (N, C, H, W); float32 on the CPU."""

    scores: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Agreement:
    """Agreement of one dtype with float32.

    Args:
        score_mean, score_max: mean and largest absolute error of a score, over the standard deviation of the scores.
        rank_agreement: share of pairs of images that are ordered as in float32.
        gradient_cosine: smallest cosine over latents between the gradient and float32's.
        gradient_error: largest norm over latents of the difference, over float32's norm. Both are NaN where gradients
            are 0, as at sigma 1.
    """

    score_mean: float
    score_max: float
    rank_agreement: float
    gradient_cosine: float
    gradient_error: float


TOLERANCES: dict[str, Agreement] = {
    "bfloat16": Agreement(0.05, 0.15, 0.985, 0.995, 0.15),
    "float16": Agreement(0.006, 0.02, 0.997, 0.9999, 0.02),
}
"""About three times the values measured in the embedded world, because rounding differs between machines. float16 has
three more bits of mantissa than bfloat16."""


def beyond_tolerance(agreement: Agreement, dtype: str) -> list[str]:
    """Descriptions of the values that are worse than `TOLERANCES[dtype]`."""
    allowed = vars(TOLERANCES[dtype])
    at_least = ("rank_agreement", "gradient_cosine")
    return [
        f"{name} {value:.4g}, {'at least' if name in at_least else 'at most'} {allowed[name]:g} allowed"
        for name, value in vars(agreement).items()
        if (value < allowed[name] if name in at_least else value > allowed[name])
    ]


def score(
    reward: "LatentReward", sample: Sample, level: Level, *, batch_size: int, autocast: torch.dtype | None = None
) -> ScoresAndGradients:
    """Scores and gradients, computed in batches, with all sigmas of `level` joined. autocast: dtype of an autocast."""
    device, scores, gradients = reward.device, [], []
    for start in range(0, len(sample.latents), batch_size):
        part = sample[start : start + batch_size]
        latents = part.latents.to(device).requires_grad_()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            scored = reward.raw(
                latents,
                Conditions([""] * len(latents), part.prompt_embeds, part.pooled_prompt_embeds),
                sigma=list(level),
                noise=part.noise,
            )
        gradients.append(torch.autograd.grad(scored.sum(), latents)[0].cpu())
        scores.append(scored.detach().cpu())
    return ScoresAndGradients(torch.cat(scores), torch.cat(gradients))


def compare(found: ScoresAndGradients, reference: ScoresAndGradients) -> Agreement:
    """Agreement of `found` with `reference`. Raises ValueError for values that are not finite and for equal scores."""
    for name, tensor in (*vars(found).items(), *vars(reference).items()):
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{name}: {bad} of {tensor.numel()} values are not finite")
    spread = reference.scores.std()
    if not spread > 0:
        raise ValueError("all reference scores are equal; expected images with different scores")
    error = (found.scores - reference.scores).abs() / spread
    first, second = torch.triu_indices(len(error), len(error), offset=1)
    order, order_found = ((s[first] - s[second]).sign() for s in (reference.scores, found.scores))
    ours, theirs = found.gradients.flatten(1).double(), reference.gradients.flatten(1).double()
    nonzero = ours.any(dim=1) | theirs.any(dim=1)
    cosine, gradient_error = math.nan, math.nan
    if bool(nonzero.any()):
        ours, theirs = ours[nonzero], theirs[nonzero]
        cosine = F.cosine_similarity(ours, theirs).min().item()
        gradient_error = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max().item()
    return Agreement(
        score_mean=error.mean().item(),
        score_max=error.max().item(),
        rank_agreement=(order == order_found).double().mean().item(),
        gradient_cosine=cosine,
        gradient_error=gradient_error,
    )


def measure(config: PrecisionRun, spec: ModelSpec, device: torch.device) -> list[dict[str, object]]:
    """One row per dtype, mode and level: {"dtype", "way", "sigma", and the fields of `Agreement`}."""
    from dinalrm_align.reward.latent import LatentReward

    def load(dtype: str) -> LatentReward:
        source = config.reward or spec.reward
        return LatentReward.from_pretrained(source, transformer=spec.pipeline, device=device, dtype=dtype)

    exact, rows = load("float32"), []
    if config.pairs is None:
        sample = heldout_images(spec, config.latents, config.seed)
    else:
        sample = images_of_pairs(config.pairs, config.latents, config.seed)

    def add(dtype: str, mode: str, level: Level, found: ScoresAndGradients) -> None:
        rows.append({"dtype": dtype, "way": mode, "sigma": list(level), **vars(compare(found, reference[level]))})
        print(" ".join(cells(rows[-1])), flush=True)

    levels, size = config.levels(), config.batch_size
    reference = {level: score(exact, sample, level, batch_size=size) for level in levels}
    for dtype in config.dtypes:
        for level in levels:
            under = getattr(torch, dtype)
            add(dtype, "autocast", level, score(exact, sample, level, batch_size=size, autocast=under))
    del exact
    for dtype in config.dtypes:
        half = load(dtype)
        for level in levels:
            add(dtype, "cast", level, score(half, sample, level, batch_size=size))
    return sorted(rows, key=lambda row: (config.dtypes.index(row["dtype"]), row["way"]))


def agreement_of(row: dict[str, object]) -> Agreement:
    """`Agreement` from a row of `measure` or of precision.json, where null stands for NaN."""
    names = [field.name for field in dataclasses.fields(Agreement)]
    return Agreement(**{name: math.nan if row[name] is None else row[name] for name in names})


HEADER = (
    "dtype", "mode", "sigma", "score error, mean", "largest", "pairs ordered alike", "gradient cosine, worst",
    "gradient error, worst",
)  # fmt: skip


def cells(row: dict[str, object]) -> list[str]:
    """One row of the table."""
    found = agreement_of(row)
    gradient = ["-", "-"]
    if not math.isnan(found.gradient_cosine):
        gradient = [f"{found.gradient_cosine:.6f}", f"{found.gradient_error:.4f}"]
    scores = [f"{found.score_mean:.5f}", f"{found.score_max:.5f}", f"{found.rank_agreement:.4f}"]
    return [row["dtype"], row["way"], level_name(row["sigma"]), *scores, *gradient]


def markdown(run: dict[str, object], rows: Sequence[dict[str, object]]) -> str:
    """precision.md: the settings, the table with the tolerances, and the values beyond them."""
    tolerances = [
        {"dtype": f"{dtype}, allowed", "way": "both", "sigma": [], **vars(TOLERANCES[dtype])}
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    ]
    beyond = [
        f"- {row['dtype']}, {row['way']}, sigma {level_name(row['sigma'])}: {description}"
        for row in rows
        for description in beyond_tolerance(agreement_of(row), row["dtype"])
    ]
    verdict = "Beyond the tolerances:\n" + "\n".join(beyond) if beyond else "All values are within the tolerances."
    return (
        f"# Half precision against float32\n\n`{run['command']}`\n\nModel {run['model']}, reward {run['reward']}; "
        f"{run['latents']} images ({run['pictures']}), seed {run['seed']}; {run['device']}, torch {run['torch']}.\n\n"
        "Errors of scores are in standard deviations of the scores over the images. Gradients are those of a score "
        "with respect to its latent; at sigma 1 they are 0. cast: the backbone in that dtype; autocast: around float32 "
        "weights. The last rows are the tolerances of the tests.\n\n"
        f"{table(HEADER, map(cells, [*rows, *tolerances]), 'llrrrrrr')}\n\n{verdict}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write precision.md and precision.json."""
    words = sys.argv[1:] if argv is None else list(argv)
    config, _ = parse(PrecisionRun, __doc__, words)
    with refusing():
        spec, reason = resolve_model(config.model)
        print(reason)
        default = "cuda" if torch.cuda.is_available() else "cpu"
        device = available_device(default if config.device == "auto" else config.device)
        if config.pairs is None and spec.kind != "shapes":
            refuse(f"pairs: got none; expected a directory of latent pairs, since {spec.name} cannot render images")
        with torch.backends.cudnn.flags(allow_tf32=False):  # TF32 convolutions are less precise than float32
            rows = measure(config, spec, device)
    cpu = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    run = {
        "command": shlex.join(["python", "-m", "dinalrm_align.eval.precision", *words]),
        "model": spec.name,
        "reward": config.reward or "the model's own",
        "latents": config.latents,
        "pictures": "renders of held-out captions" if config.pairs is None else "the first of the pairs",
        "seed": config.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "torch": torch.__version__,
    }
    report, output = markdown(run, rows), Path(config.output)
    plain = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    tolerances = {dtype: vars(allowed) for dtype, allowed in TOLERANCES.items()}
    numbers = {**run, "tolerances": tolerances, "rows": plain}
    write_atomically(output / "precision.json", json.dumps(numbers, indent=1) + "\n")
    write_atomically(output / "precision.md", report)
    print(report)


if __name__ == "__main__":
    main()
