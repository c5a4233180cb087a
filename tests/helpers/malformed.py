"""Malformed input: the types of case, the tiny models that the cases run on, and the check of their outcome.

The tables are `malformed_api.py`, `malformed_files.py` and `malformed_cli.py`; `test_malformed.py` runs them, and
`python tests/malformed_report.py` counts them into examples/results/malformed.md.
"""

import contextlib
import io
import itertools
import json
import linecache
import os
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import torch
from paths import ROOT, load_recipe
from safetensors.torch import load_file, save_file

PACKAGE = ROOT / "dinalrm_align"


@dataclass(frozen=True)
class Case:
    """A call that must raise.

    do: the call, a function of the World. error: the documented exception type. names: words that the message must
    hold, separated by blanks: the setting or file at fault and, where it is short, the bad value. by_signature: Python
    itself rejects the arguments, so the error is raised at the call and not inside the package.
    """

    name: str
    do: Callable[["World"], object]
    error: type[Exception] | tuple[type[Exception], ...]
    names: str
    by_signature: bool = False


@dataclass(frozen=True)
class Command:
    """A command line that must exit with status 2 and an error message.

    module: the recipe's file name, or `report`. words: the arguments, a function of the World. names: as in Case.
    """

    name: str
    module: str
    words: Callable[["World"], Sequence[object]]
    names: str


@dataclass
class World:
    """A tiny pipeline, rewards on it, and a folder for broken copies. Cases must not modify it."""

    root: Path
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    @cached_property
    def pipeline(self):
        from dinalrm_align.shapes.stack import StackConfig, build_pipeline

        pipeline = build_pipeline(StackConfig.tiny(), seed=0)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.requires_grad_(False).eval()
        return pipeline

    @cached_property
    def pipeline_dir(self) -> Path:
        self.pipeline.save_pretrained(self.root / "pipeline")
        return self.root / "pipeline"

    @cached_property
    def reward_dir(self) -> Path:
        from tiny_reward import tiny_reward_config

        from dinalrm_align.reward.checkpoint import write_reward
        from dinalrm_align.reward.model import build_reward_model

        self.pipeline_dir  # noqa: B018  the reward's base_model_id names it
        model = build_reward_model(tiny_reward_config(), self.pipeline.transformer, seed=1)
        write_reward(self.root / "dinalrm", model.config, model.tuned_tensors())
        return self.root / "dinalrm"

    @cached_property
    def released_dir(self) -> Path:
        self.reward.save_pretrained(self.root / "released", format="released")
        return self.root / "released"

    @cached_property
    def reward(self):
        from dinalrm_align import LatentReward

        return LatentReward.from_pretrained(self.reward_dir, pipeline=self.pipeline)

    @cached_property
    def clip_dir(self) -> Path:
        from tiny_clip import save_clip

        return save_clip(self.root / "pixel", side=64, patch=16)

    @cached_property
    def clip(self):
        from dinalrm_align.reward.pixel.clip import ClipReward

        return ClipReward.from_pretrained(str(self.clip_dir), vae=self.pipeline.vae)

    @cached_property
    def lrm_dir(self) -> Path:
        from tiny_lrm import save_lrm

        for folder in save_lrm(self.root / "lrm_parts", "sd15"):
            shutil.copytree(folder, self.root / "lrm", dirs_exist_ok=True)
        return self.root / "lrm"

    @cached_property
    def lrm(self):
        from dinalrm_align.reward.lrm import LrmReward

        return LrmReward.from_pretrained(self.lrm_dir, family="sd15")

    @cached_property
    def policy(self):
        import copy

        from dinalrm_align.align.policy import Policy
        from dinalrm_align.reward.config import LoraConfig

        return Policy(copy.deepcopy(self.pipeline.transformer), LoraConfig(2, 2), seed=0)

    @cached_property
    def pairs_dir(self) -> Path:
        from dinalrm_align.data.latent_pairs import LatentPairsWriter
        from dinalrm_align.data.pairs import PairManifest

        with LatentPairsWriter(self.root / "pairs", PairManifest(1.0, 0.0, 16)) as writer:
            for index in range(4):
                text = {"prompt_embeds": torch.randn(5, 32), "pooled_prompt_embeds": torch.randn(32)}
                writer.add(f"prompt {index}", torch.randn(2, 16, 8, 8), **text)
        return self.root / "pairs"

    # ------------------------------------------------------------------------------------------------ broken copies

    def fresh(self) -> Path:
        """A new empty folder beside the pipeline."""
        folder = self.root / f"case_{next(self.numbers)}"
        folder.mkdir()
        return folder

    def file(self, name: str, content: bytes | str) -> Path:
        """A file of this name in a fresh folder."""
        path = self.fresh() / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def copy(self, folder: Path) -> Path:
        copied = self.root / f"case_{next(self.numbers)}"
        shutil.copytree(folder, copied)
        return copied

    def with_json(self, folder: Path, name: str, **changes: object) -> Path:
        """A copy of a folder with changed values in a JSON file: `a__b` is a nested key, and ... deletes a key."""
        copied = self.copy(folder)
        values = json.loads((copied / name).read_text())
        for dotted, value in changes.items():
            *above, last = dotted.split("__")
            target = values
            for key in above:
                target = target[key]
            if value is ...:
                del target[last]
            else:
                target[last] = value
        (copied / name).write_text(json.dumps(values))
        return copied

    def with_bytes(self, folder: Path, name: str, content: bytes | str | Callable[[bytes], bytes]) -> Path:
        """A copy of a folder with different bytes in one file."""
        copied = self.copy(folder)
        made = content((copied / name).read_bytes()) if callable(content) else content
        (copied / name).write_bytes(made.encode() if isinstance(made, str) else made)
        return copied

    def with_tensors(self, folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        """A copy of a folder with one safetensors file modified in place by `change`."""
        copied = self.copy(folder)
        tensors = load_file(copied / name)
        change(tensors)
        save_file(tensors, copied / name)
        return copied


def latents(*shape: int, **options: object) -> torch.Tensor:
    """A standard normal tensor; by default a batch of two latents for the tiny reward."""
    return torch.randn(shape or (2, 16, 8, 8), generator=torch.Generator().manual_seed(0)).to(**options)


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """A copy with one element replaced."""
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


class Bomb:
    """An object whose pickle creates a file when it is loaded without restrictions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def holds(message: str, names: str) -> bool:
    """True when every word of `names` stands in the message as a whole word."""
    return all(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names.split())


def check(case: Case, world: World) -> str | None:
    """None when the case raises as documented, else the problem."""
    try:
        result = case.do(world)
    except Exception as error:
        return _check_error(case, error)
    return f"silent: returned {result!r:.80}"


def _check_error(case: Case, error: Exception) -> str | None:
    said = f"{type(error).__name__}: {str(error)[:300]}"
    if not isinstance(error, case.error):
        return f"expected {case.error}, got {said}"
    if not holds(str(error), case.names):
        return f"expected a message with {case.names!r}, got {said}"
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    path = Path(frame.f_code.co_filename)
    raised = linecache.getline(str(path), line).strip().startswith("raise")
    if not case.by_signature and not (path.is_relative_to(PACKAGE) and raised):
        return f"raised in {path}, line {line}, not by a check of this package: {said}"
    return None


def check_command(command: Command, world: World) -> str | None:
    """None when the command exits with status 2, an error message and no output files, else the problem."""
    words = [str(word) for word in command.words(world)]
    folder = world.fresh()
    before, stderr, stdout = os.getcwd(), io.StringIO(), io.StringIO()
    os.chdir(folder)
    status: object = "none: it ran"
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(stdout):
            entry(command.module)(words)
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        return f"raw {type(error).__name__}: {str(error)[:300]}"
    finally:
        os.chdir(before)
    lines = stderr.getvalue().strip().splitlines() or [""]
    if status != 2:
        return f"expected status 2, got {status}"
    if not (lines[-1].startswith("error: ") or ": error: " in lines[-1]) or "Traceback" in stderr.getvalue():
        return f"expected a last line that begins with error:, got {lines[-1][:300]!r}"
    if not holds(lines[-1], command.names):
        return f"expected a message with {command.names!r}, got {lines[-1][:300]!r}"
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return f"left {left[:5]} behind" if left else None


def recipe(name: str) -> str:
    """The name of a recipe, checked at import."""
    if not (ROOT / "recipes" / f"{name}.py").is_file():
        raise FileNotFoundError(f"recipes/{name}.py")
    return name


@cache
def entry(name: str) -> Callable[[Sequence[str]], None]:
    """The main function of a recipe."""
    return load_recipe(name).main
