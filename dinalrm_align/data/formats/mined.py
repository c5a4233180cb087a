"""Read mined pairs: generated images, ranked by a reward. Columns are those of verl-omni's offline DPO. Torch-free.

    manifest.json                 format, encoding of latents and embeddings, mining settings, number of parquet files
    pairs/pairs-00000.parquet     one row for each pair, in a row group of its own

Each cell of a tensor column holds the bytes that `torch.save` writes for one tensor, without a batch axis:

    img_win_latents, img_lose_latents (C, H, W)      without noise; scaled as the transformer's input
    prompt_embeds (L, D), pooled_prompt_embeds (P,)
    prompt_embeds_mask (L,) int32                    all ones, since SD3 does not mask tokens
    negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_embeds_mask
                                                     as above, for the empty prompt; null if not stored

Columns without tensors: prompt and negative_prompt (each a list of one chat message), win_score and lose_score
(float64), uid, data_source, reward_model, and extra_info (raw_prompt, raw_negative_prompt, index of the prompt,
num_candidates, win_candidate, lose_candidate, candidate_scores). The image paths img_win and img_lose are empty.
verl-omni's reader (verl_omni/utils/dataset/offline_dpo_dataset.py) requires both columns but opens no images. To train
with verl-omni, set `data.train_files=FOLDER/pairs`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinalrm_align.data.formats.record import Bad, Preference, Row, named_scores
from dinalrm_align.data.formats.rows import parquet_rows
from dinalrm_align.train.files import InputError, read_json

FORMAT = "dinalrm_align.mined/1"
MANIFEST = "manifest.json"
LATENTS = ("img_win_latents", "img_lose_latents")
TEXT = ("prompt_embeds", "pooled_prompt_embeds")


def shard_path(folder: Path, number: int) -> Path:
    return folder / "pairs" / f"pairs-{number:05d}.parquet"


def read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: not a folder of mined pairs")
    content = read_json(folder / MANIFEST)
    if content.get("format") != FORMAT:
        raise InputError(f"{folder / MANIFEST}: format: got {content.get('format')!r:.80}; expected {FORMAT!r}")
    return content


def shard_files(path: Path) -> list[Path]:
    """Return a folder's parquet files, or [path] for a parquet file. Raises FileNotFoundError if a file is missing."""
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"no parquet file {path}")
        return [path]
    shards = read_manifest(path).get("shards")
    if type(shards) is not int:
        raise InputError(f"{path / MANIFEST}: shards: got {shards!r:.60}; expected an integer")
    files = [shard_path(path, number) for number in range(shards)]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} of {len(files)} shards, first {missing[0].name}: the mining was interrupted; "
            "run recipes/mine_pairs.py again with the same settings"
        )
    return files


def rows(path: Path, bad: Bad) -> Iterator[Row]:
    columns = ("prompt", "win_score", "lose_score")
    return parquet_rows(shard_files(path), bad, columns, (*LATENTS, *TEXT), optional=("extra_info",))


def convert(row: Row) -> Iterator[Preference]:
    given = [row.fields[name] for name in ("win_score", "lose_score")]
    scores = named_scores({"score": None if given == [None, None] else given})
    images = (row.image(name) for name in LATENTS)
    yield Preference(_prompt(row.fields), *images, scores=scores, group=row.number, encoded=True)


def _prompt(fields: Any) -> str:
    """Return extra_info.raw_prompt or, if there is none, the text of the user's messages in `prompt`."""
    extra, chat = fields.get("extra_info"), fields["prompt"]
    prompt = extra.get("raw_prompt") if isinstance(extra, dict) else None
    if isinstance(prompt, str) and prompt:
        return prompt
    messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else chat
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
    ):
        raise InputError(f"prompt: got {chat!r:.80}; expected text, or a list of messages with role and content")
    texts = [message["content"] for message in messages if message["role"] == "user"]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"prompt: got messages of {texts!r:.80}; expected text")
    return "\n".join(texts)
