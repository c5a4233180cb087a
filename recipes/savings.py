"""Count memory and FLOPs of aligning SD3.5 Medium with a latent reward (DiNa-LRM), PickScore and HPSv3.

    python recipes/savings.py                                 needs no weights and no GPU, a few minutes on two cores
    python recipes/savings.py --size 512 --batch 4
    python recipes/savings.py --measure                       also measures on this machine's CUDA GPU

Full-size networks are built from their published configs and run on tensors without storage, with the recipes' own
code. Workloads: scoring, the reward's gradient, the gradient computation of a ReFL update, a Flow-GRPO update, and each
network alone. The tables report peak bytes and floating-point operations. Savings with and without the ReFL rollout
are listed beside those of arXiv 2602.11146. `--economies false` leaves out the table of memory-saving options. Writes
savings.md, savings.json and savings.png to output_dir, and prints savings.md.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.savings.config import SavingsRun, all_cases
from dinalrm_align.train.command import parse, refuse, refusing


@refusing()
def main(argv: Sequence[str] | None = None) -> None:
    run, _ = parse(SavingsRun, __doc__, argv)

    import torch

    from dinalrm_align.align.savings.cost import count_all, matrix_rate, measure_all
    from dinalrm_align.align.savings.report import draw_costs, report, to_json
    from dinalrm_align.train.files import make_folder, write_atomically

    if run.measure and not torch.cuda.is_available():
        refuse("measure: got true, but torch finds no CUDA GPU on this machine; without it everything is counted")
    folder, cases, measured = Path(run.output_dir), all_cases(run), (None, "", None)
    make_folder(folder)
    costs = count_all(cases, workers=run.workers)
    if run.measure:
        card = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        measured = measure_all(cases, warmup=run.warmup, repeats=run.repeats), card, matrix_rate()
    text = report(run, costs, *measured)
    write_atomically(folder / "savings.md", text)
    write_atomically(folder / "savings.json", json.dumps(to_json(run, costs, *measured), indent=1))
    draw_costs(run, costs, folder / "savings.png")
    print(text, f"{folder / 'savings.md'}, savings.json, savings.png", sep="\n")


if __name__ == "__main__":
    main()
