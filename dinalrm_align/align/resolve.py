"""From a command line to an alignment run: settings, model, folder and the checkpoint to resume."""

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
        recipe: its name, "refl_sd35".
        run: the settings, with a folder and a model in place of "auto" and None.
        text: the same as YAML, for config.yaml.
        spec: the model.
        checkpoint: to resume from, or None.
    """

    recipe: str
    run: Run
    text: str
    spec: ModelSpec
    checkpoint: Path | None


def resolve(
    kind: type[Run], description: str, recipe: Path, argv: Sequence[str], *, gradient: bool = False
) -> Resolved[Run]:
    """Settings of the program `recipe` (its file) from `argv`; for an SD3.5 model RECIPE.yaml gives the defaults.

    gradient: whether the method needs the reward's gradient. Invalid settings exit with status 2 and an error message.
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
