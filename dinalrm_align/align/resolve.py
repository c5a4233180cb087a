"""From a command line to an alignment run: find its settings, model, folder, and the checkpoint to resume."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from dinalrm_align.align.config import AlignRun
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.reward.names import check_reward, file_name
from dinalrm_align.train.run import complete_run, parse_run

Run = TypeVar("Run", bound=AlignRun)


@dataclass(frozen=True)
class Resolved(Generic[Run]):
    """An alignment run that is ready to start or to be resumed.

    Args:
        recipe: name of the recipe, "refl_sd35".
        run: the settings; a folder and a model have replaced None and "auto".
        text: the settings as YAML, for config.yaml.
        spec: the model.
        checkpoint: checkpoint to resume from, or None.
    """

    recipe: str
    run: Run
    text: str
    spec: ModelSpec
    checkpoint: Path | None


def resolve(
    kind: type[Run], description: str, recipe: Path, argv: Sequence[str], *, gradient: bool = False
) -> Resolved[Run]:
    """Return the alignment run of the command-line arguments `argv`: settings, model, folder and checkpoint.

    Invalid settings exit with status 2 and an error message.

    Args:
        kind: dataclass of the settings.
        description: first text of --help.
        recipe: file of the recipe. For an SD3.5 model the .yaml of the same name gives the defaults.
        gradient: whether the method needs the reward's gradient.
    """
    run, checkpoint = parse_run(kind, description, argv)
    check_reward(run.reward, gradient=gradient)
    if run.gold is not None:
        check_reward(run.gold)
    spec, reason = resolve_model(run.model)
    print(reason, flush=True)
    method = recipe.stem.removesuffix("_sd35")
    run, text = complete_run(
        run, recipe, argv, checkpoint, model=spec.name,
        name=f"{method}_{Path(spec.name).name}_{file_name(run.reward)}_seed{run.seed}",
        defaults=[recipe.with_suffix(".yaml")] if spec.kind == "sd35" else [],
    )  # fmt: skip
    return Resolved(recipe.stem, run, text, spec, checkpoint)
