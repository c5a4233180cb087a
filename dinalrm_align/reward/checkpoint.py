"""Checkpoints of a latent reward: ours, and the layout DiNa-LRM was released in. Both are read and written, strictly.

Ours: `config.json` (RewardConfig) and `model.safetensors` (`backbone.*`: the LoRA, or the whole trunk under full
tuning; `head.*`), which carries a digest of its tensors that is checked on reading. Released: `config.json`,
`checkpoint/backbone_lora/` (a peft adapter) and `checkpoint/rm_head.pt`; no adapter with a frozen backbone;
`checkpoint/full_model.pt` alone after full training. `.pt` files are read with weights_only=True. Every file is written
under a temporary name, flushed and renamed.
"""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dinalrm_align.models.hub import check_source
from dinalrm_align.reward.backbones.sd3 import LORA_TARGETS, TEXT_SIDE
from dinalrm_align.reward.config import HeadConfig, LoraConfig, RewardConfig
from dinalrm_align.train.digest import digest
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.files import HUB_ID, make_folder, read_json, reading

WEIGHTS = "model.safetensors"
PEFT_PREFIX = "base_model.model."
BESIDE = "it beside config.json, which says that it must be there"
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
    check_source("reward", source)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["config.json", WEIGHTS, "checkpoint/*"]
    with reading("reward", source):
        return Path(
            snapshot_download(source, revision=revision, local_files_only=local_files_only, allow_patterns=patterns)
        )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read either layout from a folder. Raises ValueError or FileNotFoundError: the file, and what is wrong in it."""
    path = folder / "config.json"
    values = read_json(path, "a latent reward in our layout or in DiNa-LRM's released one")
    try:
        if "model" in values:
            checkpoint = _read_released(folder, values)
        else:
            config, weights = RewardConfig.from_dict(values), folder / WEIGHTS
            checkpoint = Checkpoint(config, _read_tensors(weights), folder, str(weights))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, ValueError) and str(folder) in str(error):
            raise  # it names its file already
        raise ValueError(f"{path}: not a reward config ({type(error).__name__}: {error})") from error
    _check_tensors(checkpoint)
    return checkpoint


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
    if format == "released":
        _check_released(config)
    directory = Path(directory)
    make_folder(directory)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if format == "dinalrm":
        metadata = {"format": "pt", "sha256": digest(tensors)}
        write_atomically(directory / WEIGHTS, save(tensors, metadata))
        _write_json(directory / "config.json", config.to_dict())
    else:
        _write_released(directory, config, tensors)


def base_location(base_model_id: str, folder: Path, *, trusted: bool = True) -> str:
    """Where the base model of a checkpoint in `folder` is: ids that start with ./ or ../ are relative to it.

    trusted: the folder is the user's own. ValueError when a checkpoint that was downloaded names a place on this
    machine instead of a hub id.
    """
    relative = base_model_id.startswith(("./", "../"))
    if not trusted and (relative or not HUB_ID.fullmatch(base_model_id)):
        raise ValueError(
            f"{folder / 'config.json'}: base_model_id {base_model_id!r} is no hub id, owner/name, and a downloaded "
            "checkpoint must not name places on this machine; copy it to a folder of yours and correct it there"
        )
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
    for name in ("freeze_backbone", "use_lora"):
        if not isinstance(model[name], bool):
            raise TypeError(f"model.{name}: got {model[name]!r:.80}; expected true or false")
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
    values = read_json(folder / "adapter_config.json", BESIDE)
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


def _check_released(config: RewardConfig) -> None:
    """ValueError for an architecture that the released code has not."""
    parts = {"head.film": config.head.film, "head.value_gates": config.head.value_gates, "text_taps": config.text_taps}
    lacking = [name for name, present in parts.items() if not present]
    if lacking:
        raise ValueError(
            f"the released layout has no place for a reward without {', '.join(lacking)}; save it as 'dinalrm'"
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
        _write_pt(checkpoint / "full_model.pt", whole | squash)
    else:
        _write_pt(checkpoint / "rm_head.pt", head)
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


def _check_tensors(checkpoint: Checkpoint) -> None:
    """ValueError unless every tensor is floating and finite, and those whose size the config states have it: networks
    of that size are about to be built.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            what = f"of {tensor.dtype}" if not tensor.is_floating_point() else "NaN or infinite in places"
            raise ValueError(f"{checkpoint.where}: tensor {name} is {what}; expected finite floating numbers")
    queries = tensors.get("head.query_tokens")
    width = config.head.width if queries is None or config.head.width != -1 else queries.shape[-1]
    sizes = {"head.query_tokens": (1, config.head.num_queries, width)}
    sizes |= {name: (config.lora.rank, *tensors[name].shape[1:]) for name in tensors if name.endswith("lora_A.weight")}
    for name, expected in sizes.items():
        if name in tensors and tuple(tensors[name].shape) != expected:
            raise ValueError(
                f"{checkpoint.where}: tensor {name} has shape {tuple(tensors[name].shape)}; by config.json expected "
                f"{expected}. Check that both are of one checkpoint"
            )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected {BESIDE}")
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # a file of unknown content fails in ways that nobody lists
        raise ValueError(f"{path}: not a readable safetensors file ({error}); fetch or write it again") from error
    if expected is not None and digest(tensors) != expected:
        raise ValueError(
            f"{path} is damaged: the tensors are not those that were saved (their SHA-256 is not {expected:.16}...); "
            "fetch or write it again"
        )
    return tensors


def _read_pt(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected {BESIDE}")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of unknown content fails in ways that nobody lists
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path}: not a readable file of tensors ({reason}). Only tensors are read, a file that needs code to run "
            "is refused: fetch it again, or have its owner save a plain state dict"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path}: expected a state dict of tensors")
    return tensors


def _write_pt(path: Path, tensors: dict[str, Tensor]) -> None:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_atomically(path, buffer.getvalue())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")
