"""What each `--reward` name stands for, and how a sum of them is written. Torch-free.

dinalrm                         a name of `REWARDS`
pickscore=/data/PickScore_v1    its weights from another folder, file or hub id (quote what holds " + " or " - ")
dinalrm + 0.2*pickscore         a weighted sum
my_package.my_module:my_reward  a Python callable
owner/name, or a folder         a latent reward, short for dinalrm=...
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinalrm_align.train.settings import did_you_mean

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Tokenizer and preprocessor of every reward that was trained from this CLIP."""


@dataclass(frozen=True)
class RewardEntry:
    """One reward that has a name.

    Args:
        kind: its class, as "module:class", with `from_pretrained(source, *, vae, device, dtype, ...)`; None: what the
            model at hand calls by that name (`models.ModelSpec`).
        source: its weights when the user names no others, a hub id; None: they must be named, as `how` says.
        licence: of the code / of the weights, as their owners state it.
        scale: what its scores are, and where they lie.
        differentiable: whether gradients reach the latents.
        served: its source is the address of a server, not weights to load.
        extra: of this package, with the optional packages that it can use.
        options: arguments of `from_pretrained`.
        how: how to get its weights, where that takes more than the source.
    """

    kind: str | None
    source: str | None
    licence: str
    scale: str
    differentiable: bool = True
    served: bool = False
    extra: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    how: str = ""


REWARDS: dict[str, RewardEntry] = {
    "dinalrm": RewardEntry(
        kind=None,
        source=None,
        licence="as its model card says",
        scale="the checkpoint's own; reads noised latents",
    ),
    "pickscore": RewardEntry(
        kind="dinalrm_align.reward.pixel.clip:ClipReward",
        source="yuvalkirstain/PickScore_v1",
        licence="MIT / as its model card says",
        scale="100 cos, about 18 to 24",
        options={"processor": CLIP_H},
    ),
    "clipscore": RewardEntry(
        kind="dinalrm_align.reward.pixel.clip:ClipReward",
        source="openai/clip-vit-large-patch14",
        licence="MIT / as its model card says",
        scale="100 cos, about 15 to 35",
    ),
    "hpsv2": RewardEntry(
        kind="dinalrm_align.reward.pixel.hpsv2:HPSv2Reward",
        source="xswu/HPSv2",
        licence="Apache-2.0 / Apache-2.0",
        scale="cos, about 0.23 to 0.30",
        options={"file": "HPS_v2_compressed.pt", "processor": CLIP_H},
    ),
    "hpsv2.1": RewardEntry(
        kind="dinalrm_align.reward.pixel.hpsv2:HPSv2Reward",
        source="xswu/HPSv2",
        licence="Apache-2.0 / Apache-2.0",
        scale="cos, about 0.14 to 0.33; not comparable with hpsv2's",
        options={"file": "HPS_v2.1_compressed.pt", "processor": CLIP_H},
    ),
    "hpsv3": RewardEntry(
        kind="dinalrm_align.reward.pixel.hpsv3:HPSv3Reward",
        source="MizzenAI/HPSv3",
        licence="MIT / MIT",
        scale="mean of a Gaussian, about -2 to 12",
        extra="quant",
    ),
    "imagereward": RewardEntry(
        kind="dinalrm_align.reward.pixel.imagereward:ImageRewardReward",
        source="THUDM/ImageReward",
        licence="Apache-2.0 / Apache-2.0",
        scale="standardised, about -2 to 2",
    ),
    "mps": RewardEntry(
        kind="dinalrm_align.reward.pixel.mps:MPSReward",
        source=None,
        licence="MIT / MIT",
        scale="100 cos, about 5 to 15",
        options={"processor": CLIP_H},
        how="mps=/path/to/MPS_overall_checkpoint.pth, the file that https://github.com/Kwai-Kolors/MPS links to",
    ),
    "unifiedreward": RewardEntry(
        kind="dinalrm_align.reward.pixel.unifiedreward:UnifiedReward",
        source="http://127.0.0.1:8080/v1",
        licence="as the model card of CodeGoat24/UnifiedReward-7b says",
        scale="1 to 5, read from generated text",
        differentiable=False,
        served=True,
        how="start a vLLM or SGLang server that serves it; unifiedreward=http://host:port/v1 names another address",
    ),
    "pixel": RewardEntry(
        kind=None,
        source=None,
        licence="this project's, in the embedded world; PickScore's, with SD3.5",
        scale="exp(logit_scale) cos",
    ),
    "oracle": RewardEntry(
        kind=None,
        source=None,
        licence="this project's",
        scale="0 to 3, computed from the pixels of the embedded world",
        differentiable=False,
    ),
}
"""Every reward that has a name, the ones of the model at hand (dinalrm, pixel, oracle) included."""


@dataclass(frozen=True)
class Term:
    """One part of a reward: a name of `REWARDS` or a dotted path "module:function", its weight and its source."""

    name: str
    weight: float = 1.0
    source: str | None = None

    @property
    def label(self) -> str:
        """How the part is called beside others."""
        return self.name if self.source is None else f"{self.name}={self.source}"

    @property
    def differentiable(self) -> bool:
        """False when it is known to have no gradient; a callable is found out about when it is called."""
        return self.name not in REWARDS or REWARDS[self.name].differentiable


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_QUOTED = re.compile(r"'([^']*)'|\"([^\"]*)\"")
_BARE = re.compile(r".*?(?=\s+[+-]\s|\s*$)", re.DOTALL)
_SPACE = re.compile(r"\s*")


def parse_reward(text: str) -> tuple[Term, ...]:
    """The parts of a reward as it is written (see above), one or more.

    TypeError unless it is text; ValueError for what is not written like that, an unknown name (with the known ones), a
    weight that is 0 or not finite, and a part that stands twice.
    """
    if not isinstance(text, str):
        raise TypeError(f"reward: got {type(text).__name__} {text!r:.60}; expected text, such as {_EXAMPLE!r}")
    text = text.strip()
    if not text or "\0" in text:
        raise ValueError(f"reward: got {text!r:.60}; {_known()}")
    if text not in REWARDS and not re.search(r"[=*:]|\s[+-]\s", text) and ("/" in text or Path(text).is_dir()):
        return (Term("dinalrm", source=text),)
    terms, at, sign = [], 0, 1.0
    while True:
        term, at = _term(text, at, sign)
        terms.append(term)
        if at == len(text):
            break
        if text[at] not in "+-":
            raise ValueError(f"reward {text!r}: got {text[at:][:40]!r} after {term.label!r}; expected + or -, {_HOW}")
        sign, at = (-1.0 if text[at] == "-" else 1.0), at + 1
    labels = [term.label for term in terms]
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise ValueError(f"reward {text!r}: {twice[0]!r} stands twice; add up its weights")
    return tuple(terms)


def check_reward(text: str, *, gradient: bool = False) -> tuple[Term, ...]:
    """`parse_reward`, and with `gradient` ValueError when a part is known to have none."""
    terms = parse_reward(text)
    without = [term.label for term in terms if gradient and not term.differentiable]
    if without:
        raise ValueError(
            f"reward {text!r}: {', '.join(without)} has no gradient, and this method needs one; take it for a method "
            "that ranks or compares scores (GRPO, DPO) or for judging"
        )
    return terms


def file_name(text: str) -> str:
    """A reward as part of the name of a file or folder: "dinalrm+0.2pickscore"."""
    terms = parse_reward(text)
    if len(terms) == 1 and terms[0].source is not None:
        return re.sub(r"[^\w.-]+", "_", Path(terms[0].source).name)
    weights = ["" if term.weight == 1 else f"{term.weight:g}" for term in terms]
    return "+".join(weight + re.sub(r"[^\w.-]+", "_", term.name) for weight, term in zip(weights, terms, strict=True))


def _term(text: str, at: int, sign: float) -> tuple[Term, int]:
    """The part that begins at `at`, and where the text goes on after it and after white space."""
    at = _SPACE.match(text, at).end()
    weight, number = sign, _NUMBER.match(text, at)
    if number:
        at = _SPACE.match(text, number.end()).end()
        if text[at : at + 1] != "*":
            raise ValueError(f"reward {text!r}: got {text[at:][:40]!r} after {number[0]}; expected *, {_HOW}")
        weight, at = sign * float(number[0]), _SPACE.match(text, at + 1).end()
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"reward {text!r}: got the weight {number[0]}; expected a finite one other than 0")
    name = _DOTTED.match(text, at) or _NAME.match(text, at)
    if name is None:
        raise ValueError(f"reward {text!r}: got {text[at:][:40]!r}; expected the name of a reward, {_HOW}. {_known()}")
    at, source = name.end(), None
    if ":" not in name[0] and name[0] not in REWARDS:
        raise ValueError(f"unknown reward {name[0]!r}{did_you_mean(name[0], REWARDS) or '.'} {_known()}")
    if text[at : at + 1] == "=":
        quoted = _QUOTED.match(text, at + 1)
        found = quoted or _BARE.match(text, at + 1)
        source, at = (quoted[1] or quoted[2] or "") if quoted else found[0].strip(), found.end()
        if not source or (source[0] in "'\"" and not quoted):
            got = "a quote that is not closed" if source else "nothing"
            raise ValueError(f"reward {text!r}: got {got} after {name[0]}=; expected a folder, a file or a hub id")
        if ":" in name[0] or name[0] == "oracle":
            raise ValueError(f"reward {text!r}: {name[0]} has no weights to be had from {source!r}; leave that out")
    return Term(name[0], weight, source), _SPACE.match(text, at).end()


_EXAMPLE = "dinalrm + 0.2*pickscore"
_HOW = f"as in {_EXAMPLE!r}"


def _known() -> str:
    return (
        f"Known: {', '.join(REWARDS)}; NAME=SOURCE for weights from elsewhere; a folder or hub id of a latent reward; "
        "module:function; and sums of these with weights"
    )
