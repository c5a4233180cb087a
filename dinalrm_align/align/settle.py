"""From a command line to the settings of an alignment run: what "auto" came to, where it is kept, what it resumes.

Nothing heavy is imported here before the settings are known to be good.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from dinalrm_align.align.config import AlignRun
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.reward.names import check_reward, file_name
from dinalrm_align.train.command import parse, refuse
from dinalrm_align.train.tracking import check_tracker

Run = TypeVar("Run", bound=AlignRun)


@dataclass(frozen=True)
class Settled(Generic[Run]):
    """An alignment run, ready to begin or to go on.

    recipe: its name, "refl_sd35". run: the settings, with a folder and a model in place of "auto" and None. text: the
    same as YAML, for config.yaml. spec: the model. checkpoint: what to go on from, if anything.
    """

    recipe: str
    run: Run
    text: str
    spec: ModelSpec
    checkpoint: Path | None


def settle(
    kind: type[Run], description: str, recipe: Path, argv: Sequence[str], *, gradient: bool = False
) -> Settled[Run]:
    """The settings that `argv` asks of the program `recipe` (its file); an SD3.5 model puts RECIPE.yaml beneath them.

    gradient: whether the method climbs the reward's gradient. What cannot be meant ends the program with status 2 and a
    sentence.
    """
    run, _ = parse(kind, description, argv)  # --help ends here, before anything heavy is imported
    from dinalrm_align.train.checkpoints import checkpoint_to_resume, new_run_folder, run_of, settings_of

    checkpoint, beneath = None, []
    if run.resume is not None:
        checkpoint = checkpoint_to_resume(Path(run.resume))
        if run.output_dir and Path(run.output_dir).resolve() != run_of(checkpoint):
            refuse(f"--resume goes on in {run_of(checkpoint)}: leave out --output_dir {run.output_dir}")
        beneath = [settings_of(checkpoint)]
        run, _ = parse(kind, description, argv, beneath)
    check_reward(run.reward, gradient=gradient)
    if run.gold is not None:
        check_reward(run.gold)
    check_tracker(run.tracker)
    if run.model == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        refuse("--model auto: each of several processes would choose for itself; name the model")
    spec, reason = resolve_model(run.model)
    print(reason, flush=True)
    if checkpoint is None and spec.kind == "sd35":
        beneath = [recipe.with_suffix(".yaml")]
    method = recipe.stem.removesuffix("_sd35")
    name = f"{method}_{Path(spec.name).name}_{file_name(run.reward)}_seed{run.seed}"
    folder = run_of(checkpoint) if checkpoint else new_run_folder(run.output_dir, name)
    # What "auto" and the defaults came to is written down, so that a resumed run is the same run.
    settled = [*argv, "--model", spec.name, "--output_dir", str(folder), "--resume", "null"]
    run, text = parse(kind, description, settled, beneath)
    return Settled(recipe.stem, run, f"# settings of recipes/{recipe.name}\n{text}", spec, checkpoint)
