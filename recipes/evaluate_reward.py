"""How good is a finished reward? Pairwise accuracy, ways of reading it, and calibration, on held-out pairs.

    python recipes/evaluate_reward.py                                               # the embedded world's own reward
    python recipes/evaluate_reward.py --reward runs/train_reward_shapes_seed0/reward
    python recipes/evaluate_reward.py --model sd35 --judged '{hpdv3: DIR}' --reward liuhuohuo/DiNa-LRM-SD35M-12layers

Accuracy: how often the picture a rater preferred scores strictly higher. Calibration: whether the probabilities that
the reward's likelihood (--loss.likelihood, as it was trained) gives to preferences are the observed frequencies.
Intervals are over captions: one reward says nothing of other seeds (recipes/ablate_reward.py trains several).
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.config.command import parse, refuse, refusing
from dinalrm_align.config.evaluate import EvaluateRun
from dinalrm_align.models import resolve_model


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    config, _ = parse(EvaluateRun, __doc__, words)
    with refusing():
        spec, reason = resolve_model(config.model)
    if spec.kind != "shapes" and not config.judged:
        refuse(f"{spec.name} has no pairs of its own: pass --judged '{{name: DIR}}'")
    print(reason, flush=True)

    import torch

    from dinalrm_align.backbones.sd3 import load_transformer
    from dinalrm_align.benchmarks import evaluation_report as report
    from dinalrm_align.benchmarks.inference import common_readings, ensemble_readings
    from dinalrm_align.benchmarks.judging import Judge
    from dinalrm_align.checkpoint import fetch, read_checkpoint
    from dinalrm_align.data.source import Encoders
    from dinalrm_align.device import available_device
    from dinalrm_align.encode import decode_latents, load_pipeline, load_vae
    from dinalrm_align.models import load_gold
    from dinalrm_align.shapes.pairs import JUDGED, ensure_pairs

    with refusing():
        found = "cuda" if torch.cuda.is_available() else "cpu"
        device = available_device(found if config.device == "auto" else config.device)
        source = config.reward or spec.reward
        about = read_checkpoint(fetch(source)).config
        out = Path(config.output_dir)
        if config.judged is None:
            pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
            config.judged = {
                kind: str(ensure_pairs(kind, out / "pairs" / kind, pipeline, config.shapes_pairs)) for kind in JUDGED
            }
        dtype = getattr(torch, spec.dtype) if device.type == "cuda" else torch.float32
        judge = Judge(
            config.judged,
            load_transformer(spec.pipeline, dtype=dtype).to(device).requires_grad_(False),
            Encoders(spec.pipeline, text_length=about.text_length, device=device, dtype=dtype),
            (spec.height, spec.width),
            config.batch_size,
            config.noise_seed,
        )
        readings = [*common_readings(config.sigmas, config.ensembles[0]), *ensemble_readings(config.ensembles)]
        agreed = {}
        if config.gold:
            vae = load_vae(spec.pipeline, device=device)
            agreed = judge.gold(
                load_gold(spec, device=device),
                lambda latents: torch.cat([decode_latents(vae, part) for part in latents.split(4)]),
                about,
            )
        scores = judge(source, {name: readings for name in config.judged}, out, title="reward")
    report.write(
        scores, agreed, config, command=shlex.join(["python", "recipes/evaluate_reward.py", *words]), directory=out
    )
    print((out / "evaluation.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
