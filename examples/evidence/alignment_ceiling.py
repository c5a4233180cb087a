"""How far training can move the base model of the embedded world, if its supervision is perfect.

    python examples/evidence/alignment_ceiling.py runs/ceiling --arm renders --lr 1e-3          minutes on two CPU cores

Each arm trains on flow matching, on batches of the same size; --updates and --images set how long and on how many:

    renders   the alignment recipes' LoRA, on correct and flawless renders of training captions
    full      all weights of the transformer, on the same renders
    best      the LoRA, on the base model's samples at its default guidance: the best of a caption's four by the oracle

If `renders` does not improve held-out samples, the LoRA or the base model is the limit. If it does and a
policy-gradient method with the oracle as its reward does not, the method or its budget is. Writes ARM_LR.json (the
oracle's score and its parts on held-out captions, at guidance 1 and at the default, with standard errors of the gains
over captions), and from all of these alignment_ceiling.md.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from tqdm import tqdm

from dinalrm_align.align.evaluation import standard_error
from dinalrm_align.align.policy import Policy
from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.flow.noise import add_noise, seeded_generator, timestep_of
from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.models.pipeline import decode_latents, encode_images
from dinalrm_align.models.specs import MODELS
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.reward.config import LoraConfig
from dinalrm_align.shapes.generators import sample_latents
from dinalrm_align.shapes.oracle import PARTS, oracle_score
from dinalrm_align.shapes.render import Nuisance, lay_out, render
from dinalrm_align.shapes.scene import draw_scenes

SPEC, CANDIDATES, SEED = MODELS["shapes"], 4, 1234
SCALES = (1.0, SPEC.guidance_scale)
SHOWN = ("gold", "faithfulness", "objects", "count", "aesthetics")


@torch.no_grad()
def evaluate(
    pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, prompts: Sequence[str]
) -> dict[str, list[list[float]]]:
    """Return the score and its parts of a sample per prompt: {part: [values at SCALES[0], values at SCALES[1]]}."""
    found = {name: [] for name in ("gold", *PARTS)}
    for scale in SCALES:
        columns = {name: [] for name in found}
        for start in range(0, len(prompts), 64):
            own = prompts[start : start + 64]
            (embeds, pooled), (empty, empty_pooled) = encoder(own), encoder.empty(len(own))
            noise = seeded_noise((16, 16, 16), [seeded_generator(SEED, start + index) for index in range(len(own))])
            latents = pipeline(
                prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
                negative_pooled_prompt_embeds=empty_pooled, height=SPEC.height, width=SPEC.width, latents=noise,
                num_inference_steps=SPEC.num_steps, guidance_scale=scale, output_type="latent",
            ).images  # fmt: skip
            images = decode_latents(pipeline.vae, latents)
            parts: dict[str, torch.Tensor] = {}
            columns["gold"] += oracle_score(images, own, parts).tolist()
            for name, values in parts.items():
                columns[name.rpartition("/")[2]] += values.tolist()
        for name, values in columns.items():
            found[name].append(values)
    return found


def training_images(
    pipeline: StableDiffusion3Pipeline, encoder: PromptEncoder, arm: str, number: int
) -> tuple[torch.Tensor, list[str]]:
    """Return latents (number, C, h, w), scaled, and captions. Captions are drawn like those of the base's training."""
    scenes = draw_scenes(number, rng := np.random.default_rng(SEED))
    captions = [scene.caption for scene in scenes]
    latents = []
    for start in tqdm(range(0, number, 64), desc="training images"):
        own = captions[start : start + 64]
        if arm == "best":
            prompts = [caption for caption in own for _ in range(CANDIDATES)]
            options = dict(steps=SPEC.num_steps, guidance=SCALES[1], seed=SEED + start)
            drawn = sample_latents(pipeline, encoder, prompts, **options)
            scores = oracle_score(decode_latents(pipeline.vae, drawn), prompts).view(-1, CANDIDATES)
            latents.append(drawn.unflatten(0, (-1, CANDIDATES))[torch.arange(len(own)), scores.argmax(1)])
        else:
            images = render([lay_out(scene, Nuisance(), rng) for scene in scenes[start : start + 64]], SPEC.height)
            latents.append(encode_images(pipeline.vae, images))
    return torch.cat(latents), captions


def report(folder: Path) -> str:
    """Return alignment_ceiling.md: a row for each arm, learning rate and number of updates in the folder."""
    rows = []
    for path in sorted(folder.glob("*_*.json")):
        found = json.loads(path.read_text())
        command = found.pop("command")
        for update, parts in found.items():
            cells = [f"{gain:+.3f} ± {error:.3f}" for _, gain, error in (parts[f"{n} at {SCALES[1]:g}"] for n in SHOWN)]
            _, low, error = parts["gold at 1"]
            cells.append(f"{low:+.3f} ± {error:.3f}")
            rows.append([command["arm"], f"{command['lr']:g}", update.split()[1], *cells])
    heads = ["arm", "lr", "updates", *(f"{name} at {SCALES[1]:g}" for name in SHOWN), "gold at 1"]
    base = " ".join(f"{name} {parts[f'{name} at {SCALES[1]:g}'][0]:.3f}," for name in SHOWN)
    return (
        f"# How far perfect supervision moves the base model of the embedded world\n\n{command['samples']} held-out "
        f"samples, gains with standard errors over captions, at guidance {SCALES[1]:g} and 1. The base model at "
        f"{SCALES[1]:g}: {base} and gold {parts['gold at 1'][0]:.3f} at 1. One seed. "
        "Arms: `examples/evidence/alignment_ceiling.py`.\n\n" + table(heads, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arm", choices=("renders", "full", "best"), default="renders")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument(
        "--updates", type=int, nargs="+", default=[50, 200, 600], help="when to evaluate; the last ends"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=4096, help="number of training images")
    parser.add_argument("--samples", type=int, default=384, help="number of held-out samples")
    options = parser.parse_args()

    torch.manual_seed(SEED)
    pipeline = StableDiffusion3Pipeline.from_pretrained(SPEC.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    transformer = pipeline.transformer
    encoder = PromptEncoder(pipeline, text_length=SPEC.text_length, device="cpu")
    latents, captions = training_images(pipeline, encoder, options.arm, options.images)
    held_out = read_prompts(SPEC.heldout_prompts)
    prompts = [held_out[index % len(held_out)] for index in range(options.samples)]
    before = evaluate(pipeline, encoder, prompts)
    if options.arm == "full":
        parameters = list(transformer.requires_grad_(True).parameters())
    else:
        parameters = list(Policy(transformer, LoraConfig(rank=16, alpha=16), seed=0).parameters.values())
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(SEED)
    shift, found = pipeline.scheduler.config.shift, {"command": vars(options) | {"folder": options.folder.name}}
    for update in tqdm(range(1, options.updates[-1] + 1), desc=f"{options.arm}, lr {options.lr:g}"):
        rows = torch.randint(len(latents), (options.batch,), generator=generator)
        embeds, pooled = encoder([captions[row] for row in rows.tolist()])
        u = torch.rand(options.batch, generator=generator)
        sigma = shift * u / (1 + (shift - 1) * u)
        noise = torch.randn(options.batch, *latents.shape[1:], generator=generator)
        velocity = transformer(
            hidden_states=add_noise(latents[rows], noise, sigma), timestep=timestep_of(sigma),
            encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False,
        )[0]  # fmt: skip
        optimizer.zero_grad()
        F.mse_loss(velocity, noise - latents[rows]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if update in options.updates:
            after = evaluate(pipeline, encoder, prompts)
            row = {}
            for name, values in after.items():
                for index, scale in enumerate(SCALES):
                    gain = np.array(values[index]) - np.array(before[name][index])
                    row[f"{name} at {scale:g}"] = [
                        float(np.mean(before[name][index])),
                        float(gain.mean()),
                        standard_error(gain, prompts),
                    ]
            found[f"update {update}"] = row
            for name in ("gold", "faithfulness", "objects", "relation", "count", "aesthetics"):
                cells = [f"{row[f'{name} at {s:g}'][0]:.3f} {row[f'{name} at {s:g}'][1]:+.3f}" for s in SCALES]
                errors = [f"s.e. {row[f'{name} at {s:g}'][2]:.3f}" for s in SCALES]
                tqdm.write(f"update {update} {name}: " + "; ".join(" ".join(each) for each in zip(cells, errors)))
            options.folder.mkdir(parents=True, exist_ok=True)
            (options.folder / f"{options.arm}_{options.lr:g}.json").write_text(json.dumps(found, indent=1))
            (options.folder / "alignment_ceiling.md").write_text(report(options.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
