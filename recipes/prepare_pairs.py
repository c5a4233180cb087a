"""Encode preference pairs once, for training: pictures to latents in aspect-ratio buckets, each prompt to embeddings.

    python recipes/prepare_pairs.py --source HPDv3/train.json --model sd35 --output_dir hpdv3_latents
    accelerate launch --num_processes 8 recipes/prepare_pairs.py --source HPDv3/train.json --model sd35 --workers 12
    python recipes/prepare_pairs.py --source pickapic_v2/data --layout pickapic --filter.ties keep --model sd35
    python recipes/train_reward.py --model sd35 --pairs hpdv3_latents

Read are HPDv3's and HPDv2's train.json, the parquet files of Pick-a-Pic v2, and a jsonl of (prompt, chosen, rejected).
dinalrm_align/data/latent_pairs.py says what is written, dinalrm_align/data/prepare.py how. In bfloat16 a pair at 1024 x
1024 is 1 MB, a prompt of 128 T5 tokens 1.7 MB.

Stopped, or killed, the same command goes on with the first file that is not whole; finished, it looks whether all are,
and writes those again that are not (--verify true reads them through and compares their hashes).

Differences from the released data: the posterior's mean and not a sample of it, so that a picture always has the same
latents; bfloat16 and not float32; text embeddings stored; no compression; the order of pairs is not drawn here.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.data.config import PrepareRun
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.train.command import parse, refusing


def settle(argv: Sequence[str]) -> tuple[PrepareRun, ModelSpec]:
    """The settings and the model whose encoders are used."""
    run, _ = parse(PrepareRun, __doc__, argv)  # --help ends here, before anything heavy is imported
    from dinalrm_align.data.buckets import parse_buckets

    parse_buckets(run.buckets)
    spec, reason = resolve_model(run.model)
    print(reason, flush=True)
    run.text_length = run.text_length or spec.text_length
    return run, spec


def prepare(run: PrepareRun, spec: ModelSpec) -> None:
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from dinalrm_align.data.prepare import Preparation
    from dinalrm_align.data.source import Encoders
    from dinalrm_align.data.workers import worker_processes
    from dinalrm_align.train.device import available_device

    if run.device != "auto":
        available_device(run.device)
    # A process that is done waits for the slowest, which may take hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=run.device == "cpu", mixed_precision="no", kwargs_handlers=[patience])
    device = accelerator.device
    dtype = run.dtype if run.dtype != "auto" else spec.dtype if device.type == "cuda" else "float32"
    encoders = Encoders(spec.pipeline, text_length=run.text_length, device=device, dtype=getattr(torch, dtype))
    encoders.encode_prompts.max_cached = 1  # each comes once
    manifest, folder = encoders.manifest(weights=True), Path(run.output_dir)
    share = dict(rank=accelerator.process_index, world=accelerator.num_processes)

    with worker_processes(run.workers) as in_order:
        with accelerator.main_process_first():  # it begins the folder, or says why not
            work = Preparation(run, folder, manifest, in_order=in_order, **share)
        accelerator.print(f"{work.read} pairs in {work.source} ({work.layout}), {len(work.refs)} images")
        work.measure()
        accelerator.wait_for_everyone()
        work.plan()
        accelerator.print(f"{len(work.shards)} files of latents, {len(work.prompts)} of text embeddings in {folder}")

        work.encode_text(encoders.encode_prompts)
        encoders.encode_prompts.release()  # T5 and the VAE need not be in memory together
        work.encode_latents(encoders.encode_images)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            work.finish()
            print(work.summary())
            print(f"train on them: python recipes/train_reward.py --model {spec.name} --pairs {folder}")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        with refusing():
            prepare(*settle(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("\nstopped: whole files are kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
