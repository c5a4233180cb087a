"""Counted memory of the latent reward beside its targets at 1024 x 1024 and batch 1.

python examples/evidence/savings_targets.py                              # the counts in examples/results
python examples/evidence/savings_targets.py runs/savings/savings.json    # those of `python recipes/savings.py`
"""

import argparse
import json
from pathlib import Path

from dinalrm_align.align.savings.config import SavingsRun
from dinalrm_align.eval.report.markdown import table

RESULT = Path(__file__).parents[1] / "results" / "savings.json"

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("path", nargs="?", type=Path, default=RESULT, help="counts to compare")
path = parser.parse_args().path
stored = json.loads(path.read_text(encoding="utf-8"))
base = SavingsRun(**stored["settings"]).base
if (base.size, base.batch, base.levels) != (1024, 1, 1) or not stored["settings"]["economies"]:
    raise SystemExit(f"{path}: targets are for --size 1024 --batch 1 --levels 1 --economies true")
refl, gradient = base.but(work="refl"), base.but(work="gradient")
targets = [
    ("ReFL update", refl, "memory", 6.5),
    ("ReFL update, batch 4", refl.but(batch=4), "memory", 10.0),
    ("ReFL update, base in NF4", refl.but(base_quant="nf4"), "memory", 4.5),
    ("reward forward and backward, above weights, nothing recomputed", gradient.kept, "activations", 4.2),
    ("reward forward and backward, above weights, blocks recomputed", gradient, "activations", 0.7),
]
rows = []
for name, case, kind, limit in targets:
    (size,) = (row["counted"][kind] / 2**30 for row in stored["cases"] if row["case"] == vars(case))
    rows.append([name, f"{limit:.1f}", f"{size:.2f}", "met" if size <= limit else "missed"])
print(table(["latent reward", "at most GiB", "GiB", ""], rows, padded=True))
