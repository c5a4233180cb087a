"""How far half precision moves a latent reward: scores and their gradients against float32, per dtype and noise level.

    python -m dinalrm_align.eval.precision --output examples/results

Two ways are measured: `cast`, the backbone in that dtype (LatentReward.from_pretrained(dtype=...)), and `autocast`
around float32 weights. In both, noise is mixed in, timesteps are made and the last linear layer is computed in float32.
Text embeddings are those of float32 text encoders throughout.
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

from dinalrm_align.eval.accuracy import Level, level_name
from dinalrm_align.eval.precision_config import PrecisionRun
from dinalrm_align.eval.precision_images import Sample, heldout_images, images_of_pairs
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.train.command import parse, refuse
from dinalrm_align.train.durable import write_atomically

if TYPE_CHECKING:
    from dinalrm_align.reward.latent import LatentReward


@dataclass(frozen=True)
class Scored:
    """scores (N,) and the gradient of each at its own latent (N, C, H, W), float32 on the CPU."""

    scores: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Agreement:
    """What one dtype makes of float32's scores and gradients.

    Args:
        score_mean, score_max: mean and largest absolute error of a score, over the standard deviation of the scores.
        rank_agreement: share of all pairs of pictures that are ordered as in float32.
        gradient_cosine: of a latent's gradient with float32's, the smallest over latents.
        gradient_error: norm of the difference over float32's norm, the largest over latents. Both are NaN where no
            gradient reaches the latents, as at sigma 1.
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
"""The worst that is accepted of each dtype: about three times what was measured in the embedded world, since other
machines round in another order. float16 has three more bits of mantissa than bfloat16."""


def beyond_tolerance(found: Agreement, dtype: str) -> list[str]:
    """The numbers that are worse than `TOLERANCES[dtype]` allows, in words."""
    allowed = vars(TOLERANCES[dtype])
    at_least = ("rank_agreement", "gradient_cosine")
    return [
        f"{name} {value:.4g}, {'at least' if name in at_least else 'at most'} {allowed[name]:g} allowed"
        for name, value in vars(found).items()
        if (value < allowed[name] if name in at_least else value > allowed[name])
    ]


def score(
    reward: "LatentReward", sample: Sample, level: Level, *, batch_size: int, autocast: torch.dtype | None = None
) -> Scored:
    """Score the pictures and differentiate, by batches, with every sigma of `level` joined; under autocast if given."""
    device, scores, gradients = reward.device, [], []
    for start in range(0, len(sample.latents), batch_size):
        part = sample[start : start + batch_size]
        latents = part.latents.to(device).requires_grad_()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            found = reward.raw(
                latents,
                prompt_embeds=part.prompt_embeds,
                pooled_prompt_embeds=part.pooled_prompt_embeds,
                sigma=list(level),
                noise=part.noise,
            )
        gradients.append(torch.autograd.grad(found.sum(), latents)[0].cpu())
        scores.append(found.detach().cpu())
    return Scored(torch.cat(scores), torch.cat(gradients))


def compare(found: Scored, reference: Scored) -> Agreement:
    """What `found` makes of `reference`. ValueError unless everything is finite and the reference's scores differ."""
    for name, tensor in (*vars(found).items(), *vars(reference).items()):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values not finite")
    spread = reference.scores.std()
    if not spread > 0:
        raise ValueError("all reference scores are equal; expected pictures that differ")
    error = (found.scores - reference.scores).abs() / spread
    first, second = torch.triu_indices(len(error), len(error), offset=1)
    order, order_found = ((s[first] - s[second]).sign() for s in (reference.scores, found.scores))
    ours, theirs = found.gradients.flatten(1).double(), reference.gradients.flatten(1).double()
    reached = ours.any(dim=1) | theirs.any(dim=1)
    cosine, gradient_error = math.nan, math.nan
    if bool(reached.any()):
        ours, theirs = ours[reached], theirs[reached]
        cosine = F.cosine_similarity(ours, theirs).min().item()
        gradient_error = ((ours - theirs).norm(dim=1) / theirs.norm(dim=1)).max().item()
    return Agreement(
        score_mean=error.mean().item(),
        score_max=error.max().item(),
        rank_agreement=(order == order_found).double().mean().item(),
        gradient_cosine=cosine,
        gradient_error=gradient_error,
    )


def measure(config: PrecisionRun, spec: ModelSpec, device: str) -> list[dict[str, object]]:
    """One row per dtype, way and level: {"dtype", "way", "sigma", and the numbers of `Agreement`}."""
    from dinalrm_align.reward.latent import LatentReward

    def load(dtype: str) -> LatentReward:
        return LatentReward.from_pretrained(
            config.reward or spec.reward, transformer=spec.pipeline, device=device, dtype=dtype
        )

    exact = load("float32")
    if config.pairs is None:
        sample = heldout_images(spec, config.latents, config.seed)
    else:
        sample = images_of_pairs(config.pairs, config.latents, config.seed)
    rows = []

    def add(dtype: str, way: str, level: Level, found: Scored) -> None:
        rows.append({"dtype": dtype, "way": way, "sigma": list(level), **vars(compare(found, reference[level]))})
        print(markdown_row(rows[-1]), flush=True)

    levels, size = config.levels(), config.batch_size
    reference = {level: score(exact, sample, level, batch_size=size) for level in levels}
    for dtype in config.dtypes:
        for level in levels:
            under = getattr(torch, dtype)
            add(dtype, "autocast", level, score(exact, sample, level, batch_size=size, autocast=under))
    del exact
    for dtype in config.dtypes:
        rough = load(dtype)
        for level in levels:
            add(dtype, "cast", level, score(rough, sample, level, batch_size=size))
    return sorted(rows, key=lambda row: (config.dtypes.index(row["dtype"]), row["way"]))


def agreement_of(row: dict[str, object]) -> Agreement:
    """The numbers of a row of `measure`, or of precision.json, where null stands for NaN."""
    names = [field.name for field in dataclasses.fields(Agreement)]
    return Agreement(**{name: math.nan if row[name] is None else row[name] for name in names})


HEADER = (
    "| dtype | way | sigma | score error, mean | largest | pairs ordered alike | gradient cosine, worst | "
    "gradient error, worst |\n|---|---|---:|---:|---:|---:|---:|---:|"
)


def markdown_row(row: dict[str, object]) -> str:
    """One line of the table."""
    found = agreement_of(row)
    gradient = ["-", "-"]
    if not math.isnan(found.gradient_cosine):
        gradient = [f"{found.gradient_cosine:.6f}", f"{found.gradient_error:.4f}"]
    cells = [row["dtype"], row["way"], level_name(row["sigma"]), f"{found.score_mean:.5f}", f"{found.score_max:.5f}"]
    return "| " + " | ".join([*cells, f"{found.rank_agreement:.4f}", *gradient]) + " |"


def markdown(about: dict[str, object], rows: Sequence[dict[str, object]]) -> str:
    """precision.md: how it was measured, the table, the tolerances, and which numbers are beyond them."""
    tolerances = [
        markdown_row({"dtype": f"{dtype}, allowed", "way": "both", "sigma": [], **vars(TOLERANCES[dtype])})
        for dtype in dict.fromkeys(row["dtype"] for row in rows)
    ]
    beyond = [
        f"- {row['dtype']}, {row['way']}, sigma {level_name(row['sigma'])}: {sentence}"
        for row in rows
        for sentence in beyond_tolerance(agreement_of(row), row["dtype"])
    ]
    return "\n".join(
        [
            "# Half precision against float32",
            "",
            f"`{about['command']}`",
            "",
            f"Model {about['model']}, reward {about['reward']}; {about['latents']} pictures ({about['pictures']}), "
            f"seed {about['seed']}; {about['device']}, torch {about['torch']}.",
            "",
            "Errors of scores are in standard deviations of the scores over the pictures. A gradient is that of a "
            "score at its latent; at sigma 1 nothing is left of it. cast: the backbone in that dtype; autocast: around "
            "float32 weights. The last rows are what the tests allow.",
            "",
            HEADER,
            *map(markdown_row, rows),
            *tolerances,
            "",
            "Beyond what is allowed:" if beyond else "Every number is within what is allowed.",
            *beyond,
            "",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write precision.md and precision.json."""
    words = sys.argv[1:] if argv is None else list(argv)
    config, _ = parse(PrecisionRun, __doc__, words)
    try:
        spec, reason = resolve_model(config.model)
    except ValueError as error:
        refuse(str(error))
    print(reason)
    if config.device == "cuda" and not torch.cuda.is_available():
        refuse("device cuda: torch finds no CUDA GPU on this machine; leave --device auto, or choose cpu")
    if config.pairs is None and spec.kind != "shapes":
        refuse(f"{spec.name} has no pictures of its own: pass --pairs with a directory of latent pairs")
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):  # else float32 convolutions on a GPU are not float32
            rows = measure(config, spec, "cuda" if on_gpu else "cpu")
    except (ValueError, OSError) as error:
        refuse(str(error))
    about = {
        "command": shlex.join(["python", "-m", "dinalrm_align.eval.precision", *words]),
        "model": spec.name,
        "reward": config.reward or "the model's own",
        "latents": config.latents,
        "pictures": "renders of held-out captions" if config.pairs is None else "the first of the pairs",
        "seed": config.seed,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        "torch": torch.__version__,
    }
    report, output = markdown(about, rows), Path(config.output)
    plain = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    tolerances = {dtype: vars(allowed) for dtype, allowed in TOLERANCES.items()}
    numbers = {**about, "tolerances": tolerances, "rows": plain}
    write_atomically(output / "precision.json", json.dumps(numbers, indent=1) + "\n")
    write_atomically(output / "precision.md", report)
    print(report)


if __name__ == "__main__":
    main()
