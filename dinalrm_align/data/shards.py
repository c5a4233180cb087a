"""The files of a directory of latent pairs (`data.latent_pairs`), read and checked before anything is trained on them.

Every row, count and shape that one file says of another is compared, so that a data set that was cut short or mixed up
is refused when it is opened, not in the night. Rows are read by position into place (`preadv`), not through a memory
map: as quick from the page cache, without Python's lock, so that threads read ahead; and a file that is cut short
meanwhile is an error with its name, where a map ends the process by SIGBUS.
"""

import functools
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.train.files import parse_json, read_json, read_text, reading
from dinalrm_align.train.settings import check_fields, check_integer

FORMAT = "dinalrm_align.pairs/1"
GROUP_COLUMNS = ("prompt", "shard", "first", "pictures", "first_pair", "pairs")
PAIR_COLUMNS = ("chosen", "rejected", "label", "concept")
LATENTS = {"latents": 4}
TEXT = {"prompt_embeds": 3, "pooled_prompt_embeds": 2}
"""What a shard holds: tensors, and their dimensions."""
STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
MAX_OPEN = 256
"""Files that a process keeps open: a large set has thousands."""


@dataclass(frozen=True)
class Shard:
    """One file of the index: its name in the directory, its rows, for latents their height and width, and the SHA-256
    of its bytes where it was noted.
    """

    file: str
    count: int
    height: int = 0
    width: int = 0
    sha256: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "shard")
        check_integer("shard.count", self.count, low=1)
        if Path(self.file).name != self.file:
            raise ValueError(f"shard.file: got {self.file!r}; expected the name of a file in the directory itself")


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    format: str
    manifest: PairManifest
    concepts: list[str]
    latents: list[Shard]
    text: list[Shard]

    def __post_init__(self) -> None:
        check_fields(self, "index")
        if not self.latents or not self.text:
            got = f"{len(self.latents)} shards of latents, {len(self.text)} of text"
            raise ValueError(f"index: got {got}; expected some of both")


def read_index(directory: Path) -> Index:
    """The index of a directory of pairs. FileNotFoundError when there is none, ValueError when it cannot be meant."""
    path = directory / "index.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no index.json: not a directory of latent pairs, or one whose writing was interrupted"
        )
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise ValueError(f"{path}: format {values.get('format')!r:.80}; this version reads {FORMAT!r}")
    try:
        values["manifest"] = PairManifest.of(values["manifest"])
        for kind in ("latents", "text"):
            values[kind] = [Shard(**shard) for shard in values[kind]]
        return Index(**values)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the index of latent pairs ({type(error).__name__}: {error})") from error


def read_prompt_list(directory: Path, index: Index) -> list[str]:
    """The distinct prompts, one per row of the text shards."""
    path = directory / "prompts.json"
    prompts = parse_json(read_text(path, "file"), str(path))
    rows = sum(shard.count for shard in index.text)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts) or len(prompts) != rows:
        got = f"a list of {len(prompts)}" if isinstance(prompts, list) else type(prompts).__name__
        raise ValueError(f"{path}: got {got}; expected a list of {rows} strings, one per row of the text shards")
    return prompts


class RowFile:
    """Rows of the tensors of a safetensors file, for any number of threads, and for forks."""

    def __init__(self, path: Path, layout: dict[str, tuple[torch.dtype, tuple[int, ...], int]]) -> None:
        """layout: name -> dtype, shape of a row, where in the file its rows begin."""
        self.path = path
        self._layout = layout
        self._inode = path.stat().st_ino  # a file that is written anew under this name is another one

    def read(self, name: str, first: int, count: int = 1) -> Tensor:
        """Rows `first` to `first + count` of a tensor, in the stored dtype. OSError when the file ends before them."""
        dtype, shape, start = self._layout[name]
        rows = torch.empty((count, *shape), dtype=dtype)
        size = rows[0].nbytes
        buffer = memoryview(rows.view(torch.uint8).flatten().numpy())
        file, done = _opened(self.path, self._inode), 0
        while done < len(buffer):
            got = os.preadv(file.descriptor, [buffer[done:]], start + first * size + done)
            if got == 0:
                raise OSError(f"{self.path} ends within row {first + done // size} of {name}: it was cut short")
            done += got
        return rows


class _Opened:
    """A file descriptor that is closed when nobody reads from it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if "descriptor" in vars(self):
            os.close(self.descriptor)


@functools.lru_cache(MAX_OPEN)
def _opened(path: Path, inode: int) -> _Opened:
    return _Opened(path)


def open_shard(directory: Path, shard: Shard, tensors: dict[str, int]) -> RowFile:
    """A shard, its tensors of the rows and the size that the index says; `tensors`: names and dimensions."""
    path = directory / shard.file
    if not path.is_file():
        raise FileNotFoundError(f"index.json names {path.name}, which is not in {path.parent}")
    with reading("shard of pairs", path):
        with safe_open(path, framework="pt") as file:  # compares the header with the size of the file
            found = {name: file.get_slice(name) for name in file.keys()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in found.items()}
            dtypes = {name: tensor.get_dtype() for name, tensor in found.items()}
        with open(path, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = parse_json(opened.read(length).decode("utf-8"), str(path))
    for name, dims in tensors.items():
        if name not in shapes or len(shapes[name]) != dims or dtypes[name] not in STORED_DTYPES:
            got = f"{dtypes[name]} {shapes[name]}" if name in shapes else f"{sorted(shapes)[:4]}"
            raise ValueError(f"{path}: {name}: got {got}; expected floating numbers in {dims} dimensions")
        if shapes[name][0] != shard.count:
            raise ValueError(f"{path} holds {shapes[name][0]} rows of {name}, index.json says {shard.count}")
        if dims == 4 and shapes[name][2:] != (shard.height, shard.width):
            size = f"height and width {(shard.height, shard.width)}"
            raise ValueError(f"{path}: {name} are {shapes[name][2:]}, index.json says {size}")
        if math.prod(shapes[name]) == 0:
            raise ValueError(f"{path}: {name}: got shape {shapes[name]}; expected numbers in it")
    return RowFile(
        path,
        {
            name: (STORED_DTYPES[dtypes[name]], shapes[name][1:], 8 + length + header[name]["data_offsets"][0])
            for name in tensors
        },
    )


def read_columns(directory: Path, index: Index) -> dict[str, Tensor]:
    """groups.safetensors: what belongs together. ValueError for a row, a pair or a label that cannot be."""
    path = directory / "groups.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected it beside index.json")
    with reading("table of groups", path):
        columns = load_file(path)
    for names in (GROUP_COLUMNS, PAIR_COLUMNS):
        shapes = {name: tuple(columns[name].shape) if name in columns else () for name in names}
        if len(set(shapes.values())) > 1 or not all(len(shape) == 1 and shape[0] > 0 for shape in shapes.values()):
            raise ValueError(f"{path}: got columns of shapes {shapes}; expected each, of one length, at least 1")
    for name in (*GROUP_COLUMNS, "chosen", "rejected", "concept"):
        if columns[name].is_floating_point() or columns[name].is_complex():
            raise ValueError(f"{path}: column {name}: got {columns[name].dtype}; expected integers")
    pictures, pairs = columns["pictures"], columns["pairs"]
    for name, low, high in (
        ("prompt", 0, sum(shard.count for shard in index.text) - 1),
        ("shard", 0, len(index.latents) - 1),
        ("pictures", 2, max(shard.count for shard in index.latents)),
        ("first", 0, max(shard.count for shard in index.latents) - 1),
        ("first_pair", 0, len(columns["chosen"]) - 1),
        ("pairs", 1, len(columns["chosen"])),
        ("chosen", 0, int(pictures.max()) - 1),
        ("rejected", 0, int(pictures.max()) - 1),
        ("label", 0, 1),
        ("concept", -1, len(index.concepts) - 1),
    ):
        _check_column(path, name, columns[name], low, high)
    counts = pictures.new_tensor([shard.count for shard in index.latents])[columns["shard"].long()]
    _check_column(path, "shard, rows left behind a group", counts - columns["first"] - pictures, 0, int(counts.max()))
    _check_column(path, "first_pair + pairs", columns["first_pair"] + pairs, 1, len(columns["chosen"]))
    return columns


def _check_column(path: Path, name: str, column: Tensor, low: int, high: int) -> None:
    smallest, largest = column.min().item(), column.max().item()
    if not (smallest >= low and largest <= high):
        raise ValueError(f"{path}: column {name}: got {smallest:g} to {largest:g}; expected {low} to {high}")
