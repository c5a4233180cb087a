"""Every setting of every recipe for SD3.5 with the source of its value, from the comments of the settings files."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from paths import RECIPES, ROOT, load_recipe

from dinalrm_align.align.dpo_config import DpoRun
from dinalrm_align.align.grpo_config import GrpoRun
from dinalrm_align.align.lpo_config import LpoRun
from dinalrm_align.align.nft_config import NftRun
from dinalrm_align.align.refl_config import ReflRun
from dinalrm_align.align.resolve import parse_for_model, resolve, settings_files
from dinalrm_align.data.config import PrepareRun
from dinalrm_align.eval.config import AblateRun, EvaluateRun
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.models.specs import MODELS
from dinalrm_align.train.identity import settings_by_name

TABLE = RECIPES / "sd35_settings.md"
METHODS = {"refl": ReflRun, "dpo": DpoRun, "grpo": GrpoRun, "lpo": LpoRun, "nft": NftRun}
VARIANTS = {
    "refl, HPSv3 as the reward": ("refl", ("--reward=hpsv3",), "refl_sd35_hpsv3.yaml"),
    "nft, as in Flow-Factory": (
        "nft", (f"--config={RECIPES / 'nft_sd35_flow_factory.yaml'}",), "nft_sd35_flow_factory.yaml",
    ),
}  # fmt: skip
"""Title -> (method, options, the file that is read after those of the method)."""
OTHERS = {
    "mine_pairs": lambda: load_recipe("mine_pairs").settings_and_model(["--model=sd35"])[0],
    "train_reward": lambda: load_recipe("train_reward").resolve(["--model=sd35", "--pairs=x"])[0],
    "prepare_pairs": lambda: parse_for_model(
        PrepareRun, "", RECIPES / "prepare_pairs.py", ["--model=sd35", "--source=x"]
    )[0],
    "evaluate_reward": lambda: parse_for_model(EvaluateRun, "", RECIPES / "evaluate_reward.py", ["--model=sd35"])[0],
    "ablate_reward": lambda: parse_for_model(AblateRun, "", RECIPES / "ablate_reward.py", ["--model=sd35"])[0],
}
"""Recipe -> its settings for SD3.5."""
GIVEN = ("source", "test_sets", "shapes_pairs")
"""What a command line must give, and what only the embedded world reads."""
HEAD = """# Settings for Stable Diffusion 3.5 Medium, and their sources

Written by `python tests/sd35_settings.py` from the comments in the settings files. A test fails if a value has no
comment, or if this file is not up to date. Abbreviations are explained at the top of each settings file; `here` marks a
choice of this project. `null` means that the run finds the value: from the model (first table), from the reward, or not
at all. An alignment recipe reads the settings of all alignment recipes first, and its own override them.
"""


def aligned(method: str, *options: str, model: str = "sd35") -> Any:
    """The settings of a new run of an alignment recipe. Run folders are named in the working directory."""
    recipe = RECIPES / f"{method}_sd35.py"
    return resolve(METHODS[method], "", recipe, [f"--model={model}", *options], gradient=method == "refl").run


def everything() -> Iterator[tuple[str, Any, list[Path]]]:
    """(title, settings, the files that they come from) of every recipe and variant."""
    for method in METHODS:
        yield method, aligned(method), settings_files(RECIPES / f"{method}_sd35.py", "sd35", "dinalrm")
    for title, (method, options, file) in VARIANTS.items():
        files = settings_files(RECIPES / f"{method}_sd35.py", "sd35", "dinalrm")
        yield title, aligned(method, *options), [*files, RECIPES / file]
    for name, make in OTHERS.items():
        yield name, make(), [RECIPES / f"{name}_sd35.yaml"]


def sources(path: Path) -> dict[str, str]:
    """The comment on the line of each setting in a YAML file, by dotted name; comments go on in further lines."""
    found, sections, name = {}, [], ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if entry := re.match(r"( *)(\w+):(?: (?!#)(.*?))? *(?:# (.*))?$", line):
            sections = [*sections[: len(entry[1]) // 2], entry[2]]
            name = ".".join(sections)
            if entry[3]:
                found[name] = entry[4] or ""
        elif (more := re.match(r" +# (.*)", line)) and found.get(name):
            found[name] += f" {more[1]}"
    return found


def without_source(settings: Any, files: Sequence[Path]) -> list[str]:
    """The settings that no file sets, and those without a comment on the line of the last file that sets them."""
    said = {name: source for file in files for name, source in sources(file).items()}
    return [name for name in settings_by_name(settings) if name.split(".")[0] not in GIVEN and not said.get(name)]


def rows(path: Path) -> list[tuple[str, str, str]]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = []
    for name, source in sources(path).items():
        value = values
        for part in name.split("."):
            value = value[part]
        found.append((f"`{name}`", f"`{yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}`", source))
    return found


def model_rows() -> list[tuple[str, str, str]]:
    """The fields of the model in dinalrm_align/models/specs.py, with the comments on their lines."""
    text = (ROOT / "dinalrm_align" / "models" / "specs.py").read_text(encoding="utf-8")
    lines = text.partition('"sd35": ModelSpec(')[2].partition("\n    ),\n")[0]
    found = re.findall(r"^ +(\w+)=.*?,(?:  # (.*))?$", lines, re.MULTILINE)
    shown = {name: str(value) for name, value in vars(MODELS["sd35"]).items()}
    return [
        (f"`{name}`", f"`{shown[name].removeprefix(f'{ROOT}/')}`", source)
        for name, source in found
        if name not in ("name", "kind")
    ]


def text() -> str:
    """The content of recipes/sd35_settings.md."""
    files = {"All alignment recipes": "align_sd35.yaml"} | {method: f"{method}_sd35.yaml" for method in METHODS}
    files |= {title: file for title, (_, _, file) in VARIANTS.items()} | {name: f"{name}_sd35.yaml" for name in OTHERS}
    parts = [("The model", "dinalrm_align/models/specs.py", model_rows())]
    parts += [(title, f"recipes/{file}", rows(RECIPES / file)) for title, file in files.items()]
    columns = ("setting", "value", "source")
    sections = [f"## {title}\n\n`{file}`\n\n{table(columns, lines, 'lll')}\n" for title, file, lines in parts]
    return "\n".join([HEAD, *sections])
