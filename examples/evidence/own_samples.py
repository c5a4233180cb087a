"""What a reward knows of the base model's own samples, on which a policy starts.

Four samples for each held-out caption, at the model's default guidance and steps, are scored by the reward and by the
oracle without noise. Two numbers:

- best of four: how far the sample that the reward ranks first goes from the mean of the four to the one that the oracle
  ranks first, in per cent of the way, over all captions;
- pairs: per cent of a caption's pairs that the reward orders as the oracle does, for pairs whose oracle scores differ
  by more than 0.25 (and for all).

A group of rewards, such as the seeds of one way of training, is one row. Intervals are 95 %, over captions and the
rewards of a group, symmetric, and may leave 0 to 100 %. A second table has every row less the first, paired by sample
and, in groups, by position; a single reward is paired with each of a group. In parentheses is the smallest effect that
the comparison finds in 80 % of repetitions. A reward that ranks at random reaches 0 % and 50 %. The row "oracle at
sigma" says what can be known from a noised latent: the oracle scores the base model's one-step estimate.

    python examples/evidence/own_samples.py                                     # dinalrm and pixel
    python examples/evidence/own_samples.py --drawn 640                         # on captions that stand in no list
    python examples/evidence/own_samples.py --model DIR --rewards dinalrm=FOLDER
    python examples/evidence/own_samples.py --group lora FOLDER FOLDER --group frozen FOLDER FOLDER
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _runs import USED, fresh_captions
from diffusers import SD3Transformer2DModel
from torch import Tensor
from tqdm.auto import tqdm

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.eval.report.intervals import bracket, seeds_by_captions
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.flow.noise import add_noise, denoised, timestep_of
from dinalrm_align.models.pipeline import decode_latents, load_pipeline
from dinalrm_align.models.specs import resolve_model
from dinalrm_align.reward.registry import load_reward
from dinalrm_align.shapes.generators import prompt_encoder, sample_latents
from dinalrm_align.shapes.oracle import oracle_score

EACH, GAP, BATCH = 4, 0.25, 64


def best_of(scores: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the gain in gold of the reward's choice, and of the best choice, over the mean of a caption's samples.

    scores, gold: (captions, samples). Returns two arrays (captions,).
    """
    chosen = np.take_along_axis(gold, scores.argmax(1)[:, None], 1)[:, 0]
    return chosen - gold.mean(1), gold.max(1) - gold.mean(1)


def ordered(scores: np.ndarray, gold: np.ndarray, gap: float) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of correctly ordered pairs and of pairs whose gold differs by more than `gap`: two (captions,).

    scores, gold: (captions, samples). Equal scores count half.
    """
    right, total = np.zeros(len(gold)), np.zeros(len(gold))
    for i, j in itertools.combinations(range(gold.shape[1]), 2):
        counts = np.abs(gold[:, i] - gold[:, j]) > gap
        agree = np.sign(scores[:, i] - scores[:, j]) * np.sign(gold[:, i] - gold[:, j])
        right, total = right + counts * (1 + agree) / 2, total + counts
    return right, total


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return values (captions,) whose mean is 100 sum(part) / sum(whole), and whose standard error is that of this
    ratio (linearised). part, whole: (captions,). NaN if there is nothing to share: no pair, or equal gold.
    """
    if not whole.any():
        return np.full(len(whole), np.nan)
    ratio = part.sum() / whole.sum()
    return 100 * (ratio + (part - ratio * whole) / whole.mean())


def measures(scores: np.ndarray, gold: np.ndarray) -> dict[str, np.ndarray]:
    """Return the numbers by name, each by caption. scores, gold: (captions, samples)."""
    far, every = (share(*ordered(scores, gold, gap)) for gap in (GAP, 0.0))
    return {f"best of {EACH}": share(*best_of(scores, gold)), f"pairs above {GAP}": far, "all pairs": every}


def report(found: dict[str, list[np.ndarray]], gold: np.ndarray) -> str:
    """Return two tables: every row's numbers, and every row less the first. found: scores (captions, samples) of the
    rewards of each row. gold: (captions, samples).
    """
    values = {name: [measures(scores, gold) for scores in rewards] for name, rewards in found.items()}
    first, *others = values
    rows = [[name, *map(cell, zip(*(one.values() for one in own)))] for name, own in values.items()]
    differences = []
    for name in others:
        size = max(len(values[name]), len(values[first]))
        own, base = (rewards * size if len(rewards) == 1 else rewards for rewards in (values[name], values[first]))
        pairs = zip(own, base, strict=True)
        gaps = [[one[number] - other[number] for number in one] for one, other in pairs]
        differences.append([f"{name} less {first}", *(cell(tables, signed=True) for tables in zip(*gaps))])
    heads = [f"{number}, %" for number in values[first][0]]
    tables = (["reward or group", *heads], rows), (["difference", *heads], differences)
    return "\n\n".join(table(*one) for one in tables if one[1])


def cell(tables: Sequence[np.ndarray], signed: bool = False) -> str:
    """Format the mean of tables (captions,) of several rewards with its interval and, if `signed`, smallest effect."""
    if np.isnan(tables).any():
        return "none"
    own, form = seeds_by_captions(np.stack(tables)), "+.1f" if signed else ".1f"
    effect = f" ({own.detectable:.1f})" if signed and own.seeds > 1 else ""
    return f"{own.mean:{form}} {bracket(own.low, own.high, form)}{effect}"


def one_step_estimate(
    transformer: SD3Transformer2DModel, latents: Tensor, text: tuple[Tensor, Tensor], sigma: float, seed: int
) -> Tensor:
    """Noise latents (B, C, h, w) to `sigma`, and return the transformer's estimate of them."""
    levels, generator = torch.full((len(latents),), sigma), torch.Generator().manual_seed(seed)
    x_sigma = add_noise(latents, torch.randn(latents.shape, generator=generator), levels)
    conditions = dict(encoder_hidden_states=text[0], pooled_projections=text[1], return_dict=False)
    return denoised(x_sigma, transformer(x_sigma, timestep=timestep_of(levels), **conditions)[0], levels)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes", help="shapes, or folder of a world of recipes/build_shapes.py")
    parser.add_argument("--rewards", nargs="+", default=[], help="a row each; without --group, dinalrm and pixel")
    parser.add_argument(
        "--group", nargs="+", action="append", default=[], metavar=("NAME", "REWARD"),
        help="a name and one or more rewards, which are one row; may be given several times",
    )  # fmt: skip
    parser.add_argument("--prompts", type=Path, help="text file of captions; by default the model's held-out captions")
    parser.add_argument("--captions", type=int, help="number of captions; by default all")
    parser.add_argument(
        "--drawn", type=int, help="draw so many held-out captions that stand in none of the world's lists"
    )
    parser.add_argument("--guidance", type=float, nargs="+", help="by default the model's")
    parser.add_argument("--noised", type=float, nargs="*", default=[0.2, 0.5], help="sigmas of the rows of the oracle")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.drawn and (given.prompts or given.captions):
        parser.error(f"--drawn: got {given.drawn} with --prompts or --captions; expected captions from one of them")
    sizes = {len(members) for _, *members in given.group} | {1}
    if 0 in sizes or len(sizes) > 2:
        parser.error(f"--group: got groups of {sorted(sizes)} rewards; expected one size for all, and single rewards")
    names = [*given.rewards, *(name for name, *_ in given.group)]
    if len({*names}) < len(names):
        parser.error(f"--rewards, --group: got {names}; expected different names")
    spec, reason = resolve_model(given.model)
    print(reason)
    pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
    encoder = prompt_encoder(pipeline)
    groups = {name: [name] for name in given.rewards or ["dinalrm", "pixel"] * (not given.group)}
    groups |= {name: members for name, *members in given.group}
    rewards = {
        name: [load_reward(member, spec=spec, pipeline=pipeline) for member in members]
        for name, members in groups.items()
    }
    if given.drawn:
        captions = fresh_captions(given.drawn, given.seed, {one for path in USED for one in read_prompts(path)})
    else:
        captions = read_prompts(given.prompts or spec.heldout_prompts)[: given.captions]
    captions = [caption for caption in captions for _ in range(EACH)]
    for guidance in given.guidance or [spec.guidance_scale]:
        gold, noised = [], [f"oracle at sigma {sigma:g}" for sigma in given.noised]
        scores = {name: [[] for _ in members] for name, members in rewards.items()} | {name: [[]] for name in noised}
        for start in tqdm(range(0, len(captions), BATCH), desc="samples", unit=f" {BATCH}"):
            own = captions[start : start + BATCH]
            seeds = [given.seed * 10**6 + index for index in range(start, start + len(own))]
            latents = sample_latents(pipeline, encoder, own, steps=spec.num_steps, guidance=guidance, seed=seeds)
            gold += oracle_score(decode_latents(pipeline.vae, latents), own).tolist()
            for name, members in rewards.items():
                for number, reward in enumerate(members):
                    scores[name][number] += reward(latents, own).tolist()
            text = encoder(own)
            for name, sigma in zip(noised, given.noised):
                estimate = one_step_estimate(pipeline.transformer, latents, text, sigma, seeds[0])
                scores[name][0] += oracle_score(decode_latents(pipeline.vae, estimate), own).tolist()
        gold = np.array(gold).reshape(-1, EACH)
        print(f"guidance {guidance:g}, {len(gold)} captions, {EACH} samples each: gold {gold.mean():.3f}, ", end="")
        print(f"best of {EACH} by the oracle {gold.max(1).mean():.3f}\n")
        found = {name: [np.array(one).reshape(-1, EACH) for one in members] for name, members in scores.items()}
        print(report(found, gold))


if __name__ == "__main__":
    main()
