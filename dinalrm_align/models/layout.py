"""The files of a pipeline folder: which are missing, and how diffusers is to find the weights. Imports no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dinalrm_align.train.files import read_json

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
T5 = ("text_encoder_3", "tokenizer_3")
TEXT_PARTS = (*TEXT_ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3")
VARIANTS = (None, "fp16", "bf16")
WITHOUT_T5 = 'to do without T5, write "text_encoder_3": [null, null] and the same for tokenizer_3 in model_index.json'


def missing_files(folder: Path, parts: Sequence[str] = ()) -> list[str]:
    """Return relative paths of missing files in a StableDiffusion3Pipeline folder; broken links count as missing.

    parts: subfolders to look at; default: all that the index names.
    """
    index = folder / "model_index.json"
    if not index.exists():
        return ["model_index.json"]
    named = [part for part, entry in read_json(index).items() if isinstance(entry, list) and entry[:1] != [None]]
    return [f"{part}/{file}" for part in named if part in (parts or named) for file in _missing_in_part(folder / part)]


def check_files(folder: Path, parts: Sequence[str] = ()) -> None:
    """Raise ValueError if a StableDiffusion3Pipeline folder lacks files; the message names them. See missing_files."""
    missing = missing_files(folder, parts)
    lacks = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
    if missing:
        advice = "save one with pipeline.save_pretrained(folder)"
        if any(file.startswith(T5) for file in missing):
            advice += f"; {WITHOUT_T5}"
        raise ValueError(f"{folder} is not a complete StableDiffusion3Pipeline folder: it lacks {lacks}; {advice}")


def without_t5(index: Path) -> dict[str, None]:
    """Return {name: None} for T5 and its tokenizer if a model_index.json lists none, as from_pretrained needs it.

    Raises ValueError if it lists none of another text encoder or tokenizer, or T5 without its tokenizer.
    """
    entries = dict.fromkeys(TEXT_PARTS, [None, None]) | read_json(index)
    for name in TEXT_PARTS:
        if not isinstance(entries[name], list):
            raise ValueError(
                f"{index}: {name}: got {json.dumps(entries[name]):.40}; expected [null, null], as diffusers writes it"
            )
    absent = [name for name in TEXT_PARTS if entries[name][:1] == [None]]
    if others := [name for name in absent if name not in T5] or absent * (absent == ["tokenizer_3"]):
        lacks = f"got a pipeline without {', '.join(others)}"
        raise ValueError(f"{index}: {lacks}; expected all encoders and tokenizers, or all but T5's: save a whole one")
    return dict.fromkeys(absent)


def weight_options(source: str | Path, *parts: str) -> dict[str, Any]:
    """Return the options `variant` and `use_safetensors` of from_pretrained for subfolders of a pipeline folder.

    Weights are safetensors files, or else those of the variants fp16 or bf16, or else .bin files, which are loaded
    without running code. For a hub id, only safetensors without a variant.
    """
    found = [weights for part in parts if (weights := find_weights(Path(source) / part, _stem(part)))]
    safe, variants = {suffix == "safetensors" for suffix, _, _ in found}, {variant for _, variant, _ in found} - {None}
    options: dict[str, Any] = {"use_safetensors": None if len(safe) > 1 else safe != {False}}
    return options | ({"variant": variants.pop()} if variants else {})


def find_weights(folder: Path, stem: str) -> tuple[str, str | None, list[str]] | None:
    """Return suffix, variant and names of the weight files in `folder`; None if there are none.

    stem: how names begin, model or diffusion_pytorch_model.
    """
    for suffix in ("safetensors", "bin"):
        begin = "pytorch_model" if (stem, suffix) == ("model", "bin") else stem
        for variant in VARIANTS:
            dotted = f".{variant}" if variant else ""
            index = folder / f"{begin}.{suffix}.index{dotted}.json"
            if index.exists():
                files = read_json(index).get("weight_map")
                if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                    raise ValueError(f"{index}: weight_map: got {files!r:.80}; expected a file for every tensor")
                return suffix, variant, sorted(set(files.values()))
            if (folder / (name := f"{begin}{dotted}.{suffix}")).exists():
                return suffix, variant, [name]
    return None


def missing_weights(folder: Path, stem: str) -> list[str]:
    """Return the missing files of one model: config.json and the weights. stem: as in `find_weights`."""
    _, _, weights = find_weights(folder, stem) or (None, None, [f"{stem}.safetensors"])
    return [file for file in ("config.json", *weights) if not (folder / file).exists()]


def _stem(part: str) -> str:
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def _missing_in_part(folder: Path) -> list[str]:
    if folder.name.startswith("tokenizer"):
        vocabularies = ("tokenizer.json", "vocab.json", "spiece.model")
        return [] if any((folder / file).exists() for file in vocabularies) else ["tokenizer.json"]
    if folder.name == "scheduler":
        return [] if (folder / "scheduler_config.json").exists() else ["scheduler_config.json"]
    return missing_weights(folder, _stem(folder.name))
