"""Read, check and write the files of a directory of encoded pairs. `data.latent_pairs` describes the files.

Row counts and shapes are compared across files when the directory is opened, so that an incomplete or inconsistent data
set fails before training starts.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.train.files import InputError, parse_json, read_json, read_text, reading, write_atomically
from dinalrm_align.train.settings import NonNegativeInt, PositiveInt, check_fields

FORMAT = "dinalrm_align.pairs/1"
GROUP_COLUMNS = ("prompt", "shard", "first", "pictures", "first_pair", "pairs")
PAIR_COLUMNS = ("chosen", "rejected", "label", "concept")
LATENTS = {"latents": 4}
TEXT = {"prompt_embeds": 3, "pooled_prompt_embeds": 2}
"""Number of dimensions of each tensor in a shard of text embeddings; LATENTS in a shard of latents."""


@dataclass(frozen=True)
class Shard:
    """Entry of index.json for one safetensors file of latents or text embeddings. count: number of rows.

    height, width: spatial size of the latents; 0 for text embeddings. sha256: hash of the file; "" if not recorded.
    """

    file: str
    count: PositiveInt
    height: NonNegativeInt = 0
    width: NonNegativeInt = 0
    sha256: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "shard")
        if Path(self.file).name != self.file:
            raise InputError(f"shard.file: got {self.file!r}; expected the name of a file in the directory itself")


@dataclass(frozen=True)
class Index:
    format: str
    manifest: PairManifest
    concepts: list[str]
    latents: list[Shard]
    text: list[Shard]

    def __post_init__(self) -> None:
        check_fields(self, "index")
        if not self.latents or not self.text:
            got = f"{len(self.latents)} shards of latents, {len(self.text)} of text"
            raise InputError(f"index: got {got}; expected some of both")


def read_index(directory: Path) -> Index:
    """Read index.json. Raises FileNotFoundError if it is missing and ValueError if it is invalid."""
    path = directory / "index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no index.json: no latent pairs, or their writing was interrupted")
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise InputError(f"{path}: format: got {values.get('format')!r:.80}; expected {FORMAT!r}")
    try:
        values["manifest"] = PairManifest.of(values["manifest"])
        for kind in ("latents", "text"):
            values[kind] = [Shard(**shard) for shard in values[kind]]
        return Index(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the index of latent pairs ({type(error).__name__}: {error})") from error


def read_prompt_list(directory: Path, index: Index) -> list[str]:
    """Return the distinct prompts in prompts.json. Prompt i belongs to row i, counted over all text shards."""
    path = directory / "prompts.json"
    prompts = parse_json(read_text(path, "file"), str(path))
    rows = sum(shard.count for shard in index.text)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts) or len(prompts) != rows:
        got = f"a list of {len(prompts)}" if isinstance(prompts, list) else type(prompts).__name__
        raise InputError(f"{path}: got {got}; expected a list of {rows} strings, one per row of the text shards")
    return prompts


class RowFile:
    """Reader of tensor rows in a safetensors file. It may be used in threads and forked processes.

    shape: shape of one row of the file's first tensor.
    """

    def __init__(self, path: Path, shape: tuple[int, ...] = ()) -> None:
        self.path, self.shape = path, shape
        found = path.stat()
        self._inode, self._size = found.st_ino, found.st_size  # a file replaced under this name has another inode

    def read(self, name: str, first: int, count: int = 1) -> Tensor:
        """Return `count` rows of the tensor `name`, starting at row `first`, as a view of the memory-mapped file.

        Raises OSError if the file was truncated, because a view beyond the end of the file would crash the process.
        """
        size = self.path.stat().st_size
        if size < self._size:
            raise OSError(f"{self.path}: got {size} bytes; expected {self._size}: the file was truncated")
        return _opened(self.path, self._inode).get_slice(name)[first : first + count]


@functools.lru_cache(256)  # a large data set has thousands of files
def _opened(path: Path, inode: int) -> Any:
    return safe_open(path, framework="pt")


def open_shard(directory: Path, shard: Shard, tensors: dict[str, int]) -> RowFile:
    """Open the file that `shard` describes, and check the file's tensors. tensors: expected ndim by tensor name."""
    path = directory / shard.file
    if not path.is_file():
        raise FileNotFoundError(f"index.json names {path.name}, which is not in {path.parent}")
    with reading("shard of pairs", path), safe_open(path, framework="pt") as file:  # compares header and file size
        slices = {name: file.get_slice(name) for name in file.keys()}
        found = {name: (tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in slices.items()}
    for name, dims in tensors.items():
        dtype, shape = found.get(name, ("no such tensor", ()))
        if dtype not in ("F16", "BF16", "F32", "F64") or len(shape) != dims or math.prod(shape) == 0:
            raise InputError(f"{path}: {name}: got {dtype} {shape}; expected floating numbers in {dims} dimensions")
        if shape[0] != shard.count:
            raise InputError(f"{path}: {name}: got {shape[0]} rows; expected {shard.count}, as in index.json")
        if dims == 4 and shape[2:] != (size := (shard.height, shard.width)):
            raise InputError(f"{path}: {name}: got size {shape[2:]}; expected {size}, as in index.json")
    return RowFile(path, found[next(iter(tensors))][1][1:])


def read_columns(directory: Path, index: Index) -> dict[str, Tensor]:
    """Return the 1-D columns of groups.safetensors by name. Raises ValueError for an index out of range."""
    path = directory / "groups.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected it beside index.json")
    with reading("table of groups", path):
        columns = load_file(path)
    for names in (GROUP_COLUMNS, PAIR_COLUMNS):
        shapes = {name: tuple(columns[name].shape) if name in columns else () for name in names}
        if len(set(shapes.values())) > 1 or not all(len(shape) == 1 and shape[0] > 0 for shape in shapes.values()):
            raise InputError(f"{path}: got columns of shapes {shapes}; expected each, of one length, at least 1")
    for name in (*GROUP_COLUMNS, "chosen", "rejected", "concept"):
        if columns[name].is_floating_point() or columns[name].is_complex():
            raise InputError(f"{path}: column {name}: got {columns[name].dtype}; expected integers")
    images, pairs = columns["pictures"], columns["pairs"]
    for name, low, high in (
        ("prompt", 0, sum(shard.count for shard in index.text) - 1),
        ("shard", 0, len(index.latents) - 1),
        ("pictures", 2, max(shard.count for shard in index.latents)),
        ("first", 0, max(shard.count for shard in index.latents) - 1),
        ("first_pair", 0, len(columns["chosen"]) - 1),
        ("pairs", 1, len(columns["chosen"])),
        ("chosen", 0, int(images.max()) - 1),
        ("rejected", 0, int(images.max()) - 1),
        ("concept", -1, len(index.concepts) - 1),
    ):
        _check_column(path, name, columns[name], low, high)
    counts = images.new_tensor([shard.count for shard in index.latents])[columns["shard"].long()]
    _check_column(path, "shard, rows left behind a group", counts - columns["first"] - images, 0, int(counts.max()))
    _check_column(path, "first_pair + pairs", columns["first_pair"] + pairs, 1, len(columns["chosen"]))
    return columns


def _check_column(path: Path, name: str, column: Tensor, low: int, high: int) -> None:
    smallest, largest = column.min().item(), column.max().item()
    if not (smallest >= low and largest <= high):
        raise InputError(f"{path}: column {name}: got {smallest:g} to {largest:g}; expected {low} to {high}")


def write_tables(
    directory: Path,
    manifest: PairManifest,
    groups: Sequence[Mapping[str, int]],
    pairs: Sequence[tuple[int, int, float, int]],
    shards: Mapping[str, list[dict[str, Any]]],
    *,
    concepts: Sequence[str] = (),
) -> None:
    """Write groups.safetensors, then index.json.

    groups: for each group of images, a dict whose keys are GROUP_COLUMNS. pairs: (chosen, rejected, label, concept) of
    each pair. shards: {"latents": [...], "text": [...]}, where each list holds one dict of `Shard` fields per file.
    """
    columns = {name: torch.tensor([group[name] for group in groups]) for name in GROUP_COLUMNS}
    columns |= {name: torch.tensor(column) for name, column in zip(PAIR_COLUMNS, zip(*pairs, strict=True), strict=True)}
    write_if_changed(directory / "groups.safetensors", save(columns))
    index = {"format": FORMAT, "manifest": dataclasses.asdict(manifest), "concepts": list(concepts)}
    write_if_changed(directory / "index.json", json.dumps(index | shards, indent=1))


def write_if_changed(path: Path, content: str | bytes) -> None:
    """Write `content` to a file atomically, unless the file already holds exactly `content`."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)
