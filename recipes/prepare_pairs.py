"""Encode preference pairs for training: images as latents in aspect-ratio buckets, prompts as text embeddings.

    python recipes/prepare_pairs.py --source HPDv3/train.json --model sd35 --output_dir hpdv3_latents
    accelerate launch --num_processes 8 recipes/prepare_pairs.py --source HPDv3/train.json --model sd35 --workers 12
    python recipes/prepare_pairs.py --source pickapic_v2/data --layout pickapic --filter.ties keep --model sd35
    python recipes/train_reward.py --model sd35 --pairs hpdv3_latents

--source can be train.json of HPDv3 or HPDv2, ranked lists as in ImageReward, parquet files of Pick-a-Pic v2, a jsonl
file of (prompt, chosen, rejected), or DiNa-LRM's released latents (dinalrm_align/data/formats describes them).
dinalrm_align/data/latent_pairs.py describes the output. In bfloat16, a pair at 1024 x 1024 takes 1 MB. A prompt of 128
T5 tokens takes 1.7 MB. After a stop, the same command resumes and rewrites missing or damaged files (--verify true also
compares hashes).

Unlike the released latents, the output latents are the mean of the VAE's posterior and not a sample, so that an image
always has the same latents. They are in bfloat16, not compressed and not shuffled, and text embeddings are stored.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.resolve import parse_for_model
from dinalrm_align.data.config import PrepareRun
from dinalrm_align.models.layout import TEXT_PARTS
from dinalrm_align.models.specs import ModelSpec, check_sides
from dinalrm_align.reward.needs import check_sources
from dinalrm_align.train.command import refusing


def settings_and_model(argv: Sequence[str] | None) -> tuple[PrepareRun, ModelSpec]:
    """Return the checked settings, and the model whose VAE and text encoders encode the pairs."""
    run, spec, reason = parse_for_model(PrepareRun, __doc__, Path(__file__), argv)
    from dinalrm_align.data.plan import parse_buckets

    buckets = parse_buckets(run.buckets)
    if run.buckets != "published":  # these are checked once the layout is known: released latents keep their size
        check_buckets(spec, buckets)
    print(reason, flush=True)
    run.text_length = run.text_length or spec.text_length
    return run, spec


def check_buckets(spec: ModelSpec, buckets: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError if the model takes no images of one of the sizes (height, width)."""
    for height, width in buckets:
        where = f"buckets, {height}x{width}"
        check_sides(spec, **{f"{where}: height": height, f"{where}: width": width})


def encode_pairs(run: PrepareRun, spec: ModelSpec) -> None:
    import torch

    from dinalrm_align.data.plan import parse_buckets
    from dinalrm_align.data.prepare import Preparation
    from dinalrm_align.data.source import Encoders
    from dinalrm_align.data.workers import worker_processes
    from dinalrm_align.train.device import start_accelerator

    accelerator, dtype = start_accelerator(run, spec.dtype, minutes=7 * 24 * 60)  # ranks wait for the slowest
    options = dict(text_length=run.text_length, device=accelerator.device, dtype=getattr(torch, dtype))
    encoders = Encoders(spec.pipeline, **options)
    encoders.encode_prompts.max_cached = 1  # each is encoded once
    manifest, folder = encoders.manifest(weights=True), Path(run.output_dir)
    share = dict(rank=accelerator.process_index, world=accelerator.num_processes)

    with worker_processes(run.workers) as in_order:
        with accelerator.main_process_first():  # it creates the folder, or raises
            work = Preparation(run, folder, manifest, in_order=in_order, **share)
        accelerator.print(f"{work.read} pairs in {work.source} ({work.layout}), {len(work.refs)} images")
        if work.layout != "released":
            check_buckets(spec, parse_buckets(run.buckets))
        work.measure()
        accelerator.wait_for_everyone()
        work.plan(encoders.latent_space)
        accelerator.print(f"{len(work.shards)} files of latents, {len(work.prompts)} of text embeddings in {folder}")

        work.encode_text(encoders.encode_prompts)
        encoders.encode_prompts.release()  # T5 and the VAE are not needed at once
        work.encode_latents(encoders.encode_images)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            work.finish()
            print(work.dropped)
            recipe = str(Path(__file__).with_name("train_reward.py"))
            command = ["python", recipe, "--model", spec.name, "--pairs", str(folder)]
            print(f"train on them: {shlex.join(command)}")


def main(argv: Sequence[str] | None = None) -> None:
    with refusing(stopped="complete files are kept, and the same command resumes from there"):
        run, spec = settings_and_model(argv)
        check_sources(spec, {}, parts=("vae", *TEXT_PARTS))
        encode_pairs(run, spec)


if __name__ == "__main__":
    main()
