"""Run every malformed call, file and command line, and write the counts to examples/results/malformed.md.

python tests/malformed_report.py
"""

import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))

import malformed_api  # noqa: E402
import malformed_cli  # noqa: E402
import malformed_files  # noqa: E402
from malformed import ROOT, Command, World, check, check_command  # noqa: E402

from dinalrm_align.eval.report.markdown import table  # noqa: E402

RESULTS = ROOT / "examples" / "results" / "malformed.md"
TABLES = {"calls": malformed_api, "files and folders": malformed_files, "command lines": malformed_cli}
HEADER = """Malformed input and how it is reported. Refused: a call raises the documented exception type from a check
of this package, a command exits with status 2, a last line that begins with `error:` and no output files, and the
message names the setting or file at fault. Silent: the call returned, or the command ran. Raw: another exception, or
one from inside a library. Regenerate with `python tests/malformed_report.py`; the cases are in
`tests/helpers/malformed_api.py`, `malformed_files.py` and `malformed_cli.py`.
"""
COLUMNS = "kind", "group", "cases", "refused", "silent", "raw"


def main() -> None:
    warnings.simplefilter("ignore")
    rows, total = [], [0, 0, 0, 0]
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for kind, module in TABLES.items():
            for group, cases in module.GROUPS.items():
                found = {case.name: outcome(case, world) for case in cases}
                for name, problem in found.items():
                    if problem:
                        print(f"{group}: {name}: {problem}", file=sys.stderr)
                problems = [problem for problem in found.values() if problem]
                silent = sum(problem.startswith(("silent", "expected status 2")) for problem in problems)
                counts = [len(cases), len(cases) - len(problems), silent, len(problems) - silent]
                total = [before + count for before, count in zip(total, counts, strict=True)]
                rows.append([kind, group, *counts])
        if (world.root / "unpickled").exists():
            raise SystemExit("a pickle was run")
    rows.append(["all", "", *total])
    RESULTS.write_text(f"{HEADER}\n{table(COLUMNS, rows, 'llrrrr')}\n", encoding="utf-8")
    print(f"{RESULTS}: {total[0]} cases, {total[1]} refused, {total[2]} silent, {total[3]} raw")


def outcome(case, world: World) -> str | None:
    return check_command(case, world) if isinstance(case, Command) else check(case, world)


if __name__ == "__main__":
    main()
