"""Draw preference data in HPDv3's layout with the embedded world: images, and a train.json of pairs.

python examples/evidence/hpdv3_folder.py  # 1000 captions with 4 images each
"""

import argparse
import json
from pathlib import Path

import torch

from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.specs import MODELS
from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.shapes.pairs import render_hpdv3

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
