"""Image rewards in bfloat16 and in TF32 against float32: errors of scores, and of gradients with respect to latents.

python examples/evidence/measure_judges.py [OUTPUT [IMAGES [CLIP_H_IMAGES]]]

Writes judges.md to OUTPUT. The embedded world's reward `pixel` scores IMAGES renders of held-out captions, encoded to
latents. A CLIP ViT-H/14 with random weights scores CLIP_H_IMAGES of them (4 GB, minutes; 0: not at all).

TF32 is emulated on the CPU: `Tf32` rounds the inputs of matrix products and convolutions, in the forward and the
backward pass, to 10 bits of mantissa. Attention is computed as matrix products, so that they are rounded too.
"""

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure_precision import SEED, Agreement, ScoresAndGradients, compare
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import CLIPConfig, CLIPModel

from dinalrm_align.align.savings.config import FULL
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.models.pipeline import encode_images, load_vae
from dinalrm_align.models.preprocess import normalise, resize
from dinalrm_align.models.specs import MODELS
from dinalrm_align.reward.registry import load_reward
from dinalrm_align.shapes.render import draw_nuisance, lay_out, render
from dinalrm_align.shapes.scene import draw_scenes
from dinalrm_align.train.files import write_atomically

BATCH = 16
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)
PRODUCTS = tuple(getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm"))
HEADER = ("arithmetic", "score error, mean", "largest", "pairs ordered alike", "gradient cosine, worst", "error, worst")


def round_to_tf32(values: Tensor) -> Tensor:
    """Round float32 values to 10 bits of mantissa, halves to even."""
    bits = values.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Context in which `operators` read float32 inputs rounded to TF32, biases excepted. rounded: calls so far."""

    def __init__(self, operators: Sequence[Any]) -> None:
        super().__init__()
        self.operators, self.rounded = operators, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.operators:
            self.rounded += 1
            args = tree_map(lambda x: round_to_tf32(x) if _is_matrix(x) else x, args)
        return function(*args, **(kwargs or {}))


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() > 1


@contextmanager
def tf32(*operators: Any) -> Iterator[Tf32]:
    with sdpa_kernel(SDPBackend.MATH), Tf32(operators) as mode:
        yield mode


def heldout(count: int) -> tuple[Tensor, list[str]]:
    """Renders (count, 3, H, W) of held-out captions, and the captions."""
    rng = np.random.default_rng(SEED)
    scenes = draw_scenes(count, rng, held_out=True)
    images = render([lay_out(scene, draw_nuisance(rng), rng) for scene in scenes], MODELS["shapes"].height)
    return images, [scene.caption for scene in scenes]


def score(reward: Callable[..., Tensor], latents: Tensor, captions: Sequence[str]) -> ScoresAndGradients:
    scores, gradients = [], []
    for start in range(0, len(latents), BATCH):
        part = latents[start : start + BATCH].clone().requires_grad_()
        scored = reward(part, captions[start : start + BATCH])
        gradients.append(torch.autograd.grad(scored.sum(), part)[0])
        scores.append(scored.detach())
    return ScoresAndGradients(torch.cat(scores), torch.cat(gradients))


def measure_pixel(count: int) -> list[list[str]]:
    """Rows of the table for the embedded world's image reward."""
    spec, (images, captions) = MODELS["shapes"], heldout(count)
    vae = load_vae(spec.pipeline, device="cpu")
    latents, half_vae = encode_images(vae, images), copy.deepcopy(vae).to(torch.bfloat16)

    def found(dtype: str, vae: Any, context: Any = None) -> ScoresAndGradients:
        with context or nullcontext():
            return score(load_reward("pixel", spec=spec, vae=vae, dtype=dtype), latents, captions)

    exact = found("float32", vae)
    rows = {
        "`memory.judge_dtype bfloat16`": found("bfloat16", vae),
        "`memory.vae_dtype bfloat16`": found("float32", half_vae),
        "both": found("bfloat16", half_vae),
        "TF32 in convolutions: torch's default on CUDA": found("float32", vae, tf32(*CONVOLUTIONS)),
        "TF32 in all products: `memory.allow_tf32`": found("float32", vae, tf32(*CONVOLUTIONS, *PRODUCTS)),
    }
    return [cells(name, compare(each, exact)) for name, each in rows.items()]


def cells(name: str, found: Agreement) -> list[str]:
    numbers = (found.score_mean, found.score_max, found.rank_agreement, found.gradient_cosine, found.gradient_error)
    return [name, *(f"{number:.6f}" if index == 3 else f"{number:.5f}" for index, number in enumerate(numbers))]


@torch.no_grad()
def measure_clip_h(count: int) -> tuple[str, list[list[str]]]:
    """The standard deviation of the scores, and rows (arithmetic, mean and largest error, pairs); units of 100 cos."""
    images, _ = heldout(count)
    pixels = normalise(resize(images, (224, 224)))
    ids = torch.randint(1000, 40000, (1, 16), generator=torch.Generator().manual_seed(SEED))
    torch.manual_seed(SEED)
    clip = CLIPModel(CLIPConfig(**FULL.clip)).eval()

    def scores() -> Tensor:
        print(f"CLIP-H in {clip.dtype}: {count} images", flush=True)
        ours = clip.get_image_features(pixel_values=pixels.to(clip.dtype)).pooler_output.float()
        text = clip.get_text_features(input_ids=ids).pooler_output.float()
        return 100 * torch.cosine_similarity(ours, text)

    exact, found = scores(), {}
    with tf32(*CONVOLUTIONS, *PRODUCTS):
        found["TF32 in all products"] = scores()
    clip.to(torch.bfloat16)
    found["bfloat16"] = scores()
    first, second = torch.triu_indices(count, count, offset=1)
    rows = []
    for name, each in found.items():
        error = (each - exact).abs()
        alike = ((each[first] - each[second]).sign() == (exact[first] - exact[second]).sign()).sum().item()
        rows.append([name, f"{error.mean():.5f}", f"{error.max():.5f}", f"{alike} of {len(first)}"])
    return f"{exact.std():.4f}", rows


def main(output: str, images: int, clip_h_images: int) -> None:
    command = shlex.join(["python", "examples/evidence/measure_judges.py", *sys.argv[1:]])
    pixel = table(HEADER, measure_pixel(images), "lrrrrr")
    print(pixel, flush=True)
    report = (
        f"# Image rewards in bfloat16 and in TF32 against float32\n\n`{command}`\n\n"
        f"The embedded world's reward `pixel` on latents of {images} renders of held-out captions, seed {SEED}; "
        f"CPU, torch {torch.__version__}. Errors of scores are in standard deviations of the scores over the images; "
        "gradients are those of a score with respect to its latent, through the VAE. TF32 is emulated, not measured "
        f"on a GPU.\n\n{pixel}\n"
    )
    write_atomically(Path(output) / "judges.md", report)
    if clip_h_images:
        spread, rows = measure_clip_h(clip_h_images)
        header = ("arithmetic", "score error, mean", "largest", "pairs ordered alike")
        report += (
            f"\nCLIP ViT-H/14 (PickScore's network, 0.986 billion parameters) with random weights on {clip_h_images} "
            f"of these images and one text. Errors are in units of 100 cos; the standard deviation over the images is "
            f"{spread}. Random weights and so few images show the size of the errors only, and not what PickScore "
            f"loses.\n\n{table(header, rows, 'lrrr')}\n"
        )
    write_atomically(Path(output) / "judges.md", report)
    print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="runs/judges", help="folder to write (runs/judges)")
    parser.add_argument("images", nargs="?", type=int, default=128, help="number of images (128)")
    parser.add_argument("clip_h_images", nargs="?", type=int, default=4, help="images for CLIP-H (4)")
    main(**vars(parser.parse_args()))
