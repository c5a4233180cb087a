"""Readers of preference data, one per layout. Training, evaluation and the overlap report use the same readers.

    hpdv3        JSON list of {prompt, path1 (preferred), path2, confidence, choice_dist [votes 1, votes 2], ...}; also
                 HPDv3++ (arXiv 2606.14657), whose image paths are relative to the folder above that of the JSON file
    hpdv2        JSON list of {prompt, file_path [2], human_preference [2]; 1 marks the preferred image}
    rankings     JSON list of {prompt, generations or image_path [n], ranking or rank [n]; 1 is best, ties allowed}:
                 used by ImageReward and HPDv2's test set
    pickapic     parquet of caption, jpg_0, jpg_1, label_0 (1, 0, or 0.5 for a tie), has_label
    genai_bench  parquet of prompt, left_image, right_image, vote_type
    jsonl        one {prompt, chosen, rejected} per line, where chosen and rejected are image paths; optional fields:
                 label in [0, 1], votes [chosen, rejected], confidence, scores {name: [chosen, rejected]}, concept
    released     DiNa-LRM's parquet of latents (`formats.released`)
    mined        parquet of latents, written by recipes/mine_pairs.py or verl-omni (`formats.mined`)
    latents      safetensors shards, written by recipes/prepare_pairs.py (`data.shards`)

The readers of pickapic and genai_bench also accept JSON files with image paths in place of the image columns. No reader
opens images. Only the reader of the layout `latents` needs torch.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dinalrm_align.data.formats import mined, published, released
from dinalrm_align.data.formats.record import INVALID, Bad, Cell, Preference, Row, check_preference, raise_error
from dinalrm_align.data.formats.rows import read_records, table_rows
from dinalrm_align.train.files import InputError


def _latent_rows(folder: Path, bad: Bad) -> Iterator[Row]:
    """Yield a `Row` per group. `Row.fields` holds the group's prompt and pairs, and the data set's concept names."""
    from dinalrm_align.data.shards import GROUP_COLUMNS, PAIR_COLUMNS, read_columns, read_index, read_prompt_list

    index = read_index(folder)
    prompts = read_prompt_list(folder, index)
    columns = {name: column.tolist() for name, column in read_columns(folder, index).items()}
    for number, values in enumerate(zip(*(columns[name] for name in GROUP_COLUMNS), strict=True)):
        group = dict(zip(GROUP_COLUMNS, values, strict=True))
        shard = index.latents[group["shard"]]
        pairs = slice(group["first_pair"], group["first_pair"] + group["pairs"])
        fields = {"prompt": prompts[group["prompt"]], "concepts": index.concepts}
        fields["pairs"] = list(zip(*(columns[name][pairs] for name in PAIR_COLUMNS), strict=True))
        cell = Cell(str(folder / shard.file), 0, group["first"], "latents")
        yield Row(f"{folder}, group {number}", number, fields, cell)


def _latents(row: Row) -> Iterator[Preference]:
    for chosen, rejected, label, concept in row.fields["pairs"]:
        cells = (row.cell._replace(row=row.cell.row + offset) for offset in (chosen, rejected))
        name = row.fields["concepts"][concept] if concept >= 0 else None
        yield Preference(row.fields["prompt"], *cells, label=label, concept=name, group=row.number, encoded=True)


LAYOUTS: dict[str, tuple[Callable[..., Iterator[Row]], Callable[[Row], Iterator[Preference]]]] = {
    "hpdv3": (table_rows, published.hpdv3),
    "hpdv2": (table_rows, published.hpdv2),
    "rankings": (table_rows, published.rankings),
    "jsonl": (table_rows, published.jsonl),
    "pickapic": (published.pickapic_rows, published.pickapic),
    "genai_bench": (published.genai_bench_rows, published.genai_bench),
    "released": (released.rows, released.convert),
    "mined": (mined.rows, mined.convert),
    "latents": (_latent_rows, _latents),
}
"""Layout -> (rows, convert): rows(source, bad) yields records; convert(row) yields the preferences of one record."""


def read_preferences(
    source: Path | Sequence[Path], layout: str, bad: Bad = raise_error, *, strict: bool = True
) -> Iterator[Preference]:
    """Yield every pair of a data set, in stored order. Every pair has passed `record.check_preference`.

    Args:
        source: a file, a folder, or a list of parquet files of images.
        layout: layout of `source`, such as "hpdv3". LAYOUTS holds all names.
        bad: function called with (reason, message) for each record or file that cannot be read, such as
            `Dropped.bad`. The default raises ValueError. If `bad` returns, the record or file is skipped.
        strict: whether to call `bad` also for pairs of an image with itself.

    Raises FileNotFoundError or ValueError for an unreadable JSON file, and ImportError for parquet without pyarrow.
    """
    rows, convert = LAYOUTS[layout]
    for row in rows(source, bad):
        try:
            pairs = [check_preference(pair) if strict else pair for pair in convert(row)]
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks the field {error}" if isinstance(error, KeyError) else str(error)
            bad(INVALID, f"{row.where}: {reason}")
        else:
            yield from pairs


def folder_layout(folder: Path) -> str:
    """Return "released", "mined" or "latents" if the folder holds files of that layout, otherwise "pickapic"."""
    names = {"released": "part_rank*.parquet", "mined": mined.MANIFEST, "latents": "index.json"}
    return next((layout for layout, name in names.items() if any(folder.glob(name))), "pickapic")


def find_layout(source: Path) -> str:
    """Find the layout of a folder or file from file names or JSON records. Raises ValueError if unknown."""
    if source.is_dir():
        return folder_layout(source)
    if source.suffix in (".parquet", ".jsonl"):
        return {".parquet": "pickapic", ".jsonl": "jsonl"}[source.suffix]
    records = read_records(source)
    for layout, key in (("hpdv3", "path1"), ("hpdv2", "human_preference"), *(("rankings", k) for k in published.RANKS)):
        if any(isinstance(record, dict) and key in record for record in records):
            return layout
    record: Any = next(iter(records), None)
    got = sorted(record)[:6] if isinstance(record, dict) else type(record).__name__
    expected = "those of HPDv3 (path1), HPDv2 (human_preference) or ImageReward (ranking)"
    raise InputError(f"{source}: got records of {got}; expected {expected}")
