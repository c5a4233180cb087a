"""Half precision against float32: errors of a latent reward's scores and gradients, per dtype and noise level.

python examples/evidence/measure_precision.py [OUTPUT [IMAGES [MODEL [PAIRS]]]]

Writes precision.md and precision.json to OUTPUT. Scores IMAGES images by the reward of MODEL: the first of PAIRS, a
directory of latent pairs, or, for the embedded world only, renders of held-out captions.

Two modes are compared: `cast`, the backbone in that dtype (LatentReward.from_pretrained(dtype=...)), and `autocast`
around float32 weights. In both, noising, timesteps and the last linear layer are computed in float32, and the text
encoders run in float32.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align import LatentReward
from dinalrm_align.data.latent_pairs import LatentPairs
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import Level, level_name
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.pipeline import encode_images, load_vae
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.shapes.render import draw_nuisance, lay_out, render
from dinalrm_align.shapes.scene import draw_scenes
from dinalrm_align.train.files import write_atomically

DTYPES = ("bfloat16", "float16")
LEVELS: list[Level] = [(0.0,), (1e-6,), (0.05,), (0.4,), (0.7,), (1.0,), (0.2, 0.5, 0.7)]
BATCH, SEED = 32, 0


@dataclass(frozen=True)
class Sample:
    """N images: latents and noise (N, C, H, W), prompt_embeds (N, L, D), pooled_prompt_embeds (N, P)."""

    latents: Tensor
    noise: Tensor
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor

    def __getitem__(self, part: slice) -> "Sample":
        return Sample(**{name: tensor[part] for name, tensor in vars(self).items()})


def heldout_images(spec: ModelSpec, count: int, seed: int) -> Sample:
    """Renders of `count` held-out captions of the embedded world, encoded by its own networks in float32."""
    rng = np.random.default_rng(seed)
    scenes = draw_scenes(count, rng, held_out=True)
    images = render([lay_out(scene, draw_nuisance(rng), rng) for scene in scenes], spec.height)
    latents = encode_images(load_vae(spec.pipeline, device="cpu"), images)
    encoder = PromptEncoder(spec.pipeline, text_length=spec.text_length)
    return Sample(latents, _noise(latents, seed), *encoder([scene.caption for scene in scenes]))


def images_of_pairs(directory: str, count: int, seed: int) -> Sample:
    """The first images of a directory of latent pairs. Raises ValueError when they are fewer or of several sizes."""
    batches, parts = LatentPairs(directory, batch_size=32).in_order(), []
    for index in range(len(batches)):
        parts.append(batches[index])
        if sum(len(part.latents) for part in parts) >= count:
            break
    sizes = {tuple(part.latents.shape[1:]) for part in parts}
    available = sum(len(part.latents) for part in parts)
    if len(sizes) > 1 or available < count:
        raise ValueError(f"{directory}: got {available} images of sizes {sorted(sizes)}; expected {count} of one size")
    columns = {"latents": [part.latents for part in parts]}
    columns |= {
        name: [vars(part.conditions)[name] for part in parts] for name in ("prompt_embeds", "pooled_prompt_embeds")
    }
    joined = {name: torch.cat(tensors)[:count].float() for name, tensors in columns.items()}
    return Sample(noise=_noise(joined["latents"], seed), **joined)


def _noise(latents: Tensor, seed: int) -> Tensor:
    return torch.randn(latents.shape, generator=seeded_generator(seed))


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
    reward: LatentReward, sample: Sample, level: Level, autocast: torch.dtype | None = None
) -> ScoresAndGradients:
    """Scores and gradients, computed in batches, with all sigmas of `level` joined. autocast: dtype of an autocast."""
    device, scores, gradients = reward.device, [], []
    for start in range(0, len(sample.latents), BATCH):
        part = sample[start : start + BATCH]
        latents = part.latents.to(device).requires_grad_()
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            embeds = (part.prompt_embeds.to(device), part.pooled_prompt_embeds.to(device))
            # the model itself: a LatentReward disables autocast
            scored = reward.model(latents, *embeds, sigma=list(level), noise=part.noise.to(device))
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


def agreement_of(row: dict[str, object]) -> Agreement:
    """`Agreement` from a row of `measure` or of precision.json, where null stands for NaN."""
    names = [field.name for field in fields(Agreement)]
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
        f"{run['latents']} images ({run['source']}), seed {run['seed']}; {run['device']}, torch {run['torch']}.\n\n"
        "Errors of scores are in standard deviations of the scores over the images. Gradients are those of a score "
        "with respect to its latent; at sigma 1 they are 0. cast: the backbone in that dtype; autocast: around float32 "
        "weights. The last rows are the tolerances of the tests.\n\n"
        f"{table(HEADER, map(cells, [*rows, *tolerances]), 'llrrrrrr')}\n\n{verdict}\n"
    )


def measure(spec: ModelSpec, sample: Sample, device: str) -> list[dict[str, object]]:
    """One row per dtype, mode and level: {"dtype", "way", "sigma", and the fields of `Agreement`}."""

    def load(dtype: str) -> LatentReward:
        return LatentReward.from_pretrained(spec.reward, transformer=spec.pipeline, device=device, dtype=dtype)

    rows, exact = [], load("float32")
    reference = {level: score(exact, sample, level) for level in LEVELS}
    for dtype in DTYPES:
        half = load(dtype)
        for mode, reward, autocast in (("autocast", exact, getattr(torch, dtype)), ("cast", half, None)):
            for level in LEVELS:
                agreement = compare(score(reward, sample, level, autocast), reference[level])
                rows.append({"dtype": dtype, "way": mode, "sigma": list(level), **vars(agreement)})
                print(" ".join(cells(rows[-1])), flush=True)
    return rows


def main(output: str, images: int, model: str, pairs: str | None) -> None:
    """Measure, and write precision.md and precision.json."""
    spec, reason = resolve_model(model)
    print(reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample = heldout_images(spec, images, SEED) if pairs is None else images_of_pairs(pairs, images, SEED)
    with torch.backends.cudnn.flags(allow_tf32=False):  # TF32 convolutions are less precise than float32
        rows = measure(spec, sample, device)
    run = {
        "command": shlex.join(["python", "examples/evidence/measure_precision.py", *sys.argv[1:]]),
        "model": spec.name,
        "reward": "the model's own",
        "latents": images,
        "source": "renders of held-out captions" if pairs is None else "the first of the pairs",
        "seed": SEED,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU ({torch.backends.cpu.get_cpu_capability()})",
        "torch": torch.__version__,
    }
    report = markdown(run, rows)
    plain = [{name: None if value != value else value for name, value in row.items()} for row in rows]
    tolerances = {dtype: vars(allowed) for dtype, allowed in TOLERANCES.items()}
    numbers = {**run, "tolerances": tolerances, "rows": plain}
    write_atomically(Path(output) / "precision.json", json.dumps(numbers, indent=1) + "\n")
    write_atomically(Path(output) / "precision.md", report)
    print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="runs/precision", help="folder to write (runs/precision)")
    parser.add_argument("images", nargs="?", type=int, default=128, help="number of images (128)")
    parser.add_argument("model", nargs="?", default="shapes", help="shapes (default), sd35 or the folder of a pipeline")
    parser.add_argument("pairs", nargs="?", help="directory of latent pairs")
    main(**vars(parser.parse_args()))
