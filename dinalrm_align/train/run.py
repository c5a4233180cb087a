"""Parse the command line of a new or resumed training run. Does not import torch."""

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace

from dinalrm_align.train.command import as_yaml, given_options, parse, refuse
from dinalrm_align.train.files import STATE, read_json, read_yaml
from dinalrm_align.train.identity import by_name, check_settings, may_change, settings_by_name
from dinalrm_align.train.metrics import check_tracker

Run = TypeVar("Run")  # settings of a training recipe: model, output_dir, resume, tracker, ...
CONFIG = "config.yaml"


def begin_run(kind: type[Run], description: str, argv: Sequence[str] | None) -> tuple[Namespace, Path | None]:
    """Read the command line of a training recipe; return the values by name and the checkpoint to resume from.

    The values are those of `argv` and, with `--resume`, of the run's config.yaml. A new run has no checkpoint.
    """
    given = given_options(kind, description, argv)  # --help exits here, before heavy imports
    checkpoint = None
    if given.resume is not None:
        from dinalrm_align.train.checkpoints import checkpoint_to_resume, run_of

        checkpoint = checkpoint_to_resume(Path(given.resume))
        folder = run_of(checkpoint)
        if given.output_dir and Path(given.output_dir).resolve() != folder:
            refuse(f"output_dir: got {given.output_dir}; expected {folder}, as in --resume: leave out --output_dir")
        given = given_options(kind, description, argv, [folder / CONFIG])
    if given.model == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        refuse("model: got auto with several processes, which could choose differently; expected the name of a model")
    return given, checkpoint


def complete_run(
    kind: type[Run],
    recipe: Path,
    argv: Sequence[str] | None,
    checkpoint: Path | None,
    *,
    model: str,
    name: Callable[[Run], str],
    defaults: Sequence[Path] = (),
) -> tuple[Run, str]:
    """Return the settings with the model and the output folder filled in, and the text of config.yaml.

    With a checkpoint, options in `argv` override the run folder's config.yaml. Raises ValueError if a setting differs
    from that of the run and is fixed (`train.identity`); prints the other settings that differ.

    Args:
        recipe: path of the training program.
        model: name of the model; replaces the value "auto".
        name: function from the settings to the name of the new run folder under runs/ if output_dir is not set.
        defaults: YAML files that override the defaults of the dataclass in a new run.
    """
    from dinalrm_align.train.checkpoints import new_run_folder, run_of

    folder = run_of(checkpoint) if checkpoint else None
    run, _ = parse(kind, "", argv, [folder / CONFIG] if folder else defaults)
    check_tracker(run.tracker)
    run.model, run.resume = model, None
    run.output_dir = str(folder or new_run_folder(run.output_dir, name(run)).absolute())
    if checkpoint:
        changed = changed_settings(run, checkpoint)
        if int(os.environ.get("RANK", "0")) == 0 and (shown := changed.keys() - {"output_dir", "resume"}):
            each = (f"{name} {changed[name][0]} -> {changed[name][1]}" for name in sorted(shown))
            print(f"settings that changed since the checkpoint: {', '.join(each)}", flush=True)
    return run, f"# settings of recipes/{recipe.name}\n{as_yaml(run)}"


def changed_settings(run: Any, checkpoint: Path) -> dict[str, tuple[Any, Any]]:
    """Return {name: (before, now)} of the settings in `run` that differ from those of the run of a checkpoint.

    Raises ValueError if a setting that must not change does (`check_settings`).
    """
    from dinalrm_align.train.checkpoints import run_of

    kind = type(run)
    before = settings_by_name(kind()) | by_name(kind, read_yaml(run_of(checkpoint) / CONFIG, "settings file"))
    before |= read_json(checkpoint / STATE).get("settings", {})  # checkpoints of earlier versions have none
    return check_settings(before, settings_by_name(run), may_change(kind), str(checkpoint))


def resume_command(recipe: Path, folder: Path) -> str:
    """Return the shell command that resumes the run in `folder`, from any directory."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = ["python"] if world == 1 else ["accelerate", "launch", "--num_processes", str(world)]
    return shlex.join([*launcher, str(recipe.absolute()), "--resume", str(folder.absolute())])
