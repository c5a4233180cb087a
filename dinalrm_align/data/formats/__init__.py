"""Published layouts of preference data: one reader per layout, used for training, evaluation and leakage alike.

    hpdv3        JSON list of {prompt, path1 (preferred), path2, confidence, choice_dist [votes 1, votes 2], ...}
    hpdv2        JSON list of {prompt, file_path [2], human_preference [2]; 1 marks the preferred image}
    rankings     JSON list of {prompt, generations or image_path [n], ranking or rank [n]; 1 is best, ties allowed}:
                 ImageReward, HPDv2's test set
    pickapic     parquet of caption, jpg_0, jpg_1, label_0 (1, 0, or 0.5 for a tie), has_label
    genai_bench  parquet of prompt, left_image, right_image, vote_type
    jsonl        one {prompt, chosen, rejected} per line, paths; optional: label in [0, 1], votes [chosen, rejected],
                 confidence, scores {name: [chosen, rejected]}, concept
    released     DiNa-LRM's parquet of latents (`formats.released`)
    mined        parquet of latents by recipes/mine_pairs.py or verl-omni (`formats.mined`)
    latents      safetensors shards by recipes/prepare_pairs.py (`data.shards`)

pickapic and genai_bench may also be exported to JSON, with paths in place of images. `read_preferences` turns each
record into `Preference`s and passes them through one check. No image is opened. Torch-free, except latents.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinalrm_align.data.formats import latents, mined, published, released
from dinalrm_align.data.formats.record import Bad, Preference, Row, check_preference, refuse
from dinalrm_align.data.formats.rows import read_records, table_rows


@dataclass(frozen=True)
class Layout:
    """A layout: rows(source, bad) yields its records, and `convert` turns one into preferences."""

    rows: Callable[[Path | Sequence[Path], Bad], Iterator[Row]]
    convert: Callable[[Row], Iterable[Preference]]


LAYOUTS = {
    "hpdv3": Layout(table_rows, published.hpdv3),
    "hpdv2": Layout(table_rows, published.hpdv2),
    "rankings": Layout(table_rows, published.rankings),
    "jsonl": Layout(table_rows, published.jsonl),
    "pickapic": Layout(published.pickapic_rows, published.pickapic),
    "genai_bench": Layout(published.genai_bench_rows, published.genai_bench),
    "released": Layout(released.rows, released.convert),
    "mined": Layout(mined.rows, mined.convert),
    "latents": Layout(latents.rows, latents.convert),
}


def read_preferences(
    source: Path | Sequence[Path], layout: str, bad: Bad = refuse, *, strict: bool = True
) -> Iterator[Preference]:
    """Yield every pair of a data set, in its order.

    Args:
        source: a file, a folder, or (for JSON and parquet of images) several files.
        layout: a name in LAYOUTS.
        bad: called with a reason and a message for each record or file that cannot be read, which is then skipped; by
            default it raises.
        strict: also reject blank prompts, and pairs of an image with itself. Test sets are read as published.

    Raises FileNotFoundError or ValueError, naming the file, for a JSON file that cannot be read; ImportError without
    pyarrow.
    """
    entry = LAYOUTS[layout]
    for row in entry.rows(source, bad):
        try:
            pairs = [check_preference(pair, strict=strict) for pair in entry.convert(row)]
        except (KeyError, TypeError, ValueError) as error:
            reason = f"it lacks the field {error}" if isinstance(error, KeyError) else str(error)
            bad("invalid record", f"{row.where}: {reason}")
        else:
            yield from pairs


def folder_layout(folder: Path) -> str:
    """The layout of a folder, by the names of its files: released, mined, latents, or else pickapic."""
    if released.is_released(folder):
        return "released"
    names = {"mined": mined.MANIFEST, "latents": "index.json"}
    return next((layout for layout, name in names.items() if (folder / name).is_file()), "pickapic")


def find_layout(source: Path) -> str:
    """The layout of a folder or file, by its name and first record. Raises ValueError for an unknown one."""
    if source.is_dir():
        return folder_layout(source)
    if source.suffix in (".parquet", ".jsonl"):
        return {".parquet": "pickapic", ".jsonl": "jsonl"}[source.suffix]
    record: Any = next(iter(read_records(source)), None)
    for layout, key in (("hpdv3", "path1"), ("hpdv2", "human_preference"), *(("rankings", k) for k in published.RANKS)):
        if isinstance(record, dict) and key in record:
            return layout
    got = sorted(record)[:6] if isinstance(record, dict) else type(record).__name__
    raise ValueError(
        f"{source}: got records of {got}; expected those of HPDv3 (path1), HPDv2 (human_preference) or ImageReward "
        "(ranking)"
    )
