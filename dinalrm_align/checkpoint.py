"""Checkpoints of a latent reward: ours, and the layout DiNa-LRM was released in. Both are read and written, strictly.

Ours: `config.json` (RewardConfig) and `model.safetensors` (`backbone.*`: the LoRA, or the whole trunk under full
tuning; `head.*`). Released: `config.json`, `checkpoint/backbone_lora/` (a peft adapter) and `checkpoint/rm_head.pt`; no
adapter with a frozen backbone; `checkpoint/full_model.pt` alone after full training. `.pt` files are read with
weights_only=True. Every file is written under a temporary name and renamed.
"""

import json
import os
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinalrm_align.backbones.sd3 import LORA_TARGETS, TEXT_SIDE
from dinalrm_align.config.reward import HeadConfig, LoraConfig, RewardConfig

WEIGHTS = "model.safetensors"
PEFT_PREFIX = "base_model.model."
FORMATS = ("dinalrm", "released")
OWN_KEYS = (
    "sigma", "image_sigma", "ensemble", "snap_sigma", "score_scale", "score_bias", "text_length", "vae_scaling_factor",
    "vae_shift_factor", "dtype",
)  # fmt: skip
"""What the released config.json has no place for; written to a section of its own, `dinalrm_align`."""
SQUASH = ("eta3", "eta4")
"""The released code keeps these two outside the head, and outside `rm_head.pt`."""
RELEASED_DEFAULTS = dict(sigma=0.4, image_sigma=0.1, snap_sigma=True, score_scale=0.1, score_bias=1.0, text_length=256)
"""As in the released README: score = (raw + 10) / 10, sigma 0.4 for sampled latents and 0.1 for picture files."""


@dataclass
class Checkpoint:
    """A checkpoint in memory. tensors: `backbone.*` and `head.*`, on the CPU; where: the files they came from."""

    config: RewardConfig
    tensors: dict[str, Tensor]
    folder: Path
    where: str


def fetch(source: str | Path, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """The folder of a checkpoint: `source` itself when it is a folder, else a snapshot of that hub repository."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"no reward at {str(source)!r}: neither an existing folder nor a hub id, owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["config.json", WEIGHTS, "checkpoint/*"]
    return Path(
        snapshot_download(source, revision=revision, local_files_only=local_files_only, allow_patterns=patterns)
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read either layout from a folder. Raises ValueError or FileNotFoundError: the file, and what is wrong in it."""
    values = _read_json(folder / "config.json")
    try:
        if "model" in values:
            return _read_released(folder, values)
        config, path = RewardConfig.from_dict(values), folder / WEIGHTS
        return Checkpoint(config, _read_tensors(path), folder, str(path))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'}: not a reward config ({type(error).__name__}: {error})") from error


def load_tensors(target: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy `tensors` into those of the same names in `target`; ValueError unless names and shapes agree exactly."""
    missing = [name for name in target if name not in tensors]
    unexpected = [name for name in tensors if name not in target]
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(target[name].shape)}"
        for name in target
        if name in tensors and tensors[name].shape != target[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(
            f"{where}: the tensors do not fit this config and base model: {'; '.join(problems)}. Check that "
            "config.json and the base model are the ones that the weights were trained with"
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(tensors[name])


def save_checkpoint(
    directory: str | Path, config: RewardConfig, tensors: Mapping[str, Tensor], *, format: str = "dinalrm"
) -> None:
    """Write `tensors` (`RewardModel.tuned_tensors()`) with `config`; format: dinalrm (ours) or released."""
    if format not in FORMATS:
        raise ValueError(f"checkpoint format: got {format!r}; known: {', '.join(FORMATS)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if format == "dinalrm":
        _write(directory / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        _write_json(directory / "config.json", config.to_dict())
    else:
        _write_released(directory, config, tensors)


def base_location(base_model_id: str, folder: Path) -> str:
    """Where the base model of a checkpoint in `folder` is: ids that start with ./ or ../ are relative to it."""
    relative = base_model_id.startswith(("./", "../"))
    return os.path.normpath(folder / base_model_id) if relative else base_model_id


def relocated(base_model_id: str, folder: Path, new_folder: Path) -> str:
    """The id that a copy of the checkpoint in `new_folder` must carry to name the same base model."""
    if not base_model_id.startswith(("./", "../")):
        return base_model_id
    path = os.path.relpath(base_location(base_model_id, folder), new_folder)
    return path if path.startswith("..") else f"./{path}"


# ----------------------------------------------------------------------------------------------- the released layout


def _read_released(folder: Path, values: dict[str, Any]) -> Checkpoint:
    model = values["model"]
    head = dict(model["reward_head"])
    if head.pop("out_dim", 1) != 1:
        raise ValueError(f"{folder / 'config.json'}: model.reward_head.out_dim must be 1, a scalar reward")
    own = dict(values.get("dinalrm_align", {}))
    squash = {name: torch.tensor(float(own.pop(name))) for name in SQUASH if name in own}
    tuning = "none" if model["freeze_backbone"] else "lora" if model["use_lora"] else "full"
    checkpoint = folder / "checkpoint"
    lora, backbone, where = LoraConfig(), {}, str(checkpoint / "rm_head.pt")
    if tuning == "full":
        where = str(checkpoint / "full_model.pt")
        backbone, head_tensors = _split_full_model(_read_pt(checkpoint / "full_model.pt"), where)
    else:
        head_tensors = _read_pt(checkpoint / "rm_head.pt")
    if tuning == "lora":
        lora, backbone = _read_adapter(checkpoint / "backbone_lora")
        where = f"{checkpoint / 'backbone_lora'} and {where}"
    if model.get("use_logistic", False):
        head_tensors = {"eta3": torch.tensor(0.0), "eta4": torch.tensor(0.15)} | squash | head_tensors
    config = RewardConfig(
        base_model_id=model["backbone_model_id"],
        num_layers=model["num_transformer_layers"],
        visual_taps=tuple(sorted(model["visual_head_idx"])),
        text_taps=tuple(sorted(model["text_head_idx"])),
        tuning=tuning,
        lora=lora,
        head=HeadConfig(
            width=head.get("width", -1),
            use_proj_in=head.get("use_proj_in", False),
            num_queries=head.get("num_queries", 4),
            num_attn_heads=head.get("num_attn_heads", 8),
            dropout=head.get("dropout", 0.0),
            use_logistic=model.get("use_logistic", False),
        ),
        add_noise=values.get("training", {}).get("add_noise", True),
        **(RELEASED_DEFAULTS | own),
    )
    tensors = {f"backbone.{k}": v for k, v in backbone.items()} | {f"head.{k}": v for k, v in head_tensors.items()}
    return Checkpoint(config, tensors, folder, where)


def _split_full_model(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    backbone = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    head = {k.removeprefix("reward_head."): v for k, v in tensors.items() if k.startswith(("reward_head.", *SQUASH))}
    strange = [name for name in tensors if not name.startswith(("backbone.", "reward_head.", *SQUASH))]
    if strange:
        raise ValueError(f"{where}: unexpected tensors {', '.join(strange[:3])}; expected backbone.* and reward_head.*")
    return backbone, head


def _read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    values = _read_json(folder / "adapter_config.json")
    unsupported = [
        key
        for key in ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
        if values.get(key)
    ]
    if values.get("peft_type", "LORA") != "LORA" or unsupported or values.get("bias", "none") != "none":
        raise ValueError(
            f"{folder / 'adapter_config.json'}: expected a plain LoRA of one rank; got peft_type "
            f"{values.get('peft_type')}, bias {values.get('bias')}, and {', '.join(unsupported) or 'nothing else'}"
        )
    init = "gaussian" if values.get("init_lora_weights") == "gaussian" else "kaiming"
    tensors = _read_tensors(folder / "adapter_model.safetensors")
    return (
        LoraConfig(rank=values["r"], alpha=values["lora_alpha"], init=init),
        {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()},
    )


def _write_released(directory: Path, config: RewardConfig, tensors: dict[str, Tensor]) -> None:
    backbone = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    head = {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
    squash = {name: head.pop(name) for name in SQUASH if name in head}
    init: str | bool = True if config.lora.init == "kaiming" else config.lora.init
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    if config.tuning == "full":
        whole = {f"backbone.{k}": v for k, v in backbone.items()} | {f"reward_head.{k}": v for k, v in head.items()}
        _write(checkpoint / "full_model.pt", lambda path: torch.save(whole | squash, path))
    else:
        _write(checkpoint / "rm_head.pt", lambda path: torch.save(head, path))
    if config.tuning == "lora":
        last = f"transformer_blocks.{config.num_layers - 1}.attn."
        adapter = {
            "peft_type": "LORA",
            "r": config.lora.rank,
            "lora_alpha": config.lora.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "init_lora_weights": init,
            "target_modules": list(LORA_TARGETS),
            "exclude_modules": None if config.num_layers in config.text_taps else [last + name for name in TEXT_SIDE],
            "inference_mode": True,
        }
        folder = checkpoint / "backbone_lora"
        folder.mkdir(exist_ok=True)
        prefixed = {PEFT_PREFIX + name: tensor for name, tensor in backbone.items()}
        _write(folder / "adapter_model.safetensors", lambda path: save_file(prefixed, path, metadata={"format": "pt"}))
        _write_json(folder / "adapter_config.json", adapter)
    own = {key: value for key, value in config.to_dict().items() if key in OWN_KEYS}
    values = {
        "model": {
            "model_type": "thurstone",
            "backbone_model_id": config.base_model_id,
            "num_transformer_layers": config.num_layers,
            "freeze_backbone": config.tuning == "none",
            "use_lora": config.tuning == "lora",
            "use_text_features": True,
            "lora_config": {"r": config.lora.rank, "lora_alpha": config.lora.alpha, "init_lora_weights": init},
            "use_logistic": config.head.use_logistic,
            "visual_head_idx": list(config.visual_taps),
            "text_head_idx": list(config.text_taps),
            "use_t_embed": True,
            "reward_head": {
                "use_proj_in": config.head.use_proj_in,
                "width": config.head.width,
                "out_dim": 1,
                "num_queries": config.head.num_queries,
                "num_attn_heads": config.head.num_attn_heads,
                "dropout": config.head.dropout,
            },
        },
        "training": {"add_noise": config.add_noise},
        "dinalrm_align": own | {name: value.item() for name, value in squash.items()},
    }
    _write_json(directory / "config.json", values)


# ------------------------------------------------------------------------------------------------------------- files


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: expected a latent reward in our layout or in DiNa-LRM's released one")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: the checkpoint's config.json says that it must be there")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); fetch or write it again") from error


def _read_pt(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: the checkpoint's config.json says that it must be there")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path}: not a readable file of tensors ({reason}). Only tensors are read, a file that needs code to run "
            "is refused: fetch it again, or have its owner save a plain state dict"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: expected a state dict of tensors")
    return tensors


def _write(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    _write(path, lambda to: to.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))
