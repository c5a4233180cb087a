"""A few values of a model's weight files, read without loading the model, to identify the model.

Values are compared up to bfloat16 rounding, so copies of a model in different precisions are equal.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from dinalrm_align.train.files import reading
from dinalrm_align.train.settings import check_fields

VALUES = 16
TOLERANCE = 2.0**-7


@dataclass(frozen=True)
class WeightSample:
    """source: folder or hub id. tensors: their number. values: one number from each of VALUES tensors."""

    source: str
    tensors: int
    values: list[float]

    def __post_init__(self) -> None:
        check_fields(self, "encoded_with")

    def same_weights(self, other: "WeightSample") -> bool:
        """Whether both are samples of the same model, in any folder and precision."""
        close = (math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-6) for a, b in zip(self.values, other.values))
        return (self.tensors, len(self.values)) == (other.tensors, len(other.values)) and all(close)


def sample_weights(source: str | Path, folder: str) -> WeightSample | None:
    """Sample the safetensors in `folder` of a pipeline's folder or hub id; None when they are not on this machine.

    Takes the first number of evenly spaced tensors, in name order, of two dimensions or more. Files of a variant
    (model.fp16.safetensors) are ignored. Raises ValueError for a file that is not in safetensors format.
    """
    root = Path(source) if Path(source).is_dir() else _cached(str(source), folder)
    files = sorted((root / folder).glob("*.safetensors")) if root else []
    files = [file for file in files if "." not in file.stem]
    names: dict[str, Path] = {}
    for file in files:
        with reading("safetensors file", file), safe_open(file, framework="pt") as tensors:
            names |= {name: file for name in tensors.keys() if len(tensors.get_slice(name).get_shape()) >= 2}
    if not names:
        return None
    ordered = sorted(names)
    chosen = sorted({ordered[index * len(ordered) // VALUES] for index in range(VALUES)})
    values = []
    for name in chosen:
        with reading("safetensors file", names[name]), safe_open(names[name], framework="pt") as tensors:
            values.append(round(float(tensors.get_slice(name)[:1].flatten()[0]), 8))
    return WeightSample(str(source), len(names), values)


def _cached(source: str, folder: str) -> Path | None:
    """The folder of a hub id in the local cache, without network access."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, allow_patterns=[f"{folder}/*"], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
