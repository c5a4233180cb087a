"""Our own latent shards (`data.shards`) as preferences: prompts, labels, concepts, and where each latent is."""

from collections.abc import Iterator
from pathlib import Path

from dinalrm_align.data.formats.record import Bad, Cell, Preference, Row


def rows(folder: Path, bad: Bad) -> Iterator[Row]:
    """The groups of the tables; fields holds the group's columns, its pairs, and what they refer to."""
    from dinalrm_align.data.shards import GROUP_COLUMNS, PAIR_COLUMNS, read_columns, read_index, read_prompt_list

    index = read_index(folder)
    prompts = read_prompt_list(folder, index)
    columns = {name: column.tolist() for name, column in read_columns(folder, index).items()}
    for number, values in enumerate(zip(*(columns[name] for name in GROUP_COLUMNS), strict=True)):
        group = dict(zip(GROUP_COLUMNS, values, strict=True))
        shard = index.latents[group["shard"]]
        pairs = slice(group["first_pair"], group["first_pair"] + group["pairs"])
        yield Row(
            f"{folder}, group {number}",
            number,
            {
                "prompt": prompts[group["prompt"]],
                "pairs": list(zip(*(columns[name][pairs] for name in PAIR_COLUMNS), strict=True)),
                "concepts": index.concepts,
            },
            Cell(str(folder / shard.file), 0, group["first"], "latents"),
        )


def convert(row: Row) -> Iterator[Preference]:
    for chosen, rejected, label, concept in row.fields["pairs"]:
        cells = (row.cell._replace(row=row.cell.row + offset) for offset in (chosen, rejected))
        name = row.fields["concepts"][concept] if concept >= 0 else None
        yield Preference(row.fields["prompt"], *cells, label=label, concept=name, group=row.number)
