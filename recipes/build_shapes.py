"""Build the embedded world, a small SD3 pipeline with its preference pairs and two rewards, from scratch.

    python recipes/build_shapes.py                                  # hours on two cores, minutes on a GPU
    python recipes/build_shapes.py --stack.depth 12 --stack.num_heads 8 --device cuda      # a larger world

The recipe trains in this order: the VAE, the text encoders, the transformer, the latent reward `dinalrm` on pairs
(recipes/train_reward.py with train_reward_shapes.yaml), and the image reward `pixel`. It writes output_dir/weights, a
folder that other recipes take as --model. After a stop, the same command continues with the first missing model.
"""

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dinalrm_align.shapes.config import BuildConfig
from dinalrm_align.train.command import parse, refusing
from dinalrm_align.train.files import atomic_folder, make_folder, read_yaml, write_atomically


@refusing()
def main(argv: Sequence[str] | None = None) -> None:
    config, text = parse(BuildConfig, __doc__, argv)

    from accelerate import Accelerator
    from diffusers import AutoencoderKL, ConfigMixin, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    from dinalrm_align.data.latent_pairs import LatentPairs
    from dinalrm_align.models.text import text_encoders
    from dinalrm_align.reward.checkpoint import read_checkpoint, write_reward
    from dinalrm_align.shapes.build import save_clip_reward, train_pixel, train_text, train_vae, vae_gate
    from dinalrm_align.shapes.build_base import train_base
    from dinalrm_align.shapes.pairs import ensure_pairs
    from dinalrm_align.shapes.stack import build_pipeline
    from dinalrm_align.train.device import available_device
    from dinalrm_align.train.identity import by_name, check_settings, may_change, settings_by_name

    available_device(config.device)
    root, weights = Path(config.output_dir), Path(config.output_dir) / "weights"
    make_folder(root)
    if (root / "config.yaml").exists():  # finished parts were made with these settings
        stored = read_yaml(root / "config.yaml", "settings file")
        before = settings_by_name(BuildConfig()) | by_name(BuildConfig, stored)
        check_settings(before, settings_by_name(config), may_change(BuildConfig), str(root / "config.yaml"))
    write_atomically(root / "config.yaml", text)
    accelerator = Accelerator(cpu=config.device == "cpu")
    pipeline = build_pipeline(config.stack, config.seed, config.pairs.scenes)
    for module in (pipeline.vae, pipeline.transformer, *text_encoders(pipeline)):
        module.requires_grad_(False).to(accelerator.device)

    def finish(train: Callable, parts: dict[str, type]) -> None:
        """Load the pipeline components named in `parts`. If any is not saved yet, first train and save them all."""
        folders = {name: weights / "pipeline" / name for name in parts}
        if not all((folder / "config.json").exists() for folder in folders.values()):
            train(pipeline, config, accelerator)
            for name, folder in folders.items():
                with atomic_folder(folder) as temporary:
                    pipeline.components[name].save_pretrained(temporary)
        for name, kind in parts.items():
            saved = kind.from_pretrained(folders[name]).requires_grad_(False).eval().to(accelerator.device)
            if isinstance(saved, ConfigMixin):
                saved.register_to_config(_name_or_path="")  # do not save the local path
            pipeline.register_modules(**{name: saved})

    finish(train_vae, {"vae": AutoencoderKL})
    gate = vae_gate(pipeline.vae, config.seed, scenes=config.pairs.scenes)
    print("oracle before and after the autoencoder:", {name: round(value, 3) for name, value in gate.items()})
    clips = dict.fromkeys(("text_encoder", "text_encoder_2"), CLIPTextModelWithProjection)
    finish(train_text, clips | {"text_encoder_3": T5EncoderModel})
    finish(train_base, {"transformer": SD3Transformer2DModel})
    if not (weights / "pipeline" / "model_index.json").exists():
        with atomic_folder(weights / "pipeline") as temporary:
            pipeline.save_pretrained(temporary)
    pairs = {kind: ensure_pairs(kind, root / "pairs" / kind, pipeline, config.pairs) for kind in ("train", "concepts")}
    if not (weights / "dinalrm" / "config.json").exists():
        train_latent_reward(config, weights / "pipeline", pairs)
        reward = read_checkpoint(root / "dinalrm" / "reward")
        moved = dataclasses.replace(reward.config, base_model_id="../pipeline")
        write_reward(weights / "dinalrm", moved, reward.tensors)
    if not (weights / "pixel" / "config.json").exists():
        lists = config.pixel.batch_size // config.pairs.images
        train_pairs = LatentPairs(pairs["train"], batch_size=lists, seed=config.seed)
        model = train_pixel(pipeline, train_pairs, config, accelerator)
        with atomic_folder(weights / "pixel") as temporary:
            save_clip_reward(model, pipeline.tokenizer, temporary)
    recipe = Path(__file__).with_name("refl_sd35.py")
    print(f"finished: {shlex.join(['python', str(recipe), '--model', str(weights)])}")


def train_latent_reward(config: BuildConfig, pipeline: Path, pairs: dict[str, Path]) -> None:
    """Run recipes/train_reward.py as a subprocess, in output_dir/dinalrm. On Ctrl-C, wait until it has exited."""
    from dinalrm_align.train.checkpoints import latest_checkpoint

    run, recipe = Path(config.output_dir) / "dinalrm", Path(__file__).with_name("train_reward.py")
    depth = round(config.stack.depth * 2 / 3)
    taps = sorted({max(1, depth // 2), max(1, depth - 1), depth})
    arguments = [
        "--config", recipe.with_name("train_reward_shapes.yaml"), "--model", pipeline, "--pairs", pairs["train"],
        "--validation_pairs", pairs["concepts"], "--output_dir", run, "--seed", config.seed, "--device", config.device,
        "--reward.text_length", config.stack.text_length, "--reward.num_layers", depth, "--reward.visual_taps", taps,
        "--reward.text_taps", taps,
    ]  # fmt: skip
    arguments = ["--resume", run] if latest_checkpoint(run) else arguments
    process = subprocess.Popen([sys.executable, *map(str, (recipe, *arguments))])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        status = process.wait()
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
