"""Turn a command line into an alignment run: its settings, model, folder, and the checkpoint to resume from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from dinalrm_align.align.config import AlignRun
from dinalrm_align.models.specs import ModelSpec, check_sides, resolve_model
from dinalrm_align.reward.names import REWARDS, check_reward, file_name, parse_reward
from dinalrm_align.train.run import begin_run, complete_run, resume_command

Run = TypeVar("Run", bound=AlignRun)


@dataclass(frozen=True)
class Resolved(Generic[Run]):
    """An alignment run that is ready to start or to be resumed.

    Args:
        recipe: name of the recipe, such as "refl_sd35".
        run: the settings, with output_dir and model filled in.
        text: the settings as YAML, the content of config.yaml.
        spec: the base model.
        checkpoint: checkpoint to resume from, or None for a new run.
        resume_command: shell command that resumes the run.
    """

    recipe: str
    run: Run
    text: str
    spec: ModelSpec
    checkpoint: Path | None
    resume_command: str


def resolve(
    kind: type[Run], description: str, recipe: Path, argv: Sequence[str], *, gradient: bool = False
) -> Resolved[Run]:
    """Parse the command-line arguments `argv` of a recipe, and find the run's model, folder and checkpoint.

    Invalid settings end the process with status 2 and an error message.

    Args:
        kind: dataclass of the settings.
        description: text at the top of --help.
        recipe: path of the recipe's script, METHOD_sd35.py. A file METHOD_KIND.yaml beside it gives the defaults for
            models of this kind, sd35 or shapes. METHOD_KIND_REWARD.yaml overrides them if a reward of that name is
            maximised.
        gradient: whether the method needs a differentiable reward.
    """
    given, checkpoint = begin_run(kind, description, argv)
    spec, reason = resolve_model(given.model)
    print(reason, flush=True)
    method = recipe.stem.removesuffix("_sd35")
    parts = [f"_{term.name}" for term in parse_reward(given.reward) if term.name in REWARDS]
    files = [recipe.with_name(f"{method}_{spec.kind}{part}.yaml") for part in ("", *parts)]
    run, text = complete_run(
        kind, recipe, argv, checkpoint, model=spec.name,
        name=lambda run: f"{method}_{Path(spec.name).name}_{file_name(run.reward)}_seed{run.seed}",
        defaults=[path for path in files if path.exists()],
    )  # fmt: skip
    check_reward(run.reward, gradient=gradient)
    if run.gold is not None:
        check_reward(run.gold)
    check_sides(spec, height=run.height or spec.height, width=run.width or spec.width)
    spec = spec.with_text_length(run.text_length)
    return Resolved(recipe.stem, run, text, spec, checkpoint, resume_command(recipe, Path(run.output_dir)))
