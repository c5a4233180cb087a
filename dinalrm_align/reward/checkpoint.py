"""Read and write checkpoints of a latent reward in two layouts. Every file is written atomically.

This package's layout, `dinalrm`:
    config.json                 RewardConfig
    model.safetensors           head.* (the reward head) and backbone.* (the LoRA, or all weights with full tuning).
                                The file's metadata hold the SHA-256 of the tensors, which is verified on reading.

The layout of DiNa-LRM's public release, `released`:
    config.json
    checkpoint/rm_head.pt       the reward head
    checkpoint/backbone_lora/   a peft adapter; absent for a frozen backbone
    checkpoint/full_model.pt    only with full tuning: backbone and head, in place of rm_head.pt and backbone_lora/
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from safetensors.torch import save
from torch import Tensor

from dinalrm_align.models.weights import HubOptions, fetch, read_tensors
from dinalrm_align.reward.backbones.sd3 import LORA_TARGETS, TEXT_SIDE
from dinalrm_align.reward.config import HeadConfig, LoraConfig, RewardConfig
from dinalrm_align.train.checkpoints import serialised
from dinalrm_align.train.digest import digest
from dinalrm_align.train.files import HUB_ID, make_folder, read_json, write_atomically

WEIGHTS = "model.safetensors"
PEFT_PREFIX = "base_model.model."
FORMATS = ("dinalrm", "released")
OWN_KEYS = (
    "sigma", "image_sigma", "ensemble", "snap_sigma", "score_scale", "score_bias", "text_length", "vae_scaling_factor",
    "vae_shift_factor", "dtype",
)  # fmt: skip
"""RewardConfig fields that the released config.json lacks. They are written to its section `dinalrm_align`."""
SQUASH = ("eta3", "eta4")  # head parameters that released checkpoints do not store in rm_head.pt
RELEASED_HEAD = ("use_proj_in", "width", "num_queries", "num_attn_heads", "dropout")  # with HeadConfig's defaults
RELEASED_DEFAULTS = dict(
    sigma=0.4, image_sigma=0.1, snap_sigma=True, score_scale=0.1, score_bias=1.0, text_length=128, dtype="stored"
)
"""From the released README: score = (raw + 10) / 10; sigma 0.4 for generated latents, 0.1 for image files. Its examples
encode 256 T5 tokens, but training and validation 128 (diffusion_rm/models/sd3_rm.py)."""


@dataclass
class Checkpoint:
    """A reward checkpoint in memory: settings and weights. The weights, `backbone.*` and `head.*`, are on the CPU."""

    config: RewardConfig
    tensors: dict[str, Tensor]
    folder: Path
    where: str  # paths of the weight files, for messages


def read_checkpoint(source: str | Path, *, subfolder: str = "", **hub: Unpack[HubOptions]) -> Checkpoint:
    """Read a checkpoint in either layout from a folder or hub id. Raises ValueError or FileNotFoundError."""
    folder = fetch(source, ("config.json", WEIGHTS, "checkpoint/*"), what="reward", subfolder=subfolder, **hub)
    path = folder / "config.json"
    values = read_json(path, "a latent reward in our layout or in DiNa-LRM's released one")
    try:
        if "model" in values:
            checkpoint = _read_released(folder, values)
        else:
            config, weights = RewardConfig.from_dict(values), folder / WEIGHTS
            checkpoint = Checkpoint(config, read_tensors(weights), folder, str(weights))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise  # names its file already
        raise ValueError(f"{path}: not a reward config ({type(error).__name__}: {error})") from error
    _check_tensors(checkpoint)
    return checkpoint


def write_reward(
    directory: str | Path, config: RewardConfig, tensors: Mapping[str, Tensor], *, format: str = "dinalrm"
) -> None:
    """Write a checkpoint. tensors: result of `RewardModel.tuned_tensors`. format: layout, `dinalrm` or `released`."""
    if format not in FORMATS:
        raise ValueError(f"checkpoint format: got {format!r}; known: {', '.join(FORMATS)}")
    parts = {"head.film": config.head.film, "head.value_gates": config.head.value_gates, "text_taps": config.text_taps}
    lacking = [name for name, present in parts.items() if not present]
    if format == "released" and lacking:
        problem = f"has no place for a reward without {', '.join(lacking)}"
        raise ValueError(f"the released layout {problem}; save as 'dinalrm'")
    directory = Path(directory)
    make_folder(directory)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if format == "dinalrm":
        write_atomically(directory / WEIGHTS, save(tensors, {"format": "pt", "sha256": digest(tensors)}))
        _write_json(directory / "config.json", config.to_dict())
    else:
        _write_released(directory, config, tensors)


def base_location(base_model_id: str, folder: Path, *, trusted: bool = True) -> str:
    """Return the base model's hub id or path. A path that starts with ./ or ../ is resolved from `folder`.

    trusted: whether a local path is allowed. Pass False, and a local path raises ValueError, for a downloaded config.
    """
    relative = base_model_id.startswith(("./", "../"))
    if not trusted and (relative or not HUB_ID.fullmatch(base_model_id)):
        raise ValueError(
            f"{folder / 'config.json'}: base_model_id: got {base_model_id!r}; expected a hub id, owner/name, in a "
            "downloaded checkpoint: copy it to a folder of your own and correct it there"
        )
    return os.path.normpath(folder / base_model_id) if relative else base_model_id


def relocated(base_model_id: str, folder: Path, new_folder: Path) -> str:
    """Return `base_model_id`. A path relative to `folder` is rewritten to be relative to `new_folder`."""
    if not base_model_id.startswith(("./", "../")):
        return base_model_id
    path = os.path.relpath(base_location(base_model_id, folder), new_folder)
    return path if path.startswith("..") else f"./{path}"


def _read_released(folder: Path, values: dict[str, Any]) -> Checkpoint:
    model = values["model"]
    head = dict(model["reward_head"])
    if wrong := [name for name in ("freeze_backbone", "use_lora") if not isinstance(model[name], bool)]:
        raise TypeError(f"model.{wrong[0]}: got {model[wrong[0]]!r:.80}; expected true or false")
    if head.pop("out_dim", 1) != 1:
        raise ValueError(f"{folder / 'config.json'}: model.reward_head.out_dim must be 1, a scalar reward")
    own = dict(values.get("dinalrm_align", {}))
    squash = {name: torch.tensor(float(own.pop(name))) for name in SQUASH if name in own}
    tuning = "none" if model["freeze_backbone"] else "lora" if model["use_lora"] else "full"
    checkpoint = folder / "checkpoint"
    path = checkpoint / ("full_model.pt" if tuning == "full" else "rm_head.pt")
    lora, backbone, where, head_tensors = LoraConfig(), {}, str(path), read_tensors(path)
    if tuning == "full":
        backbone, head_tensors = _split_full_model(head_tensors, where)
    if tuning == "lora":
        lora, backbone = _read_adapter(checkpoint / "backbone_lora")
        where = f"{checkpoint / 'backbone_lora'} and {where}"
    use_logistic = model.get("use_logistic", False)
    if use_logistic:
        head_tensors = {"eta3": torch.tensor(0.0), "eta4": torch.tensor(0.15)} | squash | head_tensors
    released = {name: head[name] for name in RELEASED_HEAD if name in head}
    config = RewardConfig(
        base_model_id=model["backbone_model_id"],
        num_layers=model["num_transformer_layers"],
        visual_taps=tuple(sorted(model["visual_head_idx"])),
        text_taps=tuple(sorted(model["text_head_idx"])),
        tuning=tuning,
        lora=lora,
        head=HeadConfig(**released, use_logistic=use_logistic),
        add_noise=values.get("training", {}).get("add_noise", True),
        **(RELEASED_DEFAULTS | own),
    )
    tensors = {f"backbone.{k}": v for k, v in backbone.items()} | {f"head.{k}": v for k, v in head_tensors.items()}
    return Checkpoint(config, tensors, folder, where)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _split_full_model(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    head = _part(tensors, "reward_head.") | {k: v for k, v in tensors.items() if k.startswith(SQUASH)}
    strange = [name for name in tensors if not name.startswith(("backbone.", "reward_head.", *SQUASH))]
    if strange:
        raise ValueError(f"{where}: unexpected tensors {', '.join(strange[:3])}; expected backbone.* and reward_head.*")
    return _part(tensors, "backbone."), head


def _read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    values = read_json(folder / "adapter_config.json", "the LoRA that config.json asks for")
    options = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
    unsupported = [key for key in options if values.get(key)]
    if values.get("peft_type", "LORA") != "LORA" or unsupported or values.get("bias", "none") != "none":
        got = f"got peft_type {values.get('peft_type')}, bias {values.get('bias')}, {', '.join(unsupported)}"
        raise ValueError(f"{folder / 'adapter_config.json'}: expected a plain LoRA of one rank; {got}")
    init = "gaussian" if values.get("init_lora_weights") == "gaussian" else "kaiming"
    tensors = read_tensors(folder / "adapter_model.safetensors")
    lora = LoraConfig(rank=values["r"], alpha=values["lora_alpha"], init=init)
    return lora, {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def _write_released(directory: Path, config: RewardConfig, tensors: dict[str, Tensor]) -> None:
    backbone, head = _part(tensors, "backbone."), _part(tensors, "head.")
    squash = {name: head.pop(name) for name in SQUASH if name in head}
    init: str | bool = True if config.lora.init == "kaiming" else config.lora.init
    checkpoint = directory / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    if config.tuning == "full":
        whole = {f"backbone.{k}": v for k, v in backbone.items()} | {f"reward_head.{k}": v for k, v in head.items()}
        write_atomically(checkpoint / "full_model.pt", serialised(whole | squash))
    else:
        write_atomically(checkpoint / "rm_head.pt", serialised(head))
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
        write_atomically(folder / "adapter_model.safetensors", save(prefixed, {"format": "pt"}))
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
            "reward_head": {"out_dim": 1} | {name: getattr(config.head, name) for name in RELEASED_HEAD},
        },
        "training": {"add_noise": config.add_noise},
        "dinalrm_align": own | {name: value.item() for name, value in squash.items()},
    }
    _write_json(directory / "config.json", values)


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Raise ValueError unless all tensors are finite floats and the LoRA rank and query count equal the config's."""
    config, tensors = checkpoint.config, checkpoint.tensors
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            what = f"of {tensor.dtype}" if not tensor.is_floating_point() else "NaN or infinite in places"
            raise ValueError(f"{checkpoint.where}: tensor {name} is {what}; expected finite floating numbers")
    sizes = {name: (config.lora.rank, *tensors[name].shape[1:]) for name in tensors if name.endswith("lora_A.weight")}
    if (queries := tensors.get("head.query_tokens")) is not None:
        width = queries.shape[-1] if config.head.width == -1 else config.head.width
        sizes["head.query_tokens"] = (1, config.head.num_queries, width)
    for name, expected in sizes.items():
        if tuple(tensors[name].shape) != expected:
            got = f"has shape {tuple(tensors[name].shape)}; by config.json expected {expected}"
            raise ValueError(f"{checkpoint.where}: tensor {name} {got}. Check that both are of one checkpoint")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")
