"""Draw preference data in HPDv3's layout with the embedded world: images, and a train.json of pairs.

python examples/evidence/hpdv3_folder.py  # 1000 captions with 4 images each
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from dinalrm_align.models.images import to_bytes
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.specs import MODELS
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.shapes.generators import prompt_encoder
from dinalrm_align.shapes.pairs import labelled_lists
from dinalrm_align.train.files import atomically, write_atomically


def render_hpdv3(
    directory: str | Path, pipeline: StableDiffusion3Pipeline, config: PairsConfig, *, held_out: bool = False
) -> None:
    """Write preference pairs to `directory` in HPDv3's layout: train.json, and PNG files in images/.

    The pairs are those that `write_pairs` makes: of kind "heldout" if `held_out` is True, else of kind "train".
    Images have 8 bits per channel. Raises FileExistsError if `directory` holds a train.json.
    """
    directory = Path(directory)
    if (directory / "train.json").exists():
        raise FileExistsError(f"{directory} already holds a data set; write to another directory")
    records, number = [], 0
    kind = "heldout" if held_out else "train"
    for captions, _, images, pairs in labelled_lists(kind, pipeline, prompt_encoder(pipeline), config):
        names = [f"images/{number + row:06d}.png" for row in range(len(images))]
        number += len(images)
        for name, image in zip(names, to_bytes(images)):
            with atomically(directory / name) as temporary:
                Image.fromarray(image).save(temporary)
        for row, caption in enumerate(captions):
            own = names[row * config.images : (row + 1) * config.images]
            about = {"prompt": caption, "confidence": None, "choice_dist": None, "model1": "shapes"}
            for chosen, rejected, label in pairs[row]:
                votes = None if label == 1 else [round(share * config.raters, 6) for share in (label, 1 - label)]
                paths = {"path1": own[chosen], "path2": own[rejected]}
                records.append(about | {"choice_dist": votes, **paths, "model2": "shapes"})
    write_atomically(directory / "train.json", json.dumps(records, indent=0))


def main() -> None:
    folder = Path("runs/hpdv3_folder")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="?", type=int, default=1000, help="number of captions, with 4 images each")
    groups = parser.parse_args().groups
    pipeline = load_pipeline(MODELS["shapes"].pipeline, dtype=torch.float32)
    if not (folder / "train.json").exists():
        render_hpdv3(folder, pipeline, PairsConfig(groups=groups))
    pairs = json.loads((folder / "train.json").read_text())
    print(f"{len(pairs)} pairs in {folder / 'train.json'}, the first: {pairs[0]}")
    print("encode them: python recipes/prepare_pairs.py --buckets 64x64 --filter.min_pixels 0 --group prompt \\")
    print(f"    --source {folder / 'train.json'} --output_dir runs/hpdv3_latents")


if __name__ == "__main__":
    main()
