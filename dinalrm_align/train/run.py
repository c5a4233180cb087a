"""Parse the command line of a new or resumed training run. Does not import torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from dinalrm_align.train.command import parse, refuse
from dinalrm_align.train.metrics import check_tracker

Run = TypeVar("Run")  # settings of a training recipe: model, output_dir, resume, tracker, ...


def parse_run(kind: type[Run], description: str, argv: Sequence[str]) -> tuple[Run, Path | None]:
    """Parse the command line of a training recipe; return the settings and the checkpoint to resume from.

    With `--resume`, options in `argv` override the run folder's config.yaml. For a new run, the checkpoint is None.
    """
    run, _ = parse(kind, description, argv)  # --help exits here, before heavy imports
    checkpoint = None
    if run.resume is not None:
        from dinalrm_align.train.checkpoints import checkpoint_to_resume, run_of

        checkpoint = checkpoint_to_resume(Path(run.resume))
        folder = run_of(checkpoint)
        if run.output_dir and Path(run.output_dir).resolve() != folder:
            refuse(f"output_dir: got {run.output_dir}; expected {folder}, as in --resume: leave out --output_dir")
        run, _ = parse(kind, description, argv, [folder / "config.yaml"])
    check_tracker(run.tracker)
    if run.model == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        refuse("model: got auto with several processes, which could choose differently; expected the name of a model")
    return run, checkpoint


def complete_run(
    run: Run,
    recipe: Path,
    argv: Sequence[str],
    checkpoint: Path | None,
    *,
    model: str,
    name: str,
    defaults: Sequence[Path] = (),
) -> tuple[Run, str]:
    """Fill in model and output folder in the settings `run`; return the new settings and the text of config.yaml.

    Args:
        recipe: path of the training program.
        model: name of the model; replaces the value "auto" of `run.model`.
        name: name of the new run folder under runs/; used if output_dir is not set.
        defaults: YAML files whose values override the defaults of the dataclass; ignored if a run is resumed.
    """
    from dinalrm_align.train.checkpoints import new_run_folder, run_of

    folder = run_of(checkpoint) if checkpoint else new_run_folder(run.output_dir, name)
    resolved = [*argv, "--model", model, "--output_dir", str(folder), "--resume", "null"]
    run, text = parse(type(run), "", resolved, [folder / "config.yaml"] if checkpoint else defaults)
    return run, f"# settings of recipes/{recipe.name}\n{text}"
