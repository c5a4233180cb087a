"""What the base model's features tell about an image, and what they only repeat from the caption.

Renders are encoded and noised, and a linear probe (ridge regression to one-hot classes) reads shape, fill and colour of
the object at an image token from the features of one block. It is fitted and tested twice: on images with their own
captions, and on images with the captions of others. If the second accuracy is near chance, a linear map finds the
property in the block's features only where the caption tells it.

    python examples/evidence/probe_features.py                          # the base model
    python examples/evidence/probe_features.py --checkpoint half        # the base after half of its training
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.flow.noise import add_noise, timestep_of
from dinalrm_align.models.pipeline import encode_images, load_pipeline
from dinalrm_align.models.specs import resolve_model
from dinalrm_align.reward.backbones.sd3 import SD3Trunk
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.shapes.config import FILLS, Generator
from dinalrm_align.shapes.generators import open_generators, prompt_encoder
from dinalrm_align.shapes.render import Drawing, coverage, draw_nuisance, lay_out, render
from dinalrm_align.shapes.scene import COLOURS, SHAPES, draw_scenes

CLASSES = {"shape": SHAPES, "fill": ("solid", *FILLS), "colour": tuple(COLOURS)}
VISIBLE = 0.3  # share of a token's pixels that an object must cover
RIDGE = 10.0


def object_at(drawing: Drawing, side: int) -> Tensor:
    """Return the index of the object that covers each image token most, -1 for none: (side * side,)."""
    cover = torch.from_numpy(np.stack([coverage(mark) for mark in drawing.marks]))
    share, index = F.adaptive_avg_pool2d(cover, side).flatten(1).max(0)
    return torch.where(share > VISIBLE, index, -1)


@torch.no_grad()
def features(trunk: SD3Trunk, latents: Tensor, text: tuple[Tensor, Tensor], sigma: float, seed: int) -> list[Tensor]:
    """Return the image tokens (N * tokens, C) of each tapped block, of latents (N, C, h, w) noised to `sigma`."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    levels, found = torch.full((len(latents),), sigma), []
    for rows in torch.arange(len(latents)).split(64):
        noised = add_noise(latents[rows], noise[rows], levels[rows])
        found.append(trunk(noised, timestep_of(levels[rows]), *(part[rows] for part in text)).visual)
    return [torch.cat(block).flatten(0, 1).double() for block in zip(*found)]


def accuracy(train: Tensor, labels: Tensor, test: Tensor, wanted: Tensor) -> float:
    """Return the accuracy in per cent on (test, wanted) of a ridge regression fitted on (train, labels)."""
    mean, scale = train.mean(0), train.std(0)
    train, test = (F.pad((x - mean) / scale, (0, 1), value=1.0) for x in (train, test))
    gram = train.T @ train + RIDGE * torch.eye(train.shape[1], dtype=train.dtype)
    weights = torch.linalg.solve(gram, train.T @ F.one_hot(labels).double())
    return 100 * ((test @ weights).argmax(1) == wanted).double().mean().item()


def per_cent(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="shapes, or folder of a world of recipes/build_shapes.py")
    parser.add_argument("--checkpoint", help="weights of the transformer: half, outsider, a folder or a file")
    parser.add_argument("--images", type=int, default=512, help="number of images; a quarter is for testing")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    spec, reason = resolve_model(given.model)
    print(reason)
    pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
    encoder = prompt_encoder(pipeline)
    if given.checkpoint:
        pipeline = open_generators({"probed": Generator(checkpoint=given.checkpoint)}, pipeline)["probed"]
    transformer = pipeline.transformer.requires_grad_(False)
    blocks = tuple(range(1, transformer.config.num_layers))
    config = RewardConfig(num_layers=blocks[-1], visual_taps=blocks, text_taps=(), tuning="none")
    trunk = SD3Trunk(transformer, config, share_weights=True)

    rng = np.random.default_rng(given.seed)
    scenes = draw_scenes(given.images, rng)
    drawings = [lay_out(scene, draw_nuisance(rng), rng) for scene in scenes]
    latents = torch.cat([encode_images(pipeline.vae, images) for images in render(drawings).split(64)])
    side = latents.shape[-1] // transformer.config.patch_size
    seen = torch.stack([object_at(drawing, side) for drawing in drawings])
    on = (seen >= 0).flatten()
    tests = (torch.arange(given.images) >= 3 * given.images // 4).repeat_interleave(side**2)[on]
    marks = [drawing.marks[index] for drawing, row in zip(drawings, seen) for index in row[row >= 0]]
    labels = {
        name: torch.tensor([known.index(getattr(mark, name)) for mark in marks]) for name, known in CLASSES.items()
    }
    largest = {name: 100 * value[tests].bincount().max() / tests.sum() for name, value in labels.items()}
    print(f"{given.images} images, {int(tests.sum())} tokens for testing; most frequent class: {per_cent(largest)}")
    captions = [scene.caption for scene in scenes]
    for sigma in given.sigmas:
        for whose, own in {"own": captions, "another's": captions[1:] + captions[:1]}.items():
            tokens = features(trunk, latents, encoder(own), sigma, given.seed)
            for block, found in zip(blocks, (tokens[on] for tokens in tokens)):
                right = {
                    name: accuracy(found[~tests], value[~tests], found[tests], value[tests])
                    for name, value in labels.items()
                }
                print(f"sigma {sigma}, {whose} caption, block {block}: {per_cent(right)}")


if __name__ == "__main__":
    main()
