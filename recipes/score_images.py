"""Score image files with a reward.

    python recipes/score_images.py "a small red circle on white" a.png b.png
    python recipes/score_images.py "a photo of a cat" cat.jpg --reward pickscore
    python recipes/score_images.py "a photo of a cat" *.jpg --model sd35 --reward "dinalrm + 0.2*pickscore"

The first word is the prompt. Each line of the output is a score, a tab, and the path of an image; higher is better.
For a latent reward, an image keeps its aspect ratio and is resized to the area of the images that the reward was
trained on. Image rewards read the image as it is. Scores of different rewards are not comparable.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.eval.config import ScoreRun
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.reward.names import parse_reward
from dinalrm_align.reward.needs import check_sources
from dinalrm_align.train.command import parse, refusing


def score(config: ScoreRun, spec: ModelSpec, shared: str | None) -> None:
    """Print the scores. shared: pipeline whose transformer a latent reward uses; None if there is no latent reward."""
    import torch

    from dinalrm_align.data.source import Encoders
    from dinalrm_align.eval.evaluator import Fit, image_scorer
    from dinalrm_align.eval.scores import NO_NOISE
    from dinalrm_align.models.images import open_image
    from dinalrm_align.reward.registry import load_reward
    from dinalrm_align.train.device import available_device

    prompt, *paths = config.prompt_and_images
    images = [open_image(Path(path)) for path in paths]  # a missing file is an error before weights are loaded
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = available_device(default if config.device == "auto" else config.device)
    own = spec.dtype if device.type == "cuda" else "float32"
    dtype = getattr(torch, own if config.dtype == "auto" else config.dtype)
    place = dict(device=device, dtype=None if config.dtype == "auto" else dtype)
    reward = load_reward(config.reward, spec=spec, transformer=shared, **place)
    length = next(iter(reward.text_lengths), spec.text_length)
    encoders = Encoders(spec.pipeline, text_length=length, device=device, dtype=dtype)
    scorer = image_scorer(reward, encoders, Fit("area", spec.reward_size, spec.reward_size), [NO_NOISE], seed=0)
    for path, image in zip(paths, images):
        print(f"{scorer([image], [prompt])[NO_NOISE.name][0]:.6g}\t{path}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        config, _ = parse(ScoreRun, __doc__, argv, positional="prompt_and_images")
        spec, reason = resolve_model(config.model)
        print(reason, file=sys.stderr, flush=True)
        shared = spec.pipeline if "dinalrm" in {term.name for term in parse_reward(config.reward)} else None
        check_sources(spec, {"reward": config.reward}, parts=() if shared else None)
        score(config, spec, shared)


if __name__ == "__main__":
    main()
