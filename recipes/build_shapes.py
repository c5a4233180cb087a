"""Build the embedded world from nothing: the small SD3 stack, its preference pairs, its latent and its pixel reward.

    python recipes/build_shapes.py                                  # hours on two cores, minutes on a GPU
    python recipes/build_shapes.py --stack.depth 12 --stack.num_heads 8 --device cuda      # a larger world

Stages run in order: vae, text, base, pairs, dinalrm (recipes/train_reward.py with train_reward_shapes.yaml), pixel. What
is finished lies in output_dir/weights and is not trained again; an interrupted stage goes on where it stopped when the
command is repeated. The result is a world folder: `python recipes/refl_sd35.py --model output_dir/weights`.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import auto_cli

from dinalrm_align.config.shapes import BuildConfig

HERE = Path(__file__).parent


def main(config: BuildConfig) -> None:
    """Train what is not trained yet; every finished part is in output_dir/weights."""
    from accelerate import Accelerator
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import CLIPModel, CLIPTextModelWithProjection, T5EncoderModel

    from dinalrm_align.data.latent_pairs import LatentPairs
    from dinalrm_align.shapes import build
    from dinalrm_align.shapes.pairs import write_concept_pairs, write_training_pairs
    from dinalrm_align.shapes.stack import build_pipeline

    root, weights = Path(config.output_dir), Path(config.output_dir) / "weights"
    accelerator = Accelerator(cpu=config.device == "cpu")
    pipeline = build_pipeline(config.stack, config.seed)
    for module in (pipeline.vae, pipeline.transformer, *_text_encoders(pipeline)):
        module.requires_grad_(False).to(accelerator.device)

    def finish(train: Callable, parts: dict[str, type]) -> None:
        """Train the named parts of the pipeline unless all are saved, save them, and go on with what is saved."""
        folders = {name: weights / "pipeline" / name for name in parts}
        if not all((folder / "config.json").exists() for folder in folders.values()):
            train(pipeline, config, accelerator)
            for name, folder in folders.items():
                _save_whole(folder, pipeline.components[name].save_pretrained)
        for name, kind in parts.items():
            saved = kind.from_pretrained(folders[name]).requires_grad_(False).eval().to(accelerator.device)
            pipeline.register_modules(**{name: saved})

    finish(build.train_vae, {"vae": AutoencoderKL})
    print("oracle before and after the autoencoder:", _rounded(build.vae_gate(pipeline.vae, config.seed)))
    clip = CLIPTextModelWithProjection
    finish(build.train_text, {"text_encoder": clip, "text_encoder_2": clip, "text_encoder_3": T5EncoderModel})
    finish(build.train_base, {"transformer": SD3Transformer2DModel})
    if not (weights / "pipeline" / "model_index.json").exists():
        pipeline.save_pretrained(weights / "pipeline")

    train_pairs, concept_pairs = root / "pairs" / "train", root / "pairs" / "concepts"
    if not (train_pairs / "index.json").exists():
        write_training_pairs(train_pairs, pipeline, config.pairs)
    if not (concept_pairs / "index.json").exists():
        write_concept_pairs(concept_pairs, pipeline, config.pairs.per_concept, config.pairs.seed)

    if not (weights / "dinalrm" / "config.json").exists():
        train_reward = [
            sys.executable, str(HERE / "train_reward.py"), "--config", str(HERE / "train_reward_shapes.yaml"),
            "--model", str(weights / "pipeline"), "--pairs", str(train_pairs), "--validation_pairs", str(concept_pairs),
            "--output_dir", str(root / "dinalrm"), "--seed", str(config.seed),
        ]  # fmt: skip
        if (root / "dinalrm" / "checkpoints").is_dir():
            train_reward += ["--resume", str(root / "dinalrm")]
        subprocess.run(train_reward, check=True)
        _save_whole(weights / "dinalrm", lambda folder: _copy_tree(root / "dinalrm" / "reward", folder))

    if not (weights / "pixel" / "config.json").exists():
        pairs = LatentPairs(train_pairs, batch_size=config.pixel.batch_size // config.pairs.pictures, seed=config.seed)
        model: CLIPModel = build.train_pixel(pipeline, pairs, config, accelerator)
        _save_whole(weights / "pixel", lambda folder: build.save_clip_reward(model, pipeline.tokenizer, folder))
    print(f"the world is whole: python recipes/refl_sd35.py --model {weights}")


def _text_encoders(pipeline) -> tuple:
    return pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3


def _save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """Save under a temporary name and rename, so that a folder of this name is whole."""
    temporary = folder.with_name(folder.name + ".unfinished")
    temporary.mkdir(parents=True, exist_ok=True)
    save(temporary)
    temporary.rename(folder)


def _copy_tree(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target, dirs_exist_ok=True)


def _rounded(numbers: dict[str, float]) -> str:
    return json.dumps({name: round(value, 3) for name, value in numbers.items()})


if __name__ == "__main__":
    main(auto_cli(BuildConfig))
