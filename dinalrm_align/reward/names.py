"""Names of rewards and the syntax of `--reward`. This module does not import torch.

dinalrm                         a reward in `REWARDS`
pickscore=/data/PickScore_v1    weights from a folder, file or hub id. Quote the path if it contains " + " or " - ".
dinalrm + 0.2*pickscore         a weighted sum
my_package.my_module:my_reward  a Python callable
owner/name, or a folder         a latent reward, short for dinalrm=owner/name
http://host:port#NAME           a reward of a server (`python -m dinalrm_align.serve`), short for remote=http://...
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinalrm_align.models.specs import MODELS, ModelSpec
from dinalrm_align.train.settings import PathText, Source, did_you_mean

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # tokenizer and preprocessor of the rewards trained from it
BERT = "google-bert/bert-base-uncased"  # tokenizer of ImageReward
TOKENIZER = "tokenizer.json|vocab.json|vocab.txt|spiece.model"  # one of these files


@dataclass(frozen=True)
class Companion:
    """What a reward reads besides its weights: the tokenizer, preprocessor or config of the model it was trained from.

    Args:
        argument: argument of `from_pretrained` that names it.
        source: hub id.
        files: files that are read; alternatives are separated by |.
        beside: files which, beside local weights, show that the weights' folder holds them.
        name: name of its folder among local weights.
    """

    argument: str
    source: str
    files: tuple[str, ...]
    beside: tuple[str, ...]
    name: str = ""


@dataclass(frozen=True)
class RewardEntry:
    """Describes a reward that can be loaded by name.

    Args:
        kind: class of the reward, as "module:class"; must have `from_pretrained(source, *, vae, device, dtype, ...)`.
            None: the reward depends on the base model, and `registry` loads it.
        source: hub id of the default weights, or address of a server. None: there is no default.
        licence: licences of code and weights, as stated by the owners, in the form "code / weights".
        scale: meaning and usual range of a score.
        differentiable: whether the score has a gradient with respect to the image or latents.
        served: whether `source` is the address of a server instead of weights to load.
        extra: optional dependency group that the reward needs: pip install dinalrm-align[EXTRA].
        files: files of weights in `source`, alternatives separated by |; empty: those of a transformers model.
        companion: what else is read; None: the weights' own folder has all.
        options: default arguments of `from_pretrained`.
        how: instructions to get the weights or start the server.
    """

    kind: str | None
    source: str | None
    licence: str
    scale: str
    differentiable: bool = True
    served: bool = False
    extra: str | None = None
    files: tuple[str, ...] = ()
    companion: Companion | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    how: str = ""


_PIXEL = "dinalrm_align.reward.pixel"
_CLIP, _HPSV2 = f"{_PIXEL}.clip:ClipReward", f"{_PIXEL}.hpsv2:HPSv2Reward"
_LRM, _LRM_SCALE = "dinalrm_align.reward.lrm:LrmReward", "exp(logit_scale) cos"
_MIT, _APACHE, _MIT_CARD = "MIT / MIT", "Apache-2.0 / Apache-2.0", "MIT / as its model card says"
_PROCESSOR = Companion(
    "processor", CLIP_H, ("preprocessor_config.json", TOKENIZER), ("preprocessor_config.json",), "clip_h"
)
_CONFIG = ("config.json", TOKENIZER)
_LRM_BASE = ("tokenizer/tokenizer_config.json", "vae/config.json")


def _lrm(family: str, base: str) -> RewardEntry:
    companion = Companion("base", base, _LRM_BASE, _LRM_BASE[:1])
    files, options = (f"state_dict.pt|lrm_{family}/state_dict.pt",), {"family": family}
    return RewardEntry(_LRM, "casiatao/LRM", _MIT_CARD, _LRM_SCALE, files=files, companion=companion, options=options)


REWARDS: dict[str, RewardEntry] = {
    "dinalrm": RewardEntry(None, None, "as its model card says", "the checkpoint's own; reads noised latents"),
    "pickscore": RewardEntry(
        _CLIP, "yuvalkirstain/PickScore_v1", _MIT_CARD, "100 cos, about 18 to 24", companion=_PROCESSOR
    ),
    "clipscore": RewardEntry(_CLIP, "openai/clip-vit-large-patch14", _MIT_CARD, "100 cos, about 15 to 35"),
    "hpsv2": RewardEntry(
        _HPSV2, "xswu/HPSv2", _APACHE, "cos, about 0.23 to 0.30", options={"file": "HPS_v2_compressed.pt"},
        files=("HPS_v2_compressed.pt",), companion=_PROCESSOR,
    ),
    "hpsv2.1": RewardEntry(
        _HPSV2, "xswu/HPSv2", _APACHE, "cos, about 0.14 to 0.33; not comparable with hpsv2's",
        files=("HPS_v2.1_compressed.pt",), companion=_PROCESSOR,
    ),
    "hpsv3": RewardEntry(
        f"{_PIXEL}.hpsv3:HPSv3Reward", "MizzenAI/HPSv3", _MIT, "mean of a Gaussian, about -2 to 12", extra="quant",
        files=("HPSv3.safetensors",),
        companion=Companion("base", "Qwen/Qwen2-VL-7B-Instruct", _CONFIG, ("config.json",)),
    ),
    "hpsv3pp": RewardEntry(
        f"{_PIXEL}.hpsv3pp:HPSv3PlusPlusReward", "Junjun2333/HPSv3-PlusPlus", "none stated / Apache-2.0",
        "HPSv3++: mean of a Gaussian, on another scale than hpsv3's", extra="quant", files=("hpsv3++.pth",),
        companion=Companion("base", "Qwen/Qwen3-VL-8B-Instruct", _CONFIG, ("tokenizer_config.json",)),
    ),
    "imagereward": RewardEntry(
        f"{_PIXEL}.imagereward:ImageRewardReward", "THUDM/ImageReward", _APACHE, "standardised, about -2 to 2",
        files=("ImageReward.pt", "med_config.json"),
        companion=Companion("tokenizer", BERT, (TOKENIZER,), ("tokenizer.json", "vocab.txt")),
    ),
    "mps": RewardEntry(
        f"{_PIXEL}.mps:MPSReward", None, _MIT, "100 cos, about 5 to 15", files=("MPS_overall_checkpoint.pth",),
        companion=_PROCESSOR,
        how="mps=/path/to/MPS_overall_checkpoint.pth, the file that https://github.com/Kwai-Kolors/MPS links to",
    ),
    "lrm-sd15": _lrm("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    "lrm-sdxl": _lrm("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
    "unifiedreward": RewardEntry(
        f"{_PIXEL}.unifiedreward:UnifiedReward", "http://127.0.0.1:8080/v1",
        "as the model card of CodeGoat24/UnifiedReward-7b says", "1 to 5, read from generated text",
        differentiable=False, served=True,
        how="start a vLLM or SGLang server that serves it; unifiedreward=http://host:port/v1#MODEL names both",
    ),
    "remote": RewardEntry(
        None, None, "that of the served reward", "that of the served reward", differentiable=False, served=True,
        how="start python -m dinalrm_align.serve; http://host:port#NAME names the server and, after #, its reward",
    ),
    "pixel": RewardEntry(
        None, None, "this project's, in the embedded world; PickScore's, with SD3.5", "exp(logit_scale) cos"
    ),
    "oracle": RewardEntry(
        None, None, "this project's", "0 to 3, computed from the pixels of the embedded world", differentiable=False
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """One reward of a weighted sum: name (in `REWARDS`, or "module:function"), weight in the sum, and model source."""

    name: str
    weight: float = 1.0
    source: str | None = None

    @property
    def label(self) -> str:
        """The name of the reward, followed by "=source" if a source is set."""
        return self.name if self.source is None else f"{self.name}={self.source}"

    @property
    def differentiable(self) -> bool:
        """Whether the reward is differentiable. True for Python callables, which are checked at each call instead."""
        return self.name not in REWARDS or REWARDS[self.name].differentiable


_ODD = "".join(rf"{re.escape(name)}(?![\w.])|" for name in REWARDS if not re.fullmatch(r"[\w.]+", name))
"""Names with other characters than letters, digits and dots, as a part of a regular expression."""
_TERM = re.compile(
    rf"""\s*(?:(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?
    (?P<name>{_ODD}[A-Za-z_][\w.]*(?::[A-Za-z_][\w.]*)?)
    (?:=(?:(?P<quote>['"])(?P<quoted>.*?)(?P=quote)|(?P<bare>.*?)(?=\s+[+-]\s|\s*$)))?
    \s*(?P<sign>[+-])?""",
    re.VERBOSE | re.DOTALL,
)
_ADDRESS = re.compile(r"(?:^|(?<=[\s*+-]))(?=https?://)")  # where remote= is left out
_SYNTAX = r"[=*:]|\s[+-]\s"  # what the path of a latent reward does not contain, unless it is quoted
_HOW = "as in 'dinalrm + 0.2*pickscore'"


def parse_reward(text: str) -> tuple[Term, ...]:
    """Parse the text of `--reward` into one or more weighted rewards, as in "dinalrm + 0.2*pickscore".

    Raises ValueError for a syntax error, an unknown name, a weight that is 0 or not finite, or a repeated reward.
    """
    if not isinstance(text, str):
        raise TypeError(f"reward: got {type(text).__name__} {text!r:.60}; expected text, {_HOW}")
    text = text.strip()
    if not text or "\0" in text:
        raise ValueError(f"reward: got {text!r:.60}; {_known()}")
    if text not in REWARDS and not re.search(_SYNTAX, text) and ("/" in text or Path(text).is_dir()):
        return (Term("dinalrm", source=text),)
    text = _ADDRESS.sub("remote=", text)
    terms, at, sign = [], 0, "+"
    while sign:
        match = _TERM.match(text, at)
        if match is None:
            raise ValueError(
                f"reward {text!r}: got {text[at:].lstrip()[:40]!r}; expected the name of a reward, {_HOW}. {_known()}"
            )
        terms.append(_term(text, match, sign))
        at, sign = match.end(), match["sign"]
    if at < len(text):
        got = f"got {text[at:][:40]!r} after {terms[-1].label!r}"
        raise ValueError(f"reward {text!r}: {got}; expected + or -, {_HOW}")
    labels = [term.label for term in terms]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"reward {text!r}: {twice[0]!r} stands twice; add up its weights")
    return tuple(terms)


def _term(text: str, match: re.Match[str], sign: str) -> Term:
    """Convert a match of the regex `_TERM` to a `Term`. Raises ValueError if its name, weight or source is invalid."""
    name, bare = match["name"], match["bare"] and match["bare"].strip()
    source = match["quoted"] if match["quote"] else bare
    if ":" not in name and name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}{did_you_mean(name, REWARDS) or '.'} {_known()}")
    weight = float(f"{sign}1") * float(match["weight"] or 1)
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"reward {text!r}: got the weight {match['weight']}; expected a finite one other than 0")
    if source == "" or (bare and bare[0] in "'\""):
        got = "a quote that is not closed" if source else "nothing"
        raise ValueError(f"reward {text!r}: got {got} after {name}=; expected a folder, a file or a hub id")
    if source is not None and (":" in name or name == "oracle"):
        raise ValueError(f"reward {text!r}: {name} has no weights to be had from {source!r}; leave that out")
    return Term(name, weight, source)


def _known() -> str:
    return (
        f"Known: {', '.join(REWARDS)}; NAME=SOURCE for weights from elsewhere; a folder or hub id of a latent reward; "
        "module:function; http://host:port of a server; and sums of these with weights"
    )


class RewardText(PathText):
    """Type of a setting that holds the text of a reward. Paths of weights, also those in sums, become absolute."""

    @classmethod
    def absolute(cls, text: str) -> str:
        try:
            terms = parse_reward(text)
        except (ValueError, TypeError):  # `check_reward` refuses it
            return text
        if terms[0].source != text.strip():
            return _TERM.sub(_with_absolute_source, text)
        path = Source.absolute(terms[0].source)
        return f'dinalrm="{path}"' if path != text and re.search(_SYNTAX, path) else path


def _with_absolute_source(match: re.Match[str]) -> str:
    """Return the matched text of `_TERM`, with the path of its weights made absolute."""
    group = "quoted" if match["quote"] else "bare"
    path = match[group] and Source.absolute(match[group].strip())
    if not path or path == match[group].strip():
        return match[0]
    quote = "'" if '"' in path else '"'
    head, tail = match[0][: match.end("name") - match.start()], match.string[match.end(group) : match.end()]
    return f"{head}={quote}{path}{quote}{tail.removeprefix(match['quote'] or '')}"


def check_reward(text: str, *, gradient: bool = False) -> tuple[Term, ...]:
    """Return `parse_reward(text)`. gradient: whether to raise ValueError if a reward in `text` has no gradient."""
    terms = parse_reward(text)
    if gradient and (without := [term.label for term in terms if not term.differentiable]):
        raise ValueError(
            f"reward {text!r}: {', '.join(without)} has no gradient, and this method needs one; take it for a method "
            "that ranks or compares scores (GRPO, DPO) or for evaluation"
        )
    return terms


def source_of(term: Term, spec: ModelSpec) -> str | None:
    """Return where the weights of a reward come from, a folder, file, hub id or address; None if nothing names them.

    The default is the model's own reward, a folder beside the pipeline (`ModelSpec.find`), or the reward's hub id.
    """
    own, entry = {"dinalrm": spec.reward, "pixel": spec.pixel}, REWARDS.get(term.name)
    if term.source or entry is None or term.name in own:
        return term.source or own.get(term.name)
    if entry.source == MODELS["sd35"].pixel and spec.kind == "sd35":
        return spec.pixel
    return entry.source if entry.served else spec.find(entry.source, term.name)


def companion_of(term: Term, spec: ModelSpec) -> str | None:
    """Return the folder or hub id of a reward's `Companion`; None if the weights' folder has all that is needed."""
    if term.name == "pixel":
        return None if term.source else spec.pixel_processor
    companion = REWARDS[term.name].companion
    if companion is None:
        return None
    path = Path(source_of(term, spec) or "")
    folder = path.parent if path.is_file() else path
    if any((folder / file).is_file() for file in companion.beside):
        return str(folder)
    return spec.find(companion.source, *filter(None, [companion.name]))


def reward_sources(reward: object, spec: ModelSpec) -> frozenset[object]:
    """Return a set with one value per part of a reward. Two rewards that have a value in common share these weights.

    reward: an expression as for --reward, or a callable. spec: the base model, whose rewards some names stand for.
    """
    if not isinstance(reward, str):
        return frozenset([(reward, "")])
    found = set()
    for term in parse_reward(reward):
        entry = REWARDS.get(term.name)
        source = spec.gold if term.name == "oracle" else source_of(term, spec) or term.name
        file = entry.options.get("file", entry.options.get("family", "")) if entry else ""
        local = isinstance(source, str) and Path(source).exists()
        found.add((str(Path(source).resolve()) if local else source, file))
    return frozenset(found)


def gold_rewards(given: Any, default: Any) -> dict[str, Any]:
    """Return the gold rewards of a run by the name of their metric: "gold" for the first, "gold/NAME" for the others.

    given: a reward, a list of rewards, or None for the reward `default`. NAME is the reward's `file_name`. Raises
    ValueError for an empty list, for two rewards with the same NAME, and for a reward that `parse_reward` refuses.
    """
    rewards = list(given) if isinstance(given, list | tuple) else [default if given is None else given]
    if not rewards:
        raise ValueError("gold: got an empty list; expected at least one reward, or null for the model's own")
    names = [file_name(reward) if isinstance(reward, str) else "gold" for reward in rewards]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"gold: got two rewards named {twice[0]!r}; expected rewards with different names")
    return {"gold" if index == 0 else f"gold/{name}": rewards[index] for index, name in enumerate(names)}


def file_name(text: str) -> str:
    """Turn the text of `--reward` into a valid file or folder name, such as "dinalrm+0.2pickscore"."""
    terms = parse_reward(text)
    if len(terms) == 1 and terms[0].source is not None:
        return re.sub(r"[^\w.-]+", "_", Path(terms[0].source).name)
    weights = ["" if term.weight == 1 else f"{term.weight:g}" for term in terms]
    return "+".join(weight + re.sub(r"[^\w.-]+", "_", term.name) for weight, term in zip(weights, terms, strict=True))
