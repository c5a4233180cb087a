"""Find every file that a command needs before it loads any weights. Reads names of files and configs; no torch."""

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinalrm_align.models.layout import T5, WITHOUT_T5, missing_files, missing_weights
from dinalrm_align.models.specs import ModelSpec, cached_folder, hub_refusals
from dinalrm_align.reward.names import REWARDS, Term, companion_of, parse_reward, source_of
from dinalrm_align.train.files import HUB_ID, read_json

SCRIPT = "data_collator_qwen.py"
"""File of the package hpsv3 that has HPSv3's instruction."""


@dataclass(frozen=True)
class Need:
    """A folder, file or hub id that a command reads.

    Args:
        what: noun, for messages.
        lacking: function from the local path to the names of missing files.
        option: command-line option that names another source.
    """

    what: str
    source: str
    lacking: Callable[[Path], list[str]]
    option: str


def check_sources(
    spec: ModelSpec,
    rewards: Mapping[str, Any],
    *,
    parts: Sequence[str] | None = (),
    options: Mapping[str, Any] | None = None,
    functions: Iterable[str] = (),
    others: Sequence[Need] = (),
) -> None:
    """Raise FileNotFoundError that names all that is neither here nor granted by the hub, and what supplies it.

    The hub is asked, for at most 3 seconds, about what is not in its local cache. If everything is, and the hub does
    not answer, the cache is used without asking the hub again.

    Args:
        rewards: rewards by the option that names them, such as {"reward": "dinalrm"}; what follows a / in it is left
            out. None and callables are skipped.
        parts: subfolders of the model's pipeline that are needed; empty: all; None: none.
        options: options of HPSv3 (`Hpsv3Config`), `template` and `base`.
        functions: names in rewards that stand for objects.
        others: further needs.
    """
    needs = [*others]
    if parts is not None:
        needs.append(Need("base model", spec.pipeline, lambda folder: missing_files(folder, parts), "--model DIR"))
    for option, reward in rewards.items():
        for term in parse_reward(reward) if isinstance(reward, str) else ():
            if term.name in REWARDS and term.name not in functions and not REWARDS[term.name].served:
                needs += _reward_needs(term, spec, f"--{option.split('/')[0]}", options or {})
    problems, on_hub, complete = dict[str, str](), dict[str, Need](), set[str]()
    for need in needs:
        path = Path(need.source).expanduser()
        if path.exists() or not HUB_ID.fullmatch(need.source):
            if fault := _fault(need, path):
                problems.setdefault(f"{need.what} {need.source} ({fault})", need.option)
        elif (folder := cached_folder(need.source)) is None or need.lacking(folder):
            on_hub.setdefault(need.source, need)
        else:
            complete.add(need.source)
    refusals = _refusals([*on_hub], complete)
    problems |= {f"{on_hub[source].what} {source}": on_hub[source].option for source in refusals}
    if problems:
        each = "; ".join(f"{number}. {what}: {option}" for number, (what, option) in enumerate(problems.items(), 1))
        why = "".join(f" {reason[:1].upper()}{reason[1:]}." for reason in dict.fromkeys(refusals.values()))
        raise FileNotFoundError(
            f"missing, each with the option that names another source: {each}.{why} One folder can supply all, --model "
            "DIR with DIR/pipeline, DIR/dinalrm, DIR/pickscore, DIR/clip_h, DIR/hpsv3 and so on (recipes/README.md)"
        )


def _fault(need: Need, path: Path) -> str:
    """Return what is wrong with the files at `path`; empty: nothing."""
    if not path.exists():
        return "it does not exist"
    try:
        lacks = need.lacking(path)
    except ValueError as error:  # a config.json or an index is damaged
        return str(error)
    hint = f"; {WITHOUT_T5}" if any(file.startswith(T5) for file in lacks) else ""
    return f"lacks {', '.join(lacks[:4])}{hint}" if lacks else ""


def lacking_files(files: Sequence[str]) -> Callable[[Path], list[str]]:
    """Return a function from a path to which of `files` are missing there; a file stands for the first of them.

    files: alternatives are separated by |.
    """

    def lacking(path: Path) -> list[str]:
        folder, wanted = (path.parent, files[1:]) if path.is_file() else (path, files)
        return [file for file in wanted if not any((folder / each).is_file() for each in file.split("|"))]

    return lacking


def missing_reward(folder: Path) -> list[str]:
    """Return the missing files of a latent reward, in either layout (`reward.checkpoint`)."""
    if not (folder / "config.json").is_file():
        return ["config.json"]
    model = read_json(folder / "config.json").get("model")
    if not isinstance(model, dict):
        files = ["model.safetensors"]
    elif not (model.get("use_lora") or model.get("freeze_backbone")):
        files = ["checkpoint/full_model.pt"]
    else:
        lora = [f"checkpoint/backbone_lora/adapter_{file}" for file in ("config.json", "model.safetensors")]
        files = ["checkpoint/rm_head.pt", *([] if model.get("freeze_backbone") else lora)]
    return [file for file in files if not (folder / file).is_file()]


def lora_need(source: str, option: str = "--policy.init_from DIR") -> Need:
    """Return the need of a LoRA: a file, or a folder or hub id that holds one."""

    def lacking(path: Path) -> list[str]:
        return [] if path.is_file() or any(path.glob("*.safetensors")) else ["*.safetensors"]

    return Need("LoRA", source, lacking, option)


def _reward_needs(term: Term, spec: ModelSpec, option: str, options: Mapping[str, Any]) -> list[Need]:
    if term.name == "oracle":
        return []
    name = "pickscore" if term.name == "pixel" and spec.kind == "sd35" else term.name
    other, entry, source = f"{option} {name}=DIR", REWARDS[term.name], source_of(term, spec)
    if term.name == "dinalrm":
        return [Need("latent reward", source, missing_reward, other)]
    if source is None:
        return [Need(f"reward {name}", "without a default", lambda path: [], f"{option} {entry.how}")]
    weights = lacking_files(entry.files) if entry.files else lambda folder: missing_weights(folder, "model")
    needs = [Need(f"reward {name}", source, weights, other)]
    hpsv3 = term.name in ("hpsv3", "hpsv3pp")
    companion = entry.companion or REWARDS["pickscore"].companion  # clipscore and pixel have a processor, too
    second = (options.get("base") if hpsv3 else None) or companion_of(term, spec) or source
    place = "--hpsv3.base DIR" if hpsv3 else f"its files beside the weights, {other}"
    needs.append(Need(f"{companion.argument} of {name}", second, lacking_files(companion.files), place))
    return [*needs, _template_need(name, source, options.get("template"))] if hpsv3 else needs


def _template_need(name: str, source: str, template: str | None) -> Need:
    """Return the need of HPSv3's instruction: a given file, a file beside the weights, or the installed package."""
    path = Path(source)
    beside = (path.parent if path.is_file() else path) / SCRIPT
    package = importlib.util.find_spec("hpsv3")
    if template is None and not beside.is_file() and package and package.submodule_search_locations:
        beside = Path(package.submodule_search_locations[0]) / "dataset" / SCRIPT
    option = "--hpsv3.template FILE, or pip install --no-deps hpsv3==1.0.0"
    return Need(f"instruction of {name}", template or str(beside), lambda path: [], option)


def _refusals(incomplete: Sequence[str], complete: Iterable[str]) -> dict[str, str]:
    """Return {repository: reason} of the `incomplete` repositories that cannot be downloaded.

    Without any, and if the hub does not answer about one that is `complete` in the cache, hub access is turned off for
    this process: the client would ask the hub about every file, and wait a minute for each.
    """
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return dict.fromkeys(incomplete, "what is on the hub is not in the local cache, and HF_HUB_OFFLINE is set")
    refusals = hub_refusals(list(incomplete) or sorted(complete)[:1])
    if incomplete or not refusals:
        return refusals
    if "does not grant" not in next(iter(refusals.values())):
        constants.HF_HUB_OFFLINE = True
    return {}
