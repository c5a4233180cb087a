"""One short run of every recipe on folders of `public_folders`, as command lines: at full size, on a GPU, or tiny."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from public_folders import DINALRM, PICKSCORE, PIPELINE

PROMPTS = ("a red cube on a table", "a blue ball in the grass", "a green pyramid at night")


@dataclass(frozen=True)
class Scale:
    """How long the runs are. pixels: height and width; batch: samples of a micro-batch; num_steps: denoising steps."""

    pixels: int
    num_steps: int = 2
    batch: int = 1
    updates: int = 1
    device: str = "cpu"
    dtype: str = "bfloat16"
    pipeline: str = PIPELINE


@dataclass(frozen=True)
class Row:
    """A run of a recipe. output: folder that it writes; needs: name of the row whose output it reads."""

    name: str
    recipe: str
    arguments: tuple[str, ...]
    output: Path
    needs: str | None = None

    def samples(self, scale: Scale) -> int:
        """Return the number of samples in the largest micro-batch: a group, or the two images of a pair."""
        return scale.batch if self.recipe == "refl_sd35" else max(2, scale.batch)


def write_data(folder: Path, pixels: int) -> None:
    """Write prompts.txt, six random images and pairs.jsonl, in which every prompt has one pair."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    draws, lines = np.random.default_rng(0), []
    for number, prompt in enumerate(PROMPTS):
        files = {kind: f"{kind}{number}.png" for kind in ("chosen", "rejected")}
        for file in files.values():
            coarse = Image.fromarray(draws.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((pixels, pixels), Image.Resampling.BICUBIC).save(folder / file)
        lines.append(json.dumps({"prompt": prompt, **files}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def align_options(weights: Path, data: Path, scale: Scale, steps: str) -> list[str]:
    """Options of all alignment recipes. steps: name of the setting of the rollout's denoising steps."""
    prompts, side, size = data / "prompts.txt", f"{scale.pixels}", f"{scale.num_steps}"
    return [
        *place(weights, scale), "--gold", f"pickscore={weights / PICKSCORE}", "--prompts", f"{prompts}",
        "--eval_prompts", f"{prompts}", "--height", side, "--width", side, "--profile_every", "0",
        "--loop.steps", f"{scale.updates}", "--loop.accumulate", "1", "--evaluation.samples", "2",
        "--evaluation.batch_size", "2", "--evaluation.every", "0", "--evaluation.num_steps", size, steps, size,
        "--watch.sigmas", "[]", "--watch.drift_sigmas", "[]",
    ]  # fmt: skip


def place(weights: Path, scale: Scale) -> list[str]:
    return ["--model", f"{weights / scale.pipeline}", "--device", scale.device, "--dtype", scale.dtype]


def alignment_rows(weights: Path, data: Path, runs: Path, scale: Scale, more: Sequence[str] = ()) -> list[Row]:
    """Return the rows of the alignment recipes and of mine_pairs. more: options that all alignment recipes get."""
    latent, pixel, batch = f"dinalrm={weights / DINALRM}", f"pickscore={weights / PICKSCORE}", scale.batch
    size, group = f"{scale.pixels}", max(2, batch)
    groups = f"--{{0}}.groups 1 --{{0}}.group_size {group} --{{0}}.sample_batch {group} --{{0}}.minibatches 1"
    refl = f"--refl.batch_size {batch}"
    grpo = f"{groups.format('grpo')} --grpo.window_size 1 --grpo.window_range [0,1]"
    dpo = f"--dpo.batch_size {batch} --dpo.draws 1"
    lpo = f"--lpo.batch_size {batch} --lpo.sample_batch {batch} --lpo.candidates 2 --lpo.minibatches 1"
    chosen = [
        ("refl", "refl_sd35", latent, refl, None),
        ("refl, PickScore", "refl_sd35", pixel, refl, None),
        ("grpo", "grpo_sd35", latent, grpo, None),
        ("dpo", "dpo_sd35", latent, f"{dpo} --dpo.group_size 2 --dpo.sample_batch 2", None),
        ("dpo, offline", "dpo_sd35", latent, f"{dpo} --dpo.mode offline --pairs {runs / 'mine_pairs'}", "mine_pairs"),
        ("lpo", "lpo_sd35", latent, f"{lpo} --lpo.threshold [0,0]", None),
        ("nft", "nft_sd35", latent, f"{groups.format('nft')} --nft.levels 1", None),
    ]
    mined = [
        *place(weights, scale), "--reward", f"{weights / DINALRM}", "--prompts", f"{data / 'prompts.txt'}", "--height",
        size, "--width", size, "--mine.candidates", "2", "--mine.num_steps", f"{scale.num_steps}", "--output_dir",
        f"{runs / 'mine_pairs'}",
    ]  # fmt: skip
    rows = [Row("mine_pairs", "mine_pairs", tuple(mined), runs / "mine_pairs")]
    for name, recipe, reward, options, needs in chosen:
        output = runs / name.replace(", ", "_")
        shared = align_options(weights, data, scale, f"--{recipe.split('_')[0]}.num_steps")
        given = (*shared, "--reward", reward, *options.split(), "--output_dir", f"{output}", *more)
        rows.append(Row(name, recipe, given, output, needs))
    return rows


def reward_rows(weights: Path, data: Path, runs: Path, scale: Scale, more: Sequence[str] = ()) -> list[Row]:
    """Return the rows of the chain from image files to a trained reward, and of scoring. more: for train_reward."""
    size, side, pairs = f"{scale.pixels}x{scale.pixels}", f"{scale.pixels}", runs / "prepare_pairs"
    released = json.loads((weights / DINALRM / "config.json").read_text())["model"]
    reward = [
        "--reward.num_layers", f"{released['num_transformer_layers']}", "--reward.visual_taps",
        f"{released['visual_head_idx']}", "--reward.text_taps", f"{released['text_head_idx']}", "--accuracy.sigmas",
        "[0.4]", "--accuracy.ensemble", "[]", "--accuracy.every", "0",
    ]  # fmt: skip
    images = [f"{data / f'chosen{number}.png'}" for number in range(2)]
    arguments = {
        "prepare_pairs": [
            "--source", f"{data / 'pairs.jsonl'}", "--buckets", size, "--filter.min_pixels", "0", "--workers", "0",
            "--output_dir", f"{pairs}", *place(weights, scale),
        ],
        "train_reward": [
            "--pairs", f"{pairs}", "--batch_size", f"{scale.batch}", "--held_out_prompts", "1", "--loop.steps",
            f"{scale.updates}", *reward, *place(weights, scale), "--output_dir",
            f"{runs / 'train_reward'}", *more,
        ],
        "evaluate_reward": [
            "--reward", f"dinalrm={weights / DINALRM}", "--test_sets", f"{{mine: {data / 'pairs.jsonl'}}}", "--size",
            side, "--sigmas", "[0.4]", "--ensembles", "[[0.4,0.7]]", "--calibrated_at", "[0.4]", "--gold", "false",
            "--output_dir", f"{runs / 'evaluate_reward'}", *place(weights, scale),
        ],
        "score_images": [
            PROMPTS[0], *images, "--reward", f"pickscore={weights / PICKSCORE}", *place(weights, scale)[:4],
        ],
    }  # fmt: skip
    needs = {"train_reward": "prepare_pairs"}
    return [Row(name, name, tuple(given), runs / name, needs.get(name)) for name, given in arguments.items()]
