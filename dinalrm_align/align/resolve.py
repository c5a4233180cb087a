"""Turn a command line, or values in Python, into an alignment run: settings, model, folder, checkpoint to resume from.

Imports no torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dinalrm_align.align.config import AlignRun
from dinalrm_align.models.specs import PACKAGE, ModelSpec, check_sides, resolve_model
from dinalrm_align.reward.names import REWARDS, check_reward, file_name, gold_rewards, parse_reward
from dinalrm_align.train.command import as_yaml, given_options, parse
from dinalrm_align.train.run import begin_run, changed_settings, complete_run, resume_command
from dinalrm_align.train.settings import with_values

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

    from dinalrm_align.data.hub_prompts import Prompts

Run = TypeVar("Run", bound=AlignRun)


@dataclass(frozen=True)
class Given:
    """Objects that a program hands to a run, in place of those that the settings name.

    Args:
        pipeline: the base model with its text encoders. Its models are frozen, and its transformer gets the LoRA.
        prompts, eval_prompts: training prompts and held-out prompts, or data sets of them (`load_prompts`).
        functions: callables and rewards by the names that stand for them in the setting `reward` (`load_reward`).
        text_lengths: numbers of T5 tokens that the rewards in `functions` read.
        after_update: called after each update with its metrics; returns the reason to stop the run, or None,
            on all ranks the same.
    """

    pipeline: "StableDiffusion3Pipeline | None" = None
    prompts: "Prompts" = ()
    eval_prompts: "Prompts" = ()
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    text_lengths: frozenset[int] = frozenset()
    after_update: Callable[[Mapping[str, float]], str | None] = lambda row: None


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
        given: objects in place of names in the settings.
    """

    recipe: str
    run: Run
    text: str
    spec: ModelSpec
    checkpoint: Path | None
    resume_command: str
    given: Given = field(default_factory=Given)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the run's images, in pixels."""
        return self.run.height or self.spec.height, self.run.width or self.spec.width


def resolve(
    kind: type[Run], description: str, recipe: Path, argv: Sequence[str] | None, *, gradient: bool = False
) -> Resolved[Run]:
    """Parse the command-line arguments `argv` of a recipe, and find the run's model, folder and checkpoint.

    Invalid settings end the process with status 2 and an error message.

    Args:
        kind: dataclass of the settings.
        description: text at the top of --help.
        recipe: path of the recipe's script, METHOD_sd35.py, beside the files of its settings (`settings_files`).
        gradient: whether the method needs a differentiable reward.
    """
    given, checkpoint = begin_run(kind, description, argv)
    spec, reason = resolve_model(given.model)
    print(reason, flush=True)
    run, text = complete_run(
        kind, recipe, argv, checkpoint, model=spec.name, name=lambda run: _name(recipe, spec, run),
        defaults=settings_files(recipe, spec.kind, given.reward),
    )  # fmt: skip
    return _resolved(recipe, run, text, spec, checkpoint, gradient=gradient)


def resolve_values(
    kind: type[Run], method: str, values: Mapping[str, Any], given: Given, *, gradient: bool = False
) -> Resolved[Run]:
    """Return a new run from settings by dotted name, such as {"optim.lr": 1e-4}, and from objects.

    The recipe of the method gives the defaults, as in `resolve`. A run in `output_dir` can be resumed with `resumed`.
    Raises ValueError and TypeError for invalid settings, and FileNotFoundError without the recipe.
    """
    from dinalrm_align.train.checkpoints import new_run_folder

    folders = (PACKAGE.parent / "recipes", PACKAGE / "recipes")  # of a clone, and of an installed package
    recipes = [path for folder in folders if (path := folder / f"{method}_sd35.py").is_file()]
    if not recipes:
        raise FileNotFoundError(f"no {method}_sd35.py, with its default settings, in {' or '.join(map(str, folders))}")
    recipe = recipes[0]
    spec, reason = resolve_model(values.get("model", kind.model))
    print(reason, flush=True)
    run, _ = parse(kind, "", [], settings_files(recipe, spec.kind, values.get("reward", kind.reward)))
    run = with_values(run, {**values, "model": spec.name})
    run.output_dir = str(Path(run.output_dir or new_run_folder(None, _name(recipe, spec, run))).absolute())
    return replace(_resolved(recipe, run, as_yaml(run), spec, None, gradient=gradient), given=given)


def resumed(resolved: Resolved[Run], source: Path) -> Resolved[Run]:
    """Return the run, resumed from the checkpoint `source` or from the newest one in the run folder `source`.

    Raises ValueError without an intact checkpoint, or if a setting changed that must not (`train.identity`).
    """
    from dinalrm_align.train.checkpoints import checkpoint_to_resume

    checkpoint = checkpoint_to_resume(source)
    changed_settings(resolved.run, checkpoint)
    return replace(resolved, checkpoint=checkpoint)


def _name(recipe: Path, spec: ModelSpec, run: AlignRun) -> str:
    """Return the name of a run's folder under runs/."""
    method = recipe.stem.removesuffix("_sd35")
    return f"{method}_{Path(spec.name).name}_{file_name(run.reward)}_seed{run.seed}"


def parse_for_model(
    kind: type[Any], description: str, recipe: Path, argv: Sequence[str] | None
) -> tuple[Any, ModelSpec, str]:
    """Parse the command line of a recipe that aligns no model; return the settings, the model, and why it is this one.

    RECIPE_KIND.yaml beside RECIPE.py, if there is one, overrides the defaults of the dataclass `kind`. Errors are as of
    `parse`, and ValueError for an unknown model.
    """
    spec, reason = resolve_model(given_options(kind, description, argv).model)  # --help exits here
    own = recipe.with_name(f"{recipe.stem}_{spec.kind}.yaml")
    return parse(kind, description, argv, [own] if own.exists() else [])[0], spec, reason


def settings_files(recipe: Path, kind: str, reward: str) -> list[Path]:
    """Return the files with the settings of an alignment recipe for a kind of model; later files override earlier ones.

    align_KIND.yaml has the settings that all recipes share, METHOD_KIND.yaml those of the recipe METHOD_sd35.py, and
    METHOD_KIND_REWARD.yaml those for a reward that is maximised. A value that suits one kind of model stands in these
    files, never in a default of a dataclass. The files are beside the recipe.
    """
    method = recipe.stem.removesuffix("_sd35")
    parts = [f"{method}_{kind}_{term.name}" for term in parse_reward(reward) if term.name in REWARDS]
    files = [recipe.with_name(f"{name}.yaml") for name in (f"align_{kind}", f"{method}_{kind}", *parts)]
    return [path for path in files if path.exists()]


def _resolved(
    recipe: Path, run: Run, text: str, spec: ModelSpec, checkpoint: Path | None, *, gradient: bool
) -> Resolved[Run]:
    check_reward(run.reward, gradient=gradient)
    gold_rewards(run.gold, spec.gold)
    check_sides(spec, height=run.height or spec.height, width=run.width or spec.width)
    run.check_steps(spec.num_steps)
    spec = spec.with_text_length(run.text_length)
    return Resolved(recipe.stem, run, text, spec, checkpoint, resume_command(recipe, Path(run.output_dir)))
