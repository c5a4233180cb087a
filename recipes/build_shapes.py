"""Build the embedded world, a small SD3 pipeline with its preference pairs and two rewards, from scratch.

    python recipes/build_shapes.py                                  # hours on two cores
    python recipes/build_shapes.py --stack.depth 12 --stack.num_heads 8 --device cuda      # a larger world

The recipe trains in this order:

1. the VAE, the text encoders and the transformer (`base`), whose weights half-way through training are kept (`half`);
2. a transformer of another width and seed (`outsider`), whose samples serve only as a test set;
3. a latent reward on easy pairs, of renders (`scout`), and with it two ReFL policies, `aligned` and `over_aligned`;
4. the latent reward `dinalrm`, from the scout's weights, and the image reward `pixel`, from a CLIP model of renders and
   captions, on pairs of samples of the base, of `half` and of the policies, and of renders.

It writes output_dir/weights, a folder that other recipes take as --model, and report.md, with the time and the numbers
of each stage. The models that only make images of pairs are in weights/makers. After a stop, the same command continues
with the first missing model.
"""

import contextlib
import copy
import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dinalrm_align.shapes.config import BuildConfig
from dinalrm_align.train.command import parse, refusing, run_process
from dinalrm_align.train.files import atomic_folder, make_folder, read_json, read_yaml, write_atomically

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

RECIPES = Path(__file__).parent


@refusing()
def main(argv: Sequence[str] | None = None) -> None:
    config, text = parse(BuildConfig, __doc__, argv)

    from accelerate import Accelerator

    from dinalrm_align.train.device import available_device

    available_device(config.device)
    root = Path(config.output_dir)
    begin(config, text)
    accelerator = Accelerator(cpu=config.device == "cpu")
    pipeline = train_pipeline(config, accelerator)
    train_outsider(config, pipeline, accelerator)
    with stage(root, "scout"):
        train_policies(config, pipeline)
    train_rewards(config, pipeline, accelerator)
    print((root / "report.md").read_text(encoding="utf-8"))
    print(f"finished: {shlex.join(['python', str(RECIPES / 'refl_sd35.py'), '--model', str(root / 'weights')])}")


def train_pipeline(config: BuildConfig, accelerator: "Accelerator") -> "StableDiffusion3Pipeline":
    """Train the VAE, the text encoders and the transformer, or load those that are saved."""
    import torch
    from diffusers import AutoencoderKL, ConfigMixin
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    from dinalrm_align.models.pipeline import load_pipeline
    from dinalrm_align.models.text import text_encoders
    from dinalrm_align.shapes.build import train_text, train_vae, vae_gate
    from dinalrm_align.shapes.build_base import scores_by_guidance, train_base
    from dinalrm_align.shapes.generators import load_checkpoint
    from dinalrm_align.shapes.stack import build_pipeline
    from dinalrm_align.train.checkpoints import checkpoint_near

    root, weights = Path(config.output_dir), Path(config.output_dir) / "weights"
    pipeline = build_pipeline(config.stack, config.seed).to(accelerator.device)
    for module in (pipeline.vae, pipeline.transformer, *text_encoders(pipeline)):
        module.requires_grad_(False)

    def finish(train: Callable, parts: dict[str, type]) -> None:
        """Load the pipeline components named in `parts`. If any is not saved yet, first train and save them all."""
        folders = {name: root / "parts" / name for name in parts}
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

    with stage(root, "vae") as numbers:
        finish(train_vae, {"vae": AutoencoderKL})
        numbers |= vae_gate(pipeline.vae, config.seed)
    with stage(root, "text"):
        clips = dict.fromkeys(("text_encoder", "text_encoder_2"), CLIPTextModelWithProjection)
        finish(train_text, clips | {"text_encoder_3": T5EncoderModel})
    with stage(root, "base") as numbers:
        if not (weights / "pipeline" / "model_index.json").exists():
            train_base(pipeline, config, accelerator)
            half = copy.deepcopy(pipeline.transformer)
            load_checkpoint(half, checkpoint_near(root / "base", config.base.loop.steps / 2) / "ema.safetensors")
            save_transformer(half, weights / "makers" / "half")
            pipeline.transformer.half()
            with atomic_folder(weights / "pipeline") as temporary:
                pipeline.save_pretrained(temporary)
        pipeline = load_pipeline(weights / "pipeline", dtype=torch.float32).to(accelerator.device)
        numbers |= scores_by_guidance(pipeline, config)
    return pipeline


def train_outsider(config: BuildConfig, pipeline: "StableDiffusion3Pipeline", accelerator: "Accelerator") -> None:
    """Train the transformer of the test set out of family."""
    import torch

    from dinalrm_align.models.pipeline import load_transformer
    from dinalrm_align.shapes.build_base import scores_by_guidance, train_base
    from dinalrm_align.shapes.stack import build_pipeline

    root, other = Path(config.output_dir), type(pipeline)(**pipeline.components)
    folder = root / "weights" / "makers" / "outsider"
    with stage(root, "outsider") as numbers:
        if not (folder / "config.json").exists():
            stack = dataclasses.replace(config.stack, num_heads=config.outsider_heads)
            transformer = build_pipeline(stack, config.seed + 1).transformer.requires_grad_(False)
            other.register_modules(transformer=transformer)
            train_base(other, config, accelerator, name="outsider")
            save_transformer(other.transformer, folder)
        transformer = load_transformer(folder, dtype=torch.float32).to(accelerator.device)
        other.register_modules(transformer=transformer)
        numbers |= scores_by_guidance(other, config)


def train_rewards(config: BuildConfig, pipeline: "StableDiffusion3Pipeline", accelerator: "Accelerator") -> None:
    """Make the pairs of all makers, and train and evaluate the latent reward and the image reward on them."""
    from dinalrm_align.data.latent_pairs import LatentPairs
    from dinalrm_align.reward.checkpoint import read_checkpoint, write_reward
    from dinalrm_align.shapes.build import save_clip_reward, train_clip, train_pixel
    from dinalrm_align.shapes.pairs import ensure_pairs

    root, weights = Path(config.output_dir), Path(config.output_dir) / "weights"
    with stage(root, "pairs"):
        kinds = ("train", *config.pairs.held_out_kinds)
        folders = {kind: ensure_pairs(kind, root / "pairs" / kind, pipeline, config.pairs) for kind in kinds}
    with stage(root, "dinalrm") as numbers:
        if not (weights / "dinalrm" / "config.json").exists():
            updates, scout = config.reward_updates, root / "scout" / "reward"
            reward = read_checkpoint(train_latent_reward(config, "dinalrm", folders, updates, init_from=scout))
            beside = dataclasses.replace(reward.config, base_model_id="../pipeline")
            write_reward(weights / "dinalrm", beside, reward.tensors)
        numbers |= evaluate_reward(config, "dinalrm", folders)
    with stage(root, "pixel") as numbers:
        if not (weights / "pixel" / "config.json").exists():
            lists = config.pixel.batch_size // config.pairs.images
            lists = LatentPairs(folders["train"], batch_size=lists, seed=config.seed)
            model = train_pixel(train_clip(pipeline, config, accelerator), pipeline, lists, config, accelerator)
            with atomic_folder(weights / "pixel") as temporary:
                save_clip_reward(model, pipeline.tokenizer, temporary)
        numbers |= evaluate_reward(config, "pixel", folders)


def begin(config: BuildConfig, text: str) -> None:
    """Write config.yaml. Refuses settings other than those of the models that output_dir already holds."""
    from dinalrm_align.train.identity import by_name, check_settings, settings_by_name

    path = Path(config.output_dir) / "config.yaml"
    make_folder(path.parent)
    if path.exists():
        before = settings_by_name(BuildConfig()) | by_name(BuildConfig, read_yaml(path, "settings file"))
        check_settings(before, settings_by_name(config), BuildConfig.MAY_CHANGE, str(path))
    write_atomically(path, text)


@contextlib.contextmanager
def stage(root: Path, name: str) -> Iterator[dict[str, float]]:
    """Run one stage. Its minutes, of all processes that worked on it, and the numbers that the body puts into the
    yielded dict go to report.json and report.md.
    """
    from dinalrm_align.eval.report.markdown import table

    print(f"\nstage {name}", flush=True)
    path, start, numbers = root / "report.json", time.monotonic(), {}
    try:
        yield numbers
    finally:
        report = read_json(path) if path.exists() else {}
        minutes = report.get(name, {}).get("minutes", 0.0) + (time.monotonic() - start) / 60
        report[name] = {"minutes": minutes, "numbers": numbers or report.get(name, {}).get("numbers", {})}
        write_atomically(path, json.dumps(report, indent=1))
        rows = []
        for each, found in report.items():
            words = ", ".join(f"{key} {value:.3f}" for key, value in found["numbers"].items())
            rows.append((each, f"{found['minutes']:.1f}", words))
        page = table(["stage", "minutes", "numbers"], rows, align="lrl")
        write_atomically(root / "report.md", f"# Build of the embedded world\n\n{page}\n")


def save_transformer(transformer: "SD3Transformer2DModel", folder: Path) -> None:
    """Save a transformer in float16."""
    with atomic_folder(folder) as temporary:
        transformer.half().save_pretrained(temporary)


def train_policies(config: BuildConfig, pipeline: "StableDiffusion3Pipeline") -> None:
    """Train the scout, a latent reward on pairs of renders, and two policies that maximise it. Their LoRAs are saved
    beside the other makers of pairs.
    """
    from dinalrm_align.shapes.pairs import ensure_pairs

    root = Path(config.output_dir)
    pairs = dataclasses.replace(config.pairs.easy(), groups=config.scout.groups)
    folders = {kind: ensure_pairs(kind, root / "scout_pairs" / kind, pipeline, pairs) for kind in ("train", "concepts")}
    if not (root / "scout" / "reward" / "config.json").exists():
        train_latent_reward(config, "scout", folders, config.scout.reward_updates)
    common = {"--model": root / "weights", "--reward": f"dinalrm={root / 'scout' / 'reward'}", "--seed": config.seed}
    common |= {"--device": config.device, "--evaluation.samples": 64}
    runs = {
        "aligned": {"--loop.steps": config.scout.aligned_updates},
        "over_aligned": {"--loop.steps": config.scout.over_aligned_updates, "--refl.kl_weight": 0, "--optim.lr": 1e-3},
    }
    for name, options in runs.items():
        folder = root / "weights" / "makers" / name
        if folder.exists():
            continue
        if not (root / name / "summary.json").exists():  # written last
            run_recipe("refl_sd35.py", common | options, root / name)
        with atomic_folder(folder) as temporary:
            shutil.copytree(root / name / "lora", temporary, dirs_exist_ok=True)


def train_latent_reward(
    config: BuildConfig, name: str, pairs: dict[str, Path], updates: int, *, init_from: Path | None = None
) -> Path:
    """Run recipes/train_reward.py in output_dir/name. Returns the folder of the reward."""
    root, depth = Path(config.output_dir), round(config.stack.depth * 2 / 3)
    taps = sorted({max(1, depth // 2), max(1, depth - 1), depth})
    options = {
        "--config": RECIPES / "train_reward_shapes.yaml", "--model": root / "weights" / "pipeline",
        "--pairs": pairs["train"], "--validation_pairs": pairs["concepts"], "--seed": config.seed,
        "--device": config.device, "--loop.steps": updates, "--reward.text_length": config.stack.text_length,
        "--reward.num_layers": depth, "--reward.visual_taps": taps, "--reward.text_taps": taps,
    }  # fmt: skip
    options |= {"--init_from": init_from} if init_from else {}
    run_recipe("train_reward.py", options, root / name)
    return root / name / "reward"


def evaluate_reward(config: BuildConfig, name: str, pairs: dict[str, Path]) -> dict[str, float]:
    """Run recipes/evaluate_reward.py. Returns the accuracy of a reward of the built world on each test set."""
    root = Path(config.output_dir)
    sets = json.dumps({kind: str(folder) for kind, folder in pairs.items() if kind != "train"})
    options = {"--model": root / "weights", "--reward": name, "--test_sets": sets, "--sigmas": "[0.4]", "--gold": False}
    run_recipe("evaluate_reward.py", options, root / f"evaluate_{name}", resume=False)
    found = read_json(root / f"evaluate_{name}" / "evaluation.json")
    protocols = {kind: found["sets"][kind]["protocols"] for kind in pairs if kind != "train"}
    pooled = {kind: [row["value"] for row in rows if row["protocol"] == "pooled"] for kind, rows in protocols.items()}
    return {kind: values[-1] for kind, values in pooled.items()}  # the last reading is the ensemble


def run_recipe(recipe: str, options: dict[str, object], output_dir: Path, *, resume: bool = True) -> None:
    """Run a recipe as a subprocess, or continue its run in `output_dir`."""
    from dinalrm_align.train.checkpoints import latest_checkpoint

    words = [word for pair in options.items() for word in pair] + ["--output_dir", output_dir]
    words = ["--resume", output_dir] if resume and latest_checkpoint(output_dir) else words
    if status := run_process([sys.executable, *map(str, (RECIPES / recipe, *words))]):
        raise SystemExit(status)


if __name__ == "__main__":
    main()
